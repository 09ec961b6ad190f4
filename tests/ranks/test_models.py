"""Laws of dtrain's models that follow their targets: any cut and any ranks train the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from tests import tiny
from tests.harness import assert_close_model, train_in_threads
from tests.outcome import model
from tests.ranks.test_graph_models import SGD
from tests.single import one_thread  # noqa: F401

TRANSFORMER = {"name": "transformer", "depth": 2, "width": 8, "heads": 2}
LSTM = {"name": "lstm", "widths": [6, 7]}
VIT = {"name": "vit", "depth": 2, "width": 8, "heads": 2, "pool": "token"}
CASES: dict[str, dict[str, Any]] = {
    "characters": {
        "data": {"name": "tests.graph_nets:tokens"},
        "model": TRANSFORMER | {"norm": "rms", "positions": "rotary", "kv-heads": 1},
    },
    "tied": {
        "data": {"name": "tests.graph_nets:tokens"},
        "model": TRANSFORMER | {"tied-head": True, "dropout": 0.2},
        "task": {"classes-last": True, "metrics": ["perplexity"]},
    },
    "sequences": {"model": TRANSFORMER | {"causal": False}},
    "forecast": {
        "data": {"name": "tests.graph_nets:series"},
        "task": {"loss": "huber"},
        "model": TRANSFORMER,
    },
    "lstm": {"data": {"name": "tests.graph_nets:tokens"}, "model": LSTM | {"embedding": 5}},
    "lstm forecast": {
        "data": {"name": "tests.graph_nets:series"},
        "task": {"loss": "huber"},
        "model": LSTM,
    },
    "vit": {"data": {"name": "tests.graph_nets:images"}, "model": VIT},
    "unet": {
        "data": {"name": "tests.graph_nets:fields"},
        "task": {"loss": "mse"},
        "model": {"name": "unet", "widths": [4, 6], "norm": "group", "groups": 2},
    },
}
"""Data and model of each case."""

LOCAL = {"objective": {"name": "local-head"}, "schedule": {"name": "stream"}}
BACKPROP = {"objective": {"name": "backprop"}, "schedule": {"name": "1f1b"}}


def run(case: str, method: dict[str, Any] = BACKPROP, **changes: Any) -> Any:
    """Return a run in which every layer but the first two is a block of its own."""
    table = {"partition": {}, "optimizer": SGD, "epochs": 1} | CASES[case] | method
    layers = len(make_plan(tiny.run(**table), 1).layout.layer_specs)
    table["partition"] = {"cuts": [*range(1, layers)]}
    return tiny.run(**table | changes)


@pytest.mark.parametrize("case", CASES)
def test_a_cut_at_every_place_changes_no_bit_on_any_ranks(case: str, tmp_path: Path) -> None:
    whole = run(case, partition={"blocks": 1})
    train_in_threads(whole, tmp_path / "whole")
    cut = run(case)
    blocks = len(make_plan(cut, 1).layout.block_layouts)
    digests = {
        train_in_threads(cut, tmp_path / str(stages), stages=stages)["digest"]
        for stages in (1, blocks)
    }
    assert len(digests) == 1
    expected, tensors = model(tmp_path / "whole"), model(tmp_path / "1")
    for name, tensor in expected.items():  # one block has a tied weight under one name
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", ["characters", "lstm forecast", "vit", "unet"])
def test_local_heads_train_the_same_bits_on_any_ranks(case: str, tmp_path: Path) -> None:
    digests = {
        train_in_threads(run(case, LOCAL), tmp_path / str(stages), stages=stages)["digest"]
        for stages in (1, 3)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("case", ["sequences", "lstm", "vit", "unet"])
def test_micro_batches_and_replicas_change_nothing(case: str, tmp_path: Path) -> None:
    train_in_threads(run(case, micro_batches=1, mesh__stages=3), tmp_path / "whole")
    train_in_threads(run(case, micro_batches=2, mesh__stages=2), tmp_path / "parts", replicas=2)
    assert_close_model(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("case", ["characters", "lstm forecast", "vit", "unet"])
def test_planned_memory_is_counted_memory(case: str, tmp_path: Path) -> None:
    """Within 10 %, for the worst of several orders of the ranks; in float32, where oneDNN computes
    the LSTM."""
    changes = {"mesh__stages": 2, "partition": {"blocks": 2}, "dtype": "float32"}
    config = run(case, micro_batches=4, **changes)
    planned = MemoryPlan(make_plan(config, 2)).rank_memory()
    peaks = [
        train_in_threads(config, tmp_path / str(seed), seed=seed)["peak_memory_bytes"]
        for seed in range(2)
    ]
    counted = [max(of_rank) for of_rank in zip(*peaks, strict=True)]
    for rank, counted_bytes in zip(planned, counted, strict=True):
        assert abs(rank.peak / counted_bytes - 1) < 0.1, (planned, counted)


@pytest.mark.parametrize("name", ["text", "series"])
def test_windows_are_read_alike_on_any_ranks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a mapped file does not fit in memory, and is read in groups of rows."""
    numbers = np.random.default_rng(0).integers(97, 103, (120, 2))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["tokens"], file["x"] = numbers.ravel().astype(np.uint8), numbers / 100
        file.attrs["classes"] = list(map(str, range(103)))
    data = {"name": name, "train": str(tmp_path / "a.h5"), "test": 0.2, "length": 5}
    task = {} if name == "text" else {"loss": "mse"}
    changes = {"data": data | {"shuffle": "chunks"}, "task": task}
    config = run("characters", partition={"blocks": 2}, **changes)
    digests = [train_in_threads(config, tmp_path / "1")["digest"]]
    digests += [train_in_threads(config, tmp_path / "2", stages=2)["digest"]]
    for module in ("formats.mapped_source", "source_dataset"):
        monkeypatch.setattr(f"dtrain.data.{module}.fits_in_memory", lambda _: False)
    digests += [train_in_threads(config, tmp_path / "disk", stages=2)["digest"]]
    assert len(set(digests)) == 1
    train_in_threads(config, tmp_path / "replicas", replicas=2)
    assert_close_model(tmp_path / "disk", tmp_path / "replicas")
