"""Shards, also on a full disk, and the files of a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from dtrain.checkpoint import files, shard_file
from dtrain.checkpoint.files import FileCalls
from dtrain.checkpoint.shard import ShardImage, read_tensor, write_image, write_shard
from dtrain.checkpoint.shard_file import DIRECT_BYTES, SHARD_HASH, copy_file, hash_file
from dtrain.comm.backends import threads
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.training import train
from tests import tiny
from tests.process import start
from tests.refusals import refuses

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.bool,
    torch.complex64,
)
LIMITS = (50, 5_000, 100_000, 200_000)
LIMITED = """
import gc, os, resource, sys
from pathlib import Path
import torch
from dtrain.checkpoint.shard import write_shard

def main(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_shard(Path(sys.argv[1]), {f"model/{i}": torch.rand(50, 50) for i in range(20)})
    except OSError as error:
        sys.exit(str(error))

gc.freeze()  # children need not collect all of torch
for limit in map(int, sys.argv[2:]):
    child = os.fork()
    if not child:
        sys.exit(main(limit))
    print(limit, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_full_disk_under_a_shard_raises_its_own_error(tmp_path: Path) -> None:
    """HDF5 itself would crash the process, so each limit has a process of its own."""
    program = start([sys.executable, "-c", LIMITED, tmp_path / "shard.h5", *map(str, LIMITS)])
    assert program.err == "[Errno 27] File too large\n" * len(LIMITS)
    assert program.out.splitlines() == [f"{limit} 1" for limit in LIMITS]


def test_a_shard_holds_every_dtype(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    tensors |= {"strided": torch.eye(3).T[::2]}
    row = write_shard(tmp_path / "shard.h5", tensors)
    assert row["keys"] == list(tensors)
    assert row["bytes"] == (tmp_path / "shard.h5").stat().st_size
    with h5py.File(tmp_path / "shard.h5", "r") as shard:
        for key, tensor in tensors.items():
            torch.testing.assert_close(read_tensor(shard, key), tensor, rtol=0, atol=0)


class PickyCalls(FileCalls):
    """Refuses or shortens direct writes."""

    def __init__(self, kind: str) -> None:
        self.kind, self.direct, self.buffered = kind, 0, 0

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write to a file."""
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        self.direct, self.buffered = self.direct + direct, self.buffered + (not direct)
        if self.kind == "refused" and direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self.kind == "short":
            data = data[: max(1, len(data) // 2 + 1)] if not direct else data[: len(data) // 2]
        if self.kind == "torn" and self.direct == 1:
            data = memoryview(bytes(data[: len(data) // 2 + 7]))
            fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)  # as a disk that is nearly full may do it
        return super().write(descriptor, data)


@pytest.mark.parametrize("kind", ["plain", "short", "torn", "refused"])
@pytest.mark.parametrize("extra", [0, 1, 4095, 12_345])
def test_direct_writes_give_the_bytes_of_buffered_ones(
    kind: str, extra: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the buffer, and as an image that needs none."""
    generator = torch.Generator().manual_seed(extra)
    tensors = {
        "model/a": torch.rand(333, generator=generator),
        "model/b": torch.rand(1_100_000, generator=generator),
        "model/c": torch.randint(256, (DIRECT_BYTES + extra,), generator=generator).byte(),
    }
    monkeypatch.setattr(shard_file, "is_on_local_disk", lambda folder: False)
    expected = write_shard(tmp_path / "shard.h5", tensors)
    content = (tmp_path / "shard.h5").read_bytes()
    assert hash_file(tmp_path / "shard.h5") == expected[SHARD_HASH]
    monkeypatch.setattr(shard_file, "is_on_local_disk", lambda folder: True)
    picky = PickyCalls(kind)
    monkeypatch.setattr(files, "calls", picky)
    assert write_shard(tmp_path / "shard.h5", tensors) == expected
    assert (tmp_path / "shard.h5").read_bytes() == content
    image = ShardImage()
    image.fill(tensors)
    assert write_image(tmp_path / "shard.h5", image) == expected
    assert (tmp_path / "shard.h5").read_bytes() == content
    assert picky.direct > 0 or not has_direct_writes(tmp_path)
    assert copy_file(tmp_path / "shard.h5", tmp_path / "copy.h5", lambda: None) == hash_file(
        tmp_path / "copy.h5"
    )


def has_direct_writes(folder: Path) -> bool:
    """Return whether a file system takes direct writes."""
    descriptor = os.open(folder / "trial", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_replicas_without_tensors_to_save_write_no_shard(tmp_path: Path) -> None:
    run = replace(tiny.run(mesh__stages=1, epochs=1), path=tmp_path / "run.toml")
    threads.run_ranks(3, lambda comm: train(run, comm, tmp_path / "out"))
    (newest,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert {path.name for path in newest.iterdir()} == {"manifest.json", "replica-0-stage-0.h5"}
    longer = replace(tiny.run(mesh__stages=2, epochs=2), path=tmp_path / "run.toml")
    summaries = threads.run_ranks(2, lambda comm: train(longer, comm, tmp_path / "out"))
    assert [summary["attempts"] for summary in summaries] == [2, 2]


def test_no_resume_starts_in_a_fresh_folder_and_refuses_a_used_one(tmp_path: Path) -> None:
    run = replace(tiny.run(), path=tmp_path / "run.toml")
    out = tmp_path / "out"
    summary = train(run, Comm(SingleBackend()), out, "never")
    assert (summary["status"], summary["attempts"]) == ("finished", 1)
    text = (out / "summary.json").read_text()
    with refuses(ConfigError, "run-folder.not-empty"):
        train(run, Comm(SingleBackend()), out, "never")
    assert (out / "summary.json").read_text() == text
    assert not (out / "owner.json").exists()


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of a kind in `metrics.jsonl`."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_metrics_name_the_hosts_and_the_slowest_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    run = replace(tiny.run(), path=tmp_path / "run.toml")
    hosts = ["n1", "n1", "n2"]
    threads.run_ranks(3, lambda comm: train(run, comm, tmp_path / "out"), hosts=hosts)
    (first,) = records(tmp_path / "out", "run")
    assert (first["hosts"], first["job"]) == (hosts, "123")
    assert "torch" in first["versions"]
    for record in records(tmp_path / "out", "train"):
        assert record["slowest_host"] == hosts[record["slowest_rank"]]
        assert 0 < record["stage_median_busy_s"] <= record["slowest_busy_s"] <= record["train_s"]
    assert all(record["eval_s"] > 0 for record in records(tmp_path / "out", "eval"))
    assert all(record["save_s"] > 0 for record in records(tmp_path / "out", "checkpoint"))
