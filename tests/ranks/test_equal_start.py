"""All ranks train one model: equal layouts, and equal initial weights of all replicas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.models.shape_inference import infer_layers
from dtrain.planning.plan import make_plan
from tests import user_nets
from tests.harness import assert_same_model, train_in_threads
from tests.outcome import model
from tests.ranks.sync_runs import replica_tensors
from tests.refusals import refuses
from tests.single import one_thread  # noqa: F401

DROPPING = ("layer_drop", "python_drop")


@pytest.mark.parametrize("net", DROPPING)
def test_random_layers_cost_the_same_in_every_process(net: str) -> None:
    """All five units are equal, so their costs are, and that of a unit is never 0."""
    model = load_model(f"tests.user_nets:{net}", {}, Path(), (8,), 4)
    specs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        specs.append(infer_layers(model, (8,), torch.float32))
        assert torch.initial_seed() == seed
    assert specs[0] == specs[1]
    assert [spec.forward_macs for spec in specs[0]] == [64] * 5 + [32]


def test_a_layer_is_dropped_equally_on_any_number_of_stages(tmp_path: Path) -> None:
    """Without explicit cuts or blocks; the model is that of one rank, bit for bit."""
    for stages in (1, 2, 3):
        train_in_threads(user_nets.run("layer_drop"), tmp_path / str(stages), stages=stages)
    assert_same_model(tmp_path / "1", tmp_path / "2")
    assert_same_model(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize("change", [{"partition": {"cuts": [1]}}, {"optimizer": {"lr": 0.5}}])
def test_layouts_that_differ_are_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank plans another run, as with a random layer that the costs depend on."""
    run = user_nets.run("layer_drop", partition={"cuts": [2]})
    plans = iter([run, user_nets.run("layer_drop", **({"partition": {"cuts": [2]}} | change))])
    monkeypatch.setattr("dtrain.build.make_plan", lambda _, ranks: make_plan(next(plans), ranks))
    with refuses(ConfigError, "layout.ranks-differ"):
        train_in_threads(run, tmp_path, stages=2)
    assert not any(tmp_path.iterdir())


def copied_blocks(out: Path) -> list[list[int]]:
    """Return the blocks whose initial weights were copied, for every start of a run."""
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record["copied_blocks"] for record in records if record["kind"] == "run"]


@pytest.mark.parametrize(
    ("net", "sync"),
    [
        ("numpy_initialised", "every-step"),
        ("numpy_initialised", "local-sgd"),
        ("privately_initialised", "every-step"),
    ],
)
def test_replicas_start_from_the_weights_of_the_first(net: str, sync: str, tmp_path: Path) -> None:
    """The debug mode compares them after each update; a resumed run has those of its checkpoint."""
    tables: dict[str, Any] = {"partition": {"blocks": 2}, "sync": {"name": sync}, "debug": True}
    tables["mesh"] = {"stages": 2}
    train_in_threads(user_nets.run(net, **tables), tmp_path, replicas=2)
    assert copied_blocks(tmp_path) == [[0, 1]]
    longer = user_nets.run(net, **tables, epochs=4)
    train_in_threads(longer, tmp_path, replicas=2)
    assert copied_blocks(tmp_path) == [[0, 1], []]


def test_replicas_without_a_step_hold_the_weights_of_the_first(tmp_path: Path) -> None:
    tables: dict[str, Any] = {"mesh": {"stages": 1}, "sync": {"name": "never"}}
    run = user_nets.run("numpy_initialised", optimizer={"lr": 0.0}, **tables)
    train_in_threads(run, tmp_path, replicas=3)
    first, *others = replica_tensors(tmp_path, 3)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in model(tmp_path))


def test_seeded_weights_are_not_copied(tmp_path: Path) -> None:
    train_in_threads(user_nets.run("layer_drop", mesh={"stages": 1}), tmp_path, replicas=2)
    assert copied_blocks(tmp_path) == [[]]


def test_a_pattern_that_matches_nothing_is_refused_on_all_ranks(tmp_path: Path) -> None:
    """A pattern may match on one stage only."""
    tables: dict[str, Any] = {"partition": {"blocks": 2}}
    run = user_nets.run("layer_drop", optimizer={"no-decay": ["5.bias", "linear"]}, **tables)
    train_in_threads(run, tmp_path / "run", stages=2)
    run = user_nets.run("layer_drop", optimizer={"no-decay": ["bias", "nrom"]}, **tables)
    with refuses(ConfigError, "optimizer.no-decay-unmatched"):
        train_in_threads(run, tmp_path / "wrong", stages=2)
