"""Whole runs of objectives whose feedback arrives updates late, over layouts and restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import tiny
from tests.harness import train_in_threads
from tests.outcome import close, model


def train_tiny(out: Path, stages: int, replicas: int = 1, **changes: Any) -> dict[str, Any]:
    """Train the tiny run on threads, with updates of 16, 16, 16 and 2 samples."""
    run = tiny.run(**{"mesh__stages": stages, **changes})
    return train_in_threads(run, out, stages, replicas)


DNI: dict[str, Any] = {"objective__name": "dni"}
CCL: dict[str, Any] = {"objective__name": "ccl", "partition__blocks": 4, "epochs": 1}


def test_layouts_train_the_same_synthesisers(tmp_path: Path) -> None:
    """Ranks, replicas and micro-batches change nothing; inner blocks train by delayed gradients."""
    train_tiny(tmp_path / "one", 1, **DNI, micro_batches=1)
    train_tiny(tmp_path / "many", 2, 3, **DNI, micro_batches=4)
    close(tmp_path / "one", tmp_path / "many")
    train_tiny(tmp_path / "start", 1, **DNI, updates=2, epochs=None)
    end, start = model(tmp_path / "one"), model(tmp_path / "start")
    assert not torch.equal(end["fc1.weight"], start["fc1.weight"])
    assert not start["heads.0.layers.0.weight"].any()


def test_resumed_synthesisers_train_the_same_bits(tmp_path: Path) -> None:
    """Resumed at the ends of segments."""
    changes = DNI | {"epochs": None, "checkpoint__every": 3}
    uninterrupted = train_tiny(tmp_path / "uninterrupted", 2, **changes, updates=8)
    for updates in (3, 4, 8):
        resumed = train_tiny(tmp_path / "resumed", 2, **changes, updates=updates)
    assert uninterrupted["digest"] == resumed["digest"]


def test_replicas_without_samples_receive_the_codes(tmp_path: Path) -> None:
    """The last update has 2 samples for 3 replicas: codes are averaged like buffers."""
    changes = CCL | {"epochs": 2, "batch_size": 12}
    train_tiny(tmp_path / "one", 1, **changes)
    train_tiny(tmp_path / "three", 1, 3, **changes)
    close(tmp_path / "one", tmp_path / "three")
    assert model(tmp_path / "one")["heads.0.codes"].any()


def test_a_resumed_run_continues_with_the_last_codes(tmp_path: Path) -> None:
    """Resumed at the ends of segments, with delayed codes."""
    changes = CCL | {"epochs": None, "checkpoint__every": 3}
    uninterrupted = train_tiny(tmp_path / "uninterrupted", 2, **changes, updates=7)
    for updates in (3, 4, 7):
        resumed = train_tiny(tmp_path / "resumed", 2, **changes, updates=updates)
    assert uninterrupted["digest"] == resumed["digest"]
