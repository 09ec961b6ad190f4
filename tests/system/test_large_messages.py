"""Messages, means and shards above 2^31 bytes, on two ranks: 5 GB of memory, 3 GB of disk.

`DTRAIN_LARGE=1` runs it (`make large`). Cheap tests of the same chunks have a length of 7 bytes
(`tests/ranks/contract.py`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.process import start

SCRIPT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (6 * 10**9,) * 2)  # a copy too many is an error
from pathlib import Path
import dtrain
comm = dtrain.init()
import torch
from dtrain.checkpoint.shard import open_shard, read_tensor, write_shard

size = 2**31 + 9
places = [0, 2**30, 2**31 - 1, 2**31, size - 1]
if comm.rank == 0:
    data = torch.zeros(size, dtype=torch.int8)
    for number, place in enumerate(places):
        data[place] = number + 1
    comm.isend(data, 1, 0)
    comm.flush()
else:
    comm.post_recv(0, 0, [((size,), torch.int8)])
    data = comm.recv(0, 0)
    assert sum(int(part.sum()) for part in data.split(2**24)) == 15
    assert [int(data[place]) for place in places] == [1, 2, 3, 4, 5]
    path = Path(sys.argv[1]) / "shard.h5"
    row = write_shard(path, {"large": data})
    assert row["bytes"] > size
    del data
    with open_shard(path) as shard:
        data = read_tensor(shard, "large")
    path.unlink()
    assert [int(data[place]) for place in places] == [1, 2, 3, 4, 5]
assert comm.allgather_object(comm.traffic.bytes_intra)[0] >= size
del data

data = torch.full((2**29 + 3,), float(comm.rank))
comm.mean_([data])
assert data.min() == data.max() == 0.5
assert comm.allgather_object(True) == [True, True]
print("large", flush=True)
"""


@pytest.mark.skipif("DTRAIN_LARGE" not in os.environ, reason="DTRAIN_LARGE=1 runs it: 5 GB")
def test_sizes_above_2_to_the_31(mpirun: str, clean: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "large.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [mpirun, "-n", "2", sys.executable, str(script), str(tmp_path)]
    ended = start(command, limit_s=400, env=clean)
    assert ended.code == 0, ended.err
    assert ended.out.count("large") == 2
