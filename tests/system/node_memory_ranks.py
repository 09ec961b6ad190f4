"""Ranks that train on a small and on a large set and measure their memory.

`mpirun -n 4 python tests/system/node_memory_ranks.py FOLDER MEGABYTES`: rank 0 writes
`FOLDER/memory.json` with the bytes of the large set and the proportional set sizes of all ranks
after each of the two runs; /dev/shm is compared by the caller.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import numpy as np

import dtrain
from dtrain import Event, Session

FEATURES, CHUNK_ROWS, PIECE = 8192, 32, 512


def write_set(path: Path, rows: int) -> None:
    """Write random samples, one chunk to the megabyte."""
    random = np.random.default_rng(rows)
    with h5py.File(path, "w") as file:
        x = file.create_dataset("x", (rows, FEATURES), "float32", chunks=(CHUNK_ROWS, FEATURES))
        file["y"] = random.integers(0, 4, rows)
        for start in range(0, rows, PIECE):
            stop = min(start + PIECE, rows)
            x[start:stop] = random.random((stop - start, FEATURES), np.float32)


def proportional_bytes() -> int:
    """Return the proportional set size of this process: shared pages count in parts."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Pss")


def train_on(folder: Path, name: str) -> list[int]:
    """Train two updates on a set; return the proportional set sizes of all ranks at the end."""
    sizes: list[int] = []

    def measure(session: Session, event: Event) -> None:
        if event.kind == "end":
            session.comm.allgather_object(None)
            sizes.extend(session.comm.allgather_object(proportional_bytes()))

    data = dtrain.data.hdf5(folder / f"{name}.h5", folder / "tiny.h5", normalise=False)
    model = {"name": "mlp", "widths": [8]}
    mesh = {"stages": 1}
    sgd = {"name": "sgd", "lr": 0.01}
    run = dtrain.Run(
        data=data, model=model, optimizer=sgd, updates=2, batch_size=96, threads=1, mesh=mesh
    )
    dtrain.train(run, folder / name, callbacks=[measure])
    return sizes


def main(folder: Path, megabytes: int) -> None:
    """Write the sets, train on both, and write what was measured."""
    comm, rows = dtrain.init(), megabytes * CHUNK_ROWS
    if comm.rank == 0:
        write_set(folder / "tiny.h5", 192)
        write_set(folder / "large.h5", rows)
    comm.allgather_object(None)
    table = {"set_bytes": rows * FEATURES * 4}
    for name in ("tiny", "large"):
        table[name] = train_on(folder, name)
    if comm.rank == 0:
        (folder / "memory.json").write_text(json.dumps(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
