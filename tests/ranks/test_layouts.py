"""Resuming on another layout: same model, same samples, whatever ranks held them before.

Invariant: what is compared is a run that never stopped and never moved: bits where the number of
replicas is the same, 1e-12 where it changed.

::

    updates               0     3              7
    moved                 |3 x 1|....1 x 1.....|     stages x replicas
    stayed                |.......1 x 1........|
"""

from __future__ import annotations

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
from tests import tiny
from tests.outcome import close, model
from tests.ranks.test_laws import Summary, trained

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
"""Of four an epoch, with a checkpoint after every third: the last one ends in an epoch's middle."""

FIGURES = ("test_loss", "train_loss")
COUNTS = ("test_accuracy", "test_accuracy_vote", "accuracy_per_block", "samples", "updates")


def walk(out: Path, stops: Sequence[tuple[int, Layout]], **told: Any) -> Summary:
    """Train to each number of updates on its layout, stages x replicas; return the last summary."""
    summaries = []
    for updates, (stages, replicas) in stops:
        run: RunConfig = tiny.run(
            **{"epochs": None, "checkpoint__every": 3, **told},
            updates=updates,
            mesh__stages=stages,
        )
        summaries.append(trained(run, out, stages, replicas, seed=updates))
        assert (summaries[-1]["stages"], summaries[-1]["replicas"]) == (stages, replicas)
    assert summaries[-1]["attempts"] == len(stops)
    return summaries[-1]


def same(one: Summary, other: Summary, bits: bool) -> None:
    """Assert that two runs tell the same, figures by bits or up to rounding."""
    for key in COUNTS:
        assert one[key] == other[key], key
    for key in FIGURES:
        assert one[key] == (other[key] if bits else pytest.approx(other[key], rel=1e-12)), key


@pytest.mark.parametrize("objective", ["mono-forward", "backprop"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("before", "after"), MOVES, ids=str)
def test_a_run_goes_on_elsewhere_as_if_it_had_stayed(
    before: Layout, after: Layout, optimizer: str, objective: str, tmp_path: Path
) -> None:
    """Stopped in an epoch's middle; compared with a run that never stopped and never moved."""
    go = partial(walk, objective__name=objective, optimizer=OPTIMIZERS[optimizer])
    stayed = go(tmp_path / "stayed", [(UPDATES, (1, after[1]))])
    moved = go(tmp_path / "moved", [(3, before), (UPDATES, after)])
    bits = before[1] == after[1]
    same(moved, stayed, bits)
    assert not bits or moved["digest"] == stayed["digest"]
    close(tmp_path / "moved", tmp_path / "stayed")


@pytest.mark.parametrize("blocks", [3, 4])
def test_many_moves_are_none(blocks: int, tmp_path: Path) -> None:
    """At updates that end a checkpoint's interval, an epoch, and neither."""
    stages = [blocks, 1, 2, blocks, 1]
    stops = [(at, (n, 1)) for at, n in zip((1, 3, 4, 6, UPDATES), stages, strict=True)]
    moved = walk(tmp_path / "moved", stops, partition__blocks=blocks)
    stayed = walk(tmp_path / "stayed", [(UPDATES, (1, 1))], partition__blocks=blocks)
    same(moved, stayed, bits=True)
    assert moved["digest"] == stayed["digest"]


@pytest.mark.parametrize("after", [(1, 1), (2, 1), (2, 2)], ids=str)
def test_four_blocks_stay_four_on_fewer_stages(after: Layout, tmp_path: Path) -> None:
    """Nobody named them: the first run had four stages, and a checkpoint says what is trained."""
    told = {"partition__blocks": None, "objective__name": "backprop"}
    moved = walk(tmp_path / "moved", [(5, (4, 1)), (UPDATES, after)], **told)
    stayed = walk(tmp_path / "stayed", [(UPDATES, (4, 1))], **told)
    assert moved["blocks"] == stayed["blocks"] == 4
    same(moved, stayed, bits=after[1] == 1)
    close(tmp_path / "moved", tmp_path / "stayed")


@pytest.mark.parametrize("name", ["dropping", "normalised", "rebinding"])
def test_buffers_and_draws_move_with_their_layers(name: str, tmp_path: Path) -> None:
    """Batch statistics, moving averages, random numbers: the same bits over stages."""
    told = {"model": {"name": f"tests.tiny:{name}"}, "objective__name": "local-head"}
    moved = walk(tmp_path / "moved", [(2, (3, 1)), (5, (1, 1)), (UPDATES, (2, 1))], **told)
    stayed = walk(tmp_path / "stayed", [(UPDATES, (1, 1))], **told)
    same(moved, stayed, bits=True)
    assert moved["digest"] == stayed["digest"]


@pytest.mark.parametrize("before", [(3, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("after", [(1, 1), (2, 1), (3, 2)], ids=str)
def test_a_finished_run_tells_the_same_on_any_layout(
    before: Layout, after: Layout, tmp_path: Path
) -> None:
    """Nothing is trained, so the digest is the same even over replicas."""
    first = walk(tmp_path, [(UPDATES, before)])
    again = walk_on(tmp_path, after, UPDATES)
    same(again, first, bits=True)
    assert again["digest"] == first["digest"]


@pytest.mark.parametrize("after", [(1, 1), (3, 1), (2, 2), (1, 3)], ids=str)
def test_what_was_never_tested_is_tested_alike_elsewhere(after: Layout, tmp_path: Path) -> None:
    """Evaluated at the run's end alone: by the layout that finds it ended, in an epoch's middle."""
    told = {"checkpoint__every": 2, "evaluate__every": 9}
    first = walk(tmp_path / "first", [(6, (1, 1))], **told)
    walk(tmp_path / "out", [(UPDATES, (3, 1))], **told)
    newest = max((tmp_path / "out" / "checkpoints").iterdir())
    newest.rename(tmp_path / newest.name)  # as if it had been stopped before update 7
    again = walk_on(tmp_path / "out", after, 6, **told)
    same(again, first, bits=False)
    assert again["digest"] == first["digest"]


def walk_on(out: Path, layout: Layout, updates: int, **told: Any) -> Summary:
    """Go on in a folder that is not new."""
    told = {"epochs": None, "checkpoint__every": 3, **told}
    return trained(tiny.run(**told, updates=updates, mesh__stages=layout[0]), out, *layout)


LOCAL: dict[str, Any] = {"sync": {"name": "local-sgd", "every": 2}}


@pytest.mark.parametrize(("before", "after"), [((3, 2), (1, 2)), ((1, 3), (2, 3))], ids=str)
@pytest.mark.parametrize("sync", [LOCAL["sync"], {"name": "never"}], ids=["local-sgd", "never"])
@pytest.mark.parametrize("stop", [1, 4])
def test_replicas_apart_stay_who_they_are_on_other_stages(
    before: Layout, after: Layout, sync: dict[str, Any], stop: int, tmp_path: Path
) -> None:
    """As many replicas as before: each finds its own weights and moments, bit for bit."""
    moved = walk(tmp_path / "moved", [(stop, before), (UPDATES, after)], sync=sync)
    stayed = walk(tmp_path / "stayed", [(UPDATES, (1, after[1]))], sync=sync)
    same(moved, stayed, bits=True)
    assert moved["digest"] == stayed["digest"]


@pytest.mark.parametrize("updates", [4, 5])
def test_a_finished_run_of_replicas_apart_shows_the_same_view(updates: int, tmp_path: Path) -> None:
    """Ended on a mean, where three equal thirds must not be averaged again, and between two."""
    first = walk(tmp_path, [(updates, (1, 3))], **LOCAL)
    again = walk_on(tmp_path, (2, 3), updates, **LOCAL)
    same(again, first, bits=True)
    assert again["digest"] == first["digest"]


@pytest.mark.parametrize("after", [(1, 1), (3, 1), (2, 3)], ids=str)
def test_other_numbers_of_replicas_apart_all_start_from_the_view(
    after: Layout, tmp_path: Path
) -> None:
    """Promised is the view, with optimizers afresh: what was evaluated is what goes on."""
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
    told = {**LOCAL, "optimizer": sgd, "objective__name": "backprop"}
    first = walk(tmp_path, [(5, (2, 2))], **told)
    view = model(tmp_path)
    again = walk_on(tmp_path, after, 5, **told)
    same(again, first, bits=True)
    assert again["digest"] == first["digest"]
    again = walk_on(tmp_path, after, UPDATES, **told)
    assert (again["updates"], again["samples"]) == (UPDATES, first["samples"] + 16 + 16)
    if after[1] == 1:
        for name, tensor in gone_on(view).items():
            torch.testing.assert_close(model(tmp_path)[name], tensor, rtol=1e-12, atol=1e-13)


def gone_on(view: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `view` after updates 5 and 6, the second and third of epoch 1, by a plain loop."""
    run = tiny.run()
    samples = load_data(run.dataset.name, {}, run.folder).train
    held = {name: tensor.clone().requires_grad_() for name, tensor in view.items()}
    step = torch.optim.SGD(held.values(), lr=0.1, momentum=0.9)
    sequence = epoch_order(samples.size, run.settings.seed, 1, "full")
    for start in (16, 32):
        batch = sequence[start : start + 16]
        x = samples.inputs(batch).double().flatten(1)
        for name in ("fc1", "fc2", "fc3", "fc4"):
            x = torch.relu(x @ held[f"{name}.weight"].T + held[f"{name}.bias"])
        scores = x @ held["head.weight"].T + held["head.bias"]
        step.zero_grad()
        cross_entropy(scores, samples.targets(batch)).backward()
        step.step()
    return {name: tensor.detach() for name, tensor in held.items()}
