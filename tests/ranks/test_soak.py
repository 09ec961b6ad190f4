"""Nothing grows with the number of updates: objects, tensors, open files, threads and requests.

The long form is `benchmarks/soak.py`: 50,000 updates on four processes, with their memory.
"""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.callbacks import Event
from dtrain.comm.backends.threads import run_ranks
from dtrain.training import train
from tests import tiny
from tests.harness import FULL

BATCH, SEGMENT, SEGMENTS, WARM = 8, 100, 6, 2
"""Samples of an update, updates of a segment, which is an epoch, segments, and the index of that
after which everything has its final size."""

KINDS = {
    "1f1b": {"objective": {"name": "backprop"}, "schedule": {"name": "1f1b"}},
    "stream": {"schedule": {"name": "stream"}, "sync": {"name": "local-sgd", "every": 4}},
}


def samples() -> tuple[np.ndarray, ...]:
    """Return samples of one epoch, and few for the test."""
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH * SEGMENT + 8, 10)).astype("float32")
    y = random.integers(0, 3, len(x))
    return x[:-8], y[:-8], x[-8:], y[-8:]


def count(session: Any) -> dict[str, int]:
    """Return what this process holds now, and the requests of this rank."""
    gc.collect()
    objects = gc.get_objects()
    pending = (item for source in session.comm.flight.pending_sources for item in source())
    return {
        "objects": len(objects),
        "tensors": sum(issubclass(type(each), torch.Tensor) for each in objects),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "requests": sum(1 for _ in pending),
    }


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("kind", KINDS if FULL else ["stream"])
def test_nothing_grows_with_the_number_of_updates(kind: str, tmp_path: Path) -> None:
    """One object per update and rank would be 1,200 more at the end. Ranks are not at one place
    when rank 0 counts, which is 100 objects now and then."""
    run = tiny.run(
        **KINDS[kind],
        mesh={"stages": 2},
        partition={"blocks": 2},
        data={"name": "tests.ranks.test_soak:samples"},
        batch_size=BATCH,
        micro_batches=1,
        epochs=SEGMENTS,
        evaluate={"every": 1000},
    )
    rows: list[dict[str, int]] = []

    def sample(session: Any, event: Event) -> None:
        if event.kind == "segment" and session.rank == 0:
            rows.append(count(session))

    run_ranks(4, lambda comm: train(run, comm, tmp_path, callbacks=[sample]), timeout_s=300)
    first, last = rows[WARM], rows[-1]
    assert len(rows) == SEGMENTS
    assert last["requests"] <= first["requests"]
    assert last["files"] <= first["files"]
    assert last["threads"] <= first["threads"]
    assert last["tensors"] <= first["tensors"] + 100
    assert last["objects"] <= first["objects"] + 400
