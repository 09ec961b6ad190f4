"""Resuming on another layout: the same model and the same samples, whatever ranks held them before.

Invariant: the reference is a run that never stopped and never moved: equal bits where the number
of replicas is the same, 1e-12 where it changed.

::

    updates               0     3              7
    moved                 |3 x 1|....1 x 1.....|     stages x replicas
    stayed                |.......1 x 1........|
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dtrain.config.run import RunConfig
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from tests import harness, tiny
from tests.harness import train_in_threads
from tests.outcome import close, model

Layout = tuple[int, int]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "adam": {"name": "adam", "lr": 0.01},
}
MOVES: list[tuple[Layout, Layout]] = [
    ((1, 1), (3, 1)),
    ((3, 1), (1, 1)),
    ((2, 2), (1, 1)),
    ((1, 1), (2, 2)),
    ((1, 3), (2, 1)),
    ((3, 1), (1, 3)),
    ((2, 2), (3, 2)),
    ((1, 2), (1, 3)),
]
UPDATES = 7
"""Four in an epoch, with a checkpoint after every third: the run ends in the middle of an epoch."""

LOSSES = ("test_loss", "train_loss")
COUNTS = ("test_accuracy", "test_accuracy_vote", "accuracy_per_block", "samples", "updates")


def train_on(out: Path, stops: Sequence[tuple[int, Layout]], **changes: Any) -> dict[str, Any]:
    """Train to each number of updates on its layout, stages x replicas; return the last summary."""
    summaries = []
    for updates, (stages, replicas) in stops:
        run: RunConfig = tiny.run(
            **{"epochs": None, "checkpoint__every": 3, **changes},
            updates=updates,
            mesh__stages=stages,
        )
        summaries.append(train_in_threads(run, out, stages, replicas, seed=updates))
        assert (summaries[-1]["stages"], summaries[-1]["replicas"]) == (stages, replicas)
    assert summaries[-1]["attempts"] == len(stops)
    return summaries[-1]


def same(one: dict[str, Any], other: dict[str, Any], bits: bool) -> None:
    """Assert that two summaries agree, with losses that are equal in bits or up to rounding."""
    for key in COUNTS:
        assert one[key] == other[key], key
    for key in LOSSES:
        assert one[key] == (other[key] if bits else pytest.approx(other[key], rel=1e-12)), key


KINDS = list(itertools.product(tiny.NEIGHBOURS, OPTIMIZERS))
CASES = [
    (*move, *kind)
    for number, move in enumerate(MOVES)
    for kind in (KINDS if harness.FULL else [KINDS[number % len(KINDS)]])
]
"""Each move once, with objectives and optimizers in turn; all of them in a full run."""


@pytest.mark.parametrize(("before", "after", "objective", "optimizer"), CASES, ids=str)
def test_a_run_resumes_on_another_layout_as_if_it_had_stayed(
    before: Layout, after: Layout, objective: str, optimizer: str, tmp_path: Path
) -> None:
    """Stopped in the middle of an epoch."""
    train_run = partial(train_on, objective__name=objective, optimizer=OPTIMIZERS[optimizer])
    stayed = train_run(tmp_path / "stayed", [(UPDATES, (1, after[1]))])
    moved = train_run(tmp_path / "moved", [(3, before), (UPDATES, after)])
    bits = before[1] == after[1]
    same(moved, stayed, bits)
    assert not bits or moved["digest"] == stayed["digest"]
    close(tmp_path / "moved", tmp_path / "stayed")


@pytest.mark.parametrize("blocks", [3, 4])
def test_many_moves_are_none(blocks: int, tmp_path: Path) -> None:
    """Moved at the end of a checkpoint interval, at the end of an epoch, and at neither."""
    stages = [blocks, 1, 2, blocks, 1]
    stops = [(at, (n, 1)) for at, n in zip((1, 3, 4, 6, UPDATES), stages, strict=True)]
    moved = train_on(tmp_path / "moved", stops, partition__blocks=blocks)
    stayed = train_on(tmp_path / "stayed", [(UPDATES, (1, 1))], partition__blocks=blocks)
    same(moved, stayed, bits=True)
    assert moved["digest"] == stayed["digest"]


@pytest.mark.parametrize("after", [(1, 1), (2, 1), (2, 2)], ids=str)
def test_four_blocks_stay_four_on_fewer_stages(after: Layout, tmp_path: Path) -> None:
    """The run files name no blocks: the first run had four stages, and its checkpoint has them."""
    changes = {"partition__blocks": None, "objective__name": "backprop"}
    moved = train_on(tmp_path / "moved", [(5, (4, 1)), (UPDATES, after)], **changes)
    stayed = train_on(tmp_path / "stayed", [(UPDATES, (4, 1))], **changes)
    assert moved["blocks"] == stayed["blocks"] == 4
    same(moved, stayed, bits=after[1] == 1)
    close(tmp_path / "moved", tmp_path / "stayed")


@pytest.mark.parametrize("name", ["dropping", "normalised", "rebinding"])
def test_buffers_and_random_numbers_move_with_their_layers(name: str, tmp_path: Path) -> None:
    """Batch statistics, moving averages, random numbers: the same bits over stages."""
    changes = {"model": {"name": f"tests.tiny:{name}"}, "objective__name": "local-head"}
    moved = train_on(tmp_path / "moved", [(2, (3, 1)), (UPDATES, (2, 1))], **changes)
    stayed = train_on(tmp_path / "stayed", [(UPDATES, (1, 1))], **changes)
    same(moved, stayed, bits=True)
    assert moved["digest"] == stayed["digest"]


FINISHED = itertools.product([(3, 1), (1, 2), (2, 2)], [(1, 1), (2, 1), (3, 2)])


@pytest.mark.parametrize(("before", "after"), list(FINISHED)[:: 1 if harness.FULL else 2], ids=str)
def test_a_finished_run_has_the_same_summary_on_any_layout(
    before: Layout, after: Layout, tmp_path: Path
) -> None:
    """Nothing is trained, so the digest is the same even over replicas."""
    first = train_on(tmp_path, [(UPDATES, before)])
    again = resume(tmp_path, after, UPDATES)
    same(again, first, bits=True)
    assert again["digest"] == first["digest"]


@pytest.mark.parametrize("after", [(1, 1), (3, 1), (2, 2), (1, 3)], ids=str)
def test_a_checkpoint_without_a_test_is_tested_on_any_layout(after: Layout, tmp_path: Path) -> None:
    """The run is evaluated at its end only, by the layout that resumes it there."""
    changes = {"checkpoint__every": 2, "evaluate__every": 9}
    first = train_on(tmp_path / "first", [(6, (1, 1))], **changes)
    train_on(tmp_path / "out", [(UPDATES, (3, 1))], **changes)
    newest = max((tmp_path / "out" / "checkpoints").iterdir())
    newest.rename(tmp_path / newest.name)  # as if the run had been stopped before update 7
    again = resume(tmp_path / "out", after, 6, **changes)
    same(again, first, bits=False)
    assert again["digest"] == first["digest"]


def resume(out: Path, layout: Layout, updates: int, **changes: Any) -> dict[str, Any]:
    """Resume the run in a folder on a layout, up to `updates`; return the summary."""
    changes = {"epochs": None, "checkpoint__every": 3, **changes}
    return train_in_threads(
        tiny.run(**changes, updates=updates, mesh__stages=layout[0]), out, *layout
    )


LOCAL: dict[str, Any] = {"sync": {"name": "local-sgd", "every": 2}}


DIVERGED = [((3, 2), (1, 2)), ((1, 3), (2, 3))]


@pytest.mark.parametrize(
    ("move", "name", "stop"),
    harness.pairwise(list(itertools.product(DIVERGED, ["local-sgd", "never"], [1, 4]))),
    ids=str,
)
def test_diverged_replicas_keep_their_own_weights_on_other_stages(
    move: tuple[Layout, Layout], name: str, stop: int, tmp_path: Path
) -> None:
    """As many replicas as before: each resumes with its own weights and moments, bit for bit."""
    before, after = move
    sync = LOCAL["sync"] if name == "local-sgd" else {"name": name}
    moved = train_on(tmp_path / "moved", [(stop, before), (UPDATES, after)], sync=sync)
    stayed = train_on(tmp_path / "stayed", [(UPDATES, (1, after[1]))], sync=sync)
    same(moved, stayed, bits=True)
    assert moved["digest"] == stayed["digest"]


@pytest.mark.parametrize("updates", [4, 5])
def test_a_finished_run_of_diverged_replicas_evaluates_the_same_weights(
    updates: int, tmp_path: Path
) -> None:
    """It ends on a mean, where three equal thirds must not be averaged again, and between two."""
    first = train_on(tmp_path, [(updates, (1, 3))], **LOCAL)
    again = resume(tmp_path, (2, 3), updates, **LOCAL)
    same(again, first, bits=True)
    assert again["digest"] == first["digest"]


@pytest.mark.parametrize("after", [(1, 1), (3, 1), (2, 3)], ids=str)
def test_other_numbers_of_diverged_replicas_start_from_the_evaluation_weights(
    after: Layout, tmp_path: Path
) -> None:
    """The optimizers start afresh."""
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
    changes = {**LOCAL, "optimizer": sgd, "objective__name": "backprop"}
    first = train_on(tmp_path, [(5, (2, 2))], **changes)
    eval_weights = model(tmp_path)
    again = resume(tmp_path, after, 5, **changes)
    same(again, first, bits=True)
    assert again["digest"] == first["digest"]
    again = resume(tmp_path, after, UPDATES, **changes)
    assert (again["updates"], again["samples"]) == (UPDATES, first["samples"] + 16 + 16)
    if after[1] == 1:
        for name, tensor in trained_further(eval_weights).items():
            torch.testing.assert_close(model(tmp_path)[name], tensor, rtol=1e-12, atol=1e-13)


def trained_further(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` after updates 5 and 6, the second and third of epoch 1, by a plain loop."""
    run = tiny.run()
    samples = load_data(run.dataset.name, {}, run.folder).train
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)
    order = epoch_order(samples.size, run.settings.seed, 1, "full")
    for start in (16, 32):
        batch = order[start : start + 16]
        x = samples.inputs(batch).double().flatten(1)
        for name in ("fc1", "fc2", "fc3", "fc4"):
            x = torch.relu(x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"])
        scores = x @ parameters["head.weight"].T + parameters["head.bias"]
        optimizer.zero_grad()
        cross_entropy(scores, samples.targets(batch)).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in parameters.items()}
