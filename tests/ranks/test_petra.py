"""PETRA over whole runs: equal to its formulas in plain torch, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError
from dtrain.models.reversible import AdditiveCoupling, ResidualCoupling, Reversible
from dtrain.objectives import OBJECTIVES
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.schedules import SCHEDULES
from dtrain.schedules.verify import verify_schedule
from dtrain.testing.small_run import train
from tests import tiny
from tests.harness import train_in_threads
from tests.outcome import model
from tests.refusals import refuses

WIDTH = 8
"""Numbers of both streams; 4 in each."""


def branch() -> nn.Module:
    """Return a function of one stream, with batch statistics."""
    half = WIDTH // 2
    return nn.Sequential(nn.Linear(half, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, half))


def net(couplings: int = 2) -> nn.Sequential:
    """Return a stem, couplings, a layer that is not reversible, more couplings, and a head."""
    stem = nn.Sequential(nn.Flatten(), nn.Linear(10, WIDTH))
    first = [ResidualCoupling(branch()) for _ in range(couplings)]
    between = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    second = AdditiveCoupling(branch(), nn.Sequential(branch(), nn.Dropout(0.0)))
    return nn.Sequential(stem, *first, between, second, nn.Linear(WIDTH, 3))


BLOCKS = 6
"""One block for each layer of `net`: blocks 1, 2 and 4 are reversible."""


def make_run(**changes: Any) -> Any:
    """Return a run of `net` in float64, 50 samples in updates of 10."""
    return tiny.run(
        **{
            "model": {"name": "tests.ranks.test_petra:net"},
            "partition": {"blocks": BLOCKS},
            "objective__name": "backprop",
            "schedule": {"name": "petra"},
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
            "micro_batches": 1,
            "batch_size": 10,
            "epochs": 1,
            **changes,
        }
    )


def simulate(run: Any, layers: Sequence[nn.Module]) -> None:
    """Train by the formulas of the paper, tick by tick: one stage for each layer, no flush.

    ::

        x_j(t+1) = F_j(x_(j-1)(t), w_j)        rebuilt_j = inverse of F_j at rebuilt_(j+1), with w_j
        d_j(t+1) = gradient of <F_j(rebuilt_j, w_j), d_(j+1)(t)>
    """
    samples = load_data(run.dataset.name, {}, run.folder).train
    size, accumulate = run.settings.batch_size, run.settings.micro_batches
    order = epoch_order(50, run.settings.seed, 0)
    batches = [order[start : start + size] for start in range(0, 50, size)]
    parts = [(p, len(p) / len(b)) for b in batches for p in np.array_split(b, accumulate)]
    depth = len(layers)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9) for layer in layers]
    outputs: dict[tuple[int, int], Tensor] = {}
    kept: dict[tuple[int, int], Tensor] = {}
    back: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for tick in range(len(parts) + 2 * depth):
        for j, layer in enumerate(layers):
            micro = tick - j
            if 0 <= micro < len(parts):
                rows, _ = parts[micro]
                x = samples.inputs(rows).double() if j == 0 else outputs.pop((j - 1, micro))
                if j == depth - 1 or not isinstance(layer, Reversible):
                    kept[j, micro] = x
                with torch.no_grad():
                    outputs[j, micro] = layer(x)
            micro = tick - (2 * (depth - 1) - j)
            if not 0 <= micro < len(parts):
                continue
            rows, scale = parts[micro]
            returned, cotangent = back.pop((j, micro), (torch.empty(0), torch.empty(0)))
            buffers = {k: v.clone() for k, v in layer.named_buffers()}
            with torch.no_grad():
                rebuilt = kept.pop((j, micro)) if (j, micro) in kept else layer.inverse(returned)
            rebuilt.requires_grad_()
            y = layer(rebuilt)
            if j == depth - 1:
                outputs.pop((j, micro))
                loss = functional.cross_entropy(y, samples.targets(rows))
                (loss * scale).backward()
            else:
                y.backward(cotangent)
            for name, buffer in layer.named_buffers():  # forwards alone count
                buffer.copy_(buffers[name])
            assert rebuilt.grad is not None
            back[j - 1, micro] = rebuilt.detach(), rebuilt.grad
            if micro % accumulate == accumulate - 1:
                optimizers[j].step()
                optimizers[j].zero_grad()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_runs_train_by_the_formulas_of_the_paper(tmp_path: Path, micro_batches: int) -> None:
    """Also with accumulation; and on any number of ranks to the bit."""
    run = make_run(micro_batches=micro_batches)
    digests = {
        train_in_threads(run, tmp_path / str(stages), stages)["digest"] for stages in (1, 2, 4)
    }
    assert len(digests) == 1
    plan = make_plan(run, 1)
    built = plan.layout.model.build(range(BLOCKS), run.settings.seed, torch.float64)
    simulate(run, [layer.train() for layer in built.values()])
    ours = model(tmp_path / "1")
    for name, layer in built.items():
        for key, tensor in layer.state_dict().items():
            torch.testing.assert_close(
                ours[f"{name}.{key}"], tensor.to(ours[f"{name}.{key}"].dtype), rtol=0, atol=1e-11
            )


def test_weights_at_rest_have_the_gradient_of_backpropagation(tmp_path: Path) -> None:
    """A segment of one update: no weight changes between forward and backward."""
    changes = {"micro_batches": 3, "checkpoint": {"every": 1}}
    train_in_threads(make_run(**changes), tmp_path / "petra", 3)
    train_in_threads(make_run(**changes, schedule={"name": "1f1b"}), tmp_path / "1f1b", 3)
    ours, theirs = model(tmp_path / "petra"), model(tmp_path / "1f1b")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-12)
    late = make_run(micro_batches=3)
    train_in_threads(late, tmp_path / "late", 1)
    assert not torch.equal(model(tmp_path / "late")["0.1.weight"], theirs["0.1.weight"])


def test_one_block_is_backpropagation(tmp_path: Path) -> None:
    """The same bits."""
    runs = [make_run(partition__blocks=1, schedule={"name": name}) for name in ("petra", "1f1b")]
    digests = {train_in_threads(r, tmp_path / str(i), 1)["digest"] for i, r in enumerate(runs)}
    assert len(digests) == 1


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_delays_follow_from_the_ticks(micro_batches: int) -> None:
    """2(K-1-b) micro-batches, hence that over k updates, rounded up; every tick has both."""
    routes = OBJECTIVES["backprop"]().routes(5, "train")
    sizes = [[micro_batches] * 20]
    report = verify_schedule(SCHEDULES["petra"](), range(5), sizes, routes)
    ticks = [2 * (4 - b) for b in range(5)]
    assert report.staleness == tuple(math.ceil(t / micro_batches) for t in ticks)
    assert report.peak_live == tuple(t + 1 for t in ticks)


def test_rebuilt_inputs_need_no_memory_and_twice_the_bytes_back(tmp_path: Path) -> None:
    """Memory of reversible stages does not depend on the micro-batches in flight, and traffic back
    is an activation and its gradient at every boundary that a reversible block precedes."""
    peaks: dict[str, list[list[int]]] = {}
    for name in ("petra", "pipelined"):
        for couplings in (1, 4):
            run = make_run(
                model={"name": "tests.ranks.test_petra:wide", "couplings": couplings},
                partition={"blocks": couplings + 3, "places": [0, *[1] * (couplings + 1), 2]},
                schedule={"name": name},
                dtype="float32",
                batch_size=8,
                epochs=2,
            )
            plan = make_plan(run, 3)
            live = [memory.live for memory in MemoryPlan(plan).rank_memory()]
            peaks.setdefault(name, []).append(live)
            if couplings == 4 and name == "petra":
                outcome = train(run, stages=3, plans_memory=True)
                ours, planned = outcome.counted_bytes, outcome.planned_bytes
                assert planned == pytest.approx(ours, rel=0.1)
                tensor = 100 * WIDE * 4  # two epochs
                assert outcome.bytes_sent == 2 * tensor + 2 * tensor + tensor
    (few, many), (few_kept, many_kept) = peaks["petra"], peaks["pipelined"]
    assert few[1] == many[1]
    assert many_kept[1] > 3 * few_kept[1] > 3 * few[1]


WIDE = 64


def wide(couplings: int) -> nn.Sequential:
    """Return a stem, reversible layers alone, and a head."""
    stem = nn.Sequential(nn.Flatten(), nn.Linear(10, WIDE))
    half = WIDE // 2
    inner = [
        AdditiveCoupling(*(nn.Sequential(nn.Linear(half, half), nn.Tanh()) for _ in range(2)))
        for _ in range(couplings + 1)
    ]
    return nn.Sequential(stem, *inner, nn.Linear(WIDE, 3))


def test_rounded_activations_are_refused() -> None:
    """A rebuilt input would contain the rounding of every block."""
    with refuses(ConfigError, "schedule.rebuilds-from-compressed"):
        make_plan(make_run(partition__activation_compression="int8"), 2)
