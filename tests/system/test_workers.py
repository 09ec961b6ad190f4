"""Worker processes: the bits of reading in place, errors with tracebacks, no process left."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain.data.array_source import MemorySource
from dtrain.data.augment import Augment, CropFlip, build_augment
from dtrain.data.dataset import Dataset, DatasetSplits, Subset
from dtrain.data.loader import Loader
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.statistics import standardise
from dtrain.data.user import as_splits
from dtrain.data.worker_pool import WorkerPool
from dtrain.errors import DataError
from tests.conftest import ROOT
from tests.process import start
from tests.refusals import refuses
from tests.rule.test_loader import Disk, dataset_of, disk, micro_batches
from tests.system.programs import DTRAIN
from tests.system.worker_data import Pairs, Surroundings, add_noise

__all__ = ["disk"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

X = np.random.default_rng(0).integers(0, 256, (60, 3, 6, 6), dtype=np.uint8)
LAUNCHER = {"OMPI_COMM_WORLD_RANK": "0", "PMI_RANK": "0", "SLURM_PROCID": "0"}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, WorkerPool]]:
    """Pools of one and two workers, which all tests share."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LAUNCHER.items():
            patch.setenv(name, value)
        pools = {1: WorkerPool(1), 2: WorkerPool(2)}
        for pool in pools.values():
            pool.start()
    yield pools
    processes = [worker.process for pool in pools.values() for worker in pool.workers]
    for pool in pools.values():
        pool.stop()
    assert all(process.returncode is not None for process in processes)


def read(loader: Loader, batches: list[np.ndarray], epoch: int = 0) -> list[torch.Tensor]:
    loader.open(batches, epoch)
    inputs = [loader.read() for _ in batches]
    loader.close()
    return inputs


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert (x.dtype, y.is_contiguous(), y.data_ptr() % 64) == (y.dtype, True, 0)


def test_workers_read_the_same_bits(pools: dict[int, WorkerPool], disk: Disk) -> None:
    """Of arrays in memory, of groups of rows from a disk, and of items."""
    arrays = SourceDataset(MemorySource(X), MemorySource(np.zeros(60, np.int64)), 2)
    images = standardise(DatasetSplits(arrays, arrays)).train
    image_batches = np.split(np.random.default_rng(1).permutation(60), [7, 20, 21, 40])
    stored = Subset(dataset_of(disk), np.arange(1450))
    items = as_splits((Pairs(), Pairs(1)), "data", classes=3).train
    noise = build_augment(add_noise, 0)
    cases: list[tuple[Dataset, list[np.ndarray], Augment | None]] = [
        (images, image_batches, CropFlip(0)),
        (Subset(images, np.arange(59, 9, -1)), [np.arange(50), np.arange(3)], noise),
        (stored, micro_batches(stored, "chunks"), None),
        (stored, micro_batches(stored, "full", 300), None),
        (items, [np.arange(5), np.arange(5), np.arange(7, 19)], None),
    ]
    for dataset, batches, augment in cases:
        repeated = [each for each in batches for _ in range(2)]
        for epoch in (0, 3):
            expected = read(Loader(dataset, torch.float64, augment, 0), repeated, epoch)
            for pool in pools.values():
                loader = Loader(dataset, torch.float64, augment, workers=pool)
                loader.open(repeated, epoch)
                loader.read()  # closed long before its end
                assert_same(expected, read(loader, repeated, epoch))


def test_items_bring_their_further_inputs_and_targets(pools: dict[int, WorkerPool]) -> None:
    splits = as_splits((Pairs(), Pairs()), "data", classes=3)
    loader = Loader(splits.train, torch.float32, workers=pools[2])
    batches = [np.array([3, 1]), np.array([8])]
    loader.open(batches, 0)
    for indices in batches:
        loader.read()
        (other,) = loader.read_other_inputs(indices)
        assert (other.dtype, other.flatten().tolist()) == (torch.int64, indices.tolist())
    loader.close()
    broken = splits.train  # a read of items in this process would not return
    assert broken.targets(np.array([8, 3, 1])).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("index", "kind", "key"),
    [(20, KeyError, ""), (21, DataError, "data.mine"), (22, RuntimeError, "")],
)
def test_an_exception_keeps_its_traceback(
    pools: dict[int, WorkerPool], index: int, kind: type[Exception], key: str
) -> None:
    """It is raised where the micro-batch is read, and later reads go on."""
    dataset = as_splits((Pairs(), Pairs()), "data", classes=3).train
    loader = Loader(dataset, torch.float32, workers=pools[2])
    batches = [np.array([1]), np.array([index]), np.array([2])]
    loader.open(batches, 0)
    loader.read()
    with pytest.raises(kind) as caught:
        loader.read()
    loader.close()
    assert getattr(caught.value, "key", "") == key
    assert "worker_data.py" in str(caught.value.__cause__)
    assert len(read(loader, [np.array([1]), np.array([2])])) == 2


def test_a_failing_disk_is_an_error_of_the_read(pools: dict[int, WorkerPool], disk: Disk) -> None:
    dataset = dataset_of(disk)
    disk.fails_at = 2
    loader = Loader(dataset, torch.float32, workers=pools[2])
    with pytest.raises(OSError, match="a disk fails"):
        read(loader, micro_batches(dataset, "chunks"))
    loader.close()


def test_workers_inherit_nothing_of_the_rank(pools: dict[int, WorkerPool]) -> None:
    """Neither launcher, nor signal handlers, nor open files; they keep SIGTERM for the rank."""
    dataset = as_splits((Surroundings(), Surroundings()), "data", classes=2).train
    loader = Loader(dataset, torch.float64, workers=pools[2])
    with open(os.devnull) as file, open(os.devnull):
        os.set_inheritable(file.fileno(), True)
        first = torch.cat(read(loader, [np.array([i]) for i in range(4)])).flatten(1)
        for worker in pools[2].workers:
            os.kill(worker.process.pid, signal.SIGTERM)
            os.kill(worker.process.pid, signal.SIGINT)
        second = torch.cat(read(loader, [np.array([i]) for i in range(4)])).flatten(1)
    assert sorted(set(first[:, 0].tolist())) == sorted(
        worker.process.pid for worker in pools[2].workers
    )
    assert first[:, 1:4].tolist() == [[1, 0, 0]] * 4
    assert set(second[:, 0].tolist()) == set(first[:, 0].tolist())
    assert first[:, 4].max() < 20


def test_a_killed_worker_ends_the_read() -> None:
    pool = WorkerPool(2)
    dataset = as_splits((Pairs(), Pairs()), "data", classes=3).train
    loader = Loader(dataset, torch.float32, workers=pool)
    with refuses(DataError, "data.worker-lost"):
        read(loader, [np.array([1]), np.array([23]), np.array([2])])
    loader.close()
    pool.stop()


SCRIPT = """
import sys
import numpy as np, torch
from torch import nn
import dtrain

class Blobs(torch.utils.data.Dataset):
    def __init__(self, n, wait=0.0):
        self.n, self.wait = n, wait
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        if self.wait:
            import time
            time.sleep(self.wait)
        return torch.full((4,), float(i % 3)), i % 3

def main(workers, wait=0.0):
    torch.manual_seed(0)
    data = dtrain.data.datasets(Blobs(96, wait), Blobs(30), classes=3, workers=workers)
    run = dtrain.Run(model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), data=data,
                     optimizer=dtrain.Optimizer("sgd", lr=0.1),
                     epochs=2, batch_size=16, micro_batches=2)
    return dtrain.train(run, out=f"runs/{workers}").digest
"""
GUARDED = """
if __name__ == "__main__":
    digests = {main(workers) for workers in (0, 2)}
    print("digests", len(digests))
"""


def test_scripts_train_with_workers(tmp_path: Path, clean: dict[str, str]) -> None:
    """Their own classes are imported under a guard; without one, nothing is trained twice."""
    (tmp_path / "guarded.py").write_text(SCRIPT + GUARDED)
    (tmp_path / "bare.py").write_text(SCRIPT + "main(1)\n")
    env = clean | {"PYTHONPATH": str(ROOT)}
    for argv in ([sys.executable, "guarded.py"], [*DTRAIN, "run", "--ranks", "2", "guarded.py"]):
        ended = start(argv, env=env, cwd=tmp_path, limit_s=120)
        assert (ended.code, ended.late, ended.left) == (0, False, ()), ended.err
        assert "digests 1" in ended.out
        for folder in tmp_path.glob("runs/*"):
            folder.rename(folder.with_name(f"old-{folder.name}"))
        (tmp_path / "runs").rename(tmp_path / f"runs-{len(argv)}")
    ended = start([sys.executable, "bare.py"], env=env, cwd=tmp_path, limit_s=120)
    assert (ended.code, ended.late, ended.left) == (2, False, ()), ended.err
    assert "user-code.trains-on-import" in ended.err


ENDING = """
import os, signal, sys, threading, time
import numpy as np, torch
import dtrain
from dtrain.data.loader import Loader
from dtrain.data.user import as_splits
from dtrain.data.worker_pool import WorkerPool

class Waiting(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        time.sleep(30.0 * (i == 3))
        return torch.zeros(2), i % 2

if __name__ == "__main__":
    dtrain.init()
    split = as_splits((Waiting(), Waiting()), "data", classes=2).train
    loader = Loader(split, torch.float32, workers=WorkerPool(2))
    loader.open([np.array([1]), np.array([3]), np.array([3])], 0)
    loader.read()
    threading.Timer(0.2, os.kill, (os.getpid(), int(sys.argv[1]))).start()
    loader.read()
"""


def own_shared_memory() -> set[str]:
    """Return the names in /dev/shm, without those of Open MPI, which other programs use."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sm_segment.")}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_rank(
    tmp_path: Path, clean: dict[str, str], number: signal.Signals
) -> None:
    """Also in the middle of an item; no shared memory is left."""
    (tmp_path / "ending.py").write_text(ENDING)
    before = own_shared_memory()
    argv = [sys.executable, "ending.py", str(int(number))]
    ended = start(argv, env=clean | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, limit_s=60)
    assert abs(ended.code) % 128 == number
    assert (ended.late, ended.left) == (False, ())
    assert own_shared_memory() <= before
