"""Objectives whose feedback comes updates late, over whole runs: what they keep, and what not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.train import train
from tests import tiny
from tests.outcome import close, model


def trained(out: Path, stages: int, replicas: int = 1, **told: Any) -> dict[str, Any]:
    """Train the tiny run with updates of 16, 16, 16 and 2 samples."""
    run = tiny.run(**{"mesh__stages": stages, **told})
    return ranks(stages * replicas, lambda comm: train(run, comm, out), seed=stages)[0]


DNI: dict[str, Any] = {"objective__name": "dni"}
CCL: dict[str, Any] = {"objective__name": "ccl", "partition__blocks": 4, "epochs": 1}


def test_layouts_train_the_same_synthesisers(tmp_path: Path) -> None:
    """Laws 1 and 3, with gradients that came late: the inner blocks have moved."""
    trained(tmp_path / "one", 1, **DNI, micro_batches=1)
    trained(tmp_path / "many", 2, 3, **DNI, micro_batches=4)
    close(tmp_path / "one", tmp_path / "many")
    trained(tmp_path / "none", 1, **DNI, updates=2, epochs=None)
    moved, still = model(tmp_path / "one"), model(tmp_path / "none")
    assert not torch.equal(moved["fc1.weight"], still["fc1.weight"])
    assert not still["heads.0.layers.0.weight"].any()


def test_resumed_synthesisers_need_nothing_of_the_past(tmp_path: Path) -> None:
    """Law 5 at the ends of segments."""
    told = DNI | {"epochs": None, "checkpoint__every": 3}
    whole = trained(tmp_path / "whole", 2, **told, updates=8)
    for updates in (3, 4, 8):
        parts = trained(tmp_path / "parts", 2, **told, updates=updates)
    assert whole["digest"] == parts["digest"]


def test_replicas_without_samples_get_the_codes_too(tmp_path: Path) -> None:
    """The last update has 2 samples for 3 replicas: their codes are averaged like buffers."""
    trained(tmp_path / "one", 1, **CCL | {"epochs": 2, "batch_size": 12})
    trained(tmp_path / "three", 1, 3, **CCL | {"epochs": 2, "batch_size": 12})
    close(tmp_path / "one", tmp_path / "three")
    assert model(tmp_path / "one")["heads.0.codes"].any()


def test_a_resumed_run_goes_on_with_the_last_codes(tmp_path: Path) -> None:
    """Law 5 at the ends of segments, with codes that came late."""
    told = CCL | {"epochs": None, "checkpoint__every": 3}
    whole = trained(tmp_path / "whole", 2, **told, updates=7)
    for updates in (3, 4, 7):
        parts = trained(tmp_path / "parts", 2, **told, updates=updates)
    assert whole["digest"] == parts["digest"]
