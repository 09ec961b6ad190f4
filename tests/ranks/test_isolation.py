"""Laws 4 and 7 over all objectives, through the real engine on one rank.

Invariant: an objective is covered by being in the dict; one whose last block does not learn the
true loss through the model's own head stands in `OWN`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dtrain.block.block import Block
from dtrain.build import RankJob, build_rank
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.data.sampler import epoch_order
from dtrain.objectives import OBJECTIVES
from dtrain.planning.plan import make_plan
from dtrain.schedules import SCHEDULES
from tests import tiny

OWN = {
    "cafo": "layers keep their first weights, and the head is solved",
    "forward-forward": "the last block learns by goodness, and the head is a probe",
    "layer-collaboration": "the last block learns by goodness, and the head is a probe",
    "scalable-ff": "the last block learns by goodness, and the head is a probe",
}
"""Objectives with which one block is no ordinary backpropagation."""

Marks = dict[tuple[int, str], tuple[int, int, int]]


def job(objective: str, **told: Any) -> RankJob:
    """Return a run on one rank, ready to train."""
    run = tiny.run(objective__name=objective, epochs=1, optimizer__lr=0.02, **told)
    return build_rank(make_plan(run, 1), Comm(SingleBackend()))


def walk(job: RankJob) -> None:
    """Train an epoch of four updates."""
    agreed = job.plan
    sequence = epoch_order(
        agreed.data.train.size, agreed.run.settings.seed, 0, agreed.run.data.shuffle
    )
    offsets = range(agreed.training_length.total_updates)
    batches = [agreed.batch_splitter.batch(sequence, each, 0) for each in offsets]
    assert len(list(job.engine.run(job.train_loader, batches, 0, 0))) == 4


def marks(blocks: dict[int, Block]) -> Marks:
    """Return what changes when a parameter or its gradient does: identities and versions."""
    return {
        (index, name): (
            parameter._version,
            id(parameter.grad),
            -1 if parameter.grad is None else parameter.grad._version,
        )
        for index, block in blocks.items()
        for name, parameter in block.parameters.items()
    }


def watch(blocks: dict[int, Block], own: int, act: str, moved: set[tuple[int, str]]) -> None:
    """Let a method of a block tell what it moves, and assert that it is the block's own."""
    work: Callable[..., None] = getattr(blocks[own], act)

    def watched(*args: Any) -> None:
        before = marks(blocks)
        work(*args)
        found = {key for key, mark in marks(blocks).items() if mark != before[key]}
        assert {index for index, _ in found} <= {own}, f"{act} of block {own} moved {found}"
        moved.update(found)

    setattr(blocks[own], act, watched)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_learning_of_a_block_moves_no_other(objective: str) -> None:
    """Law 7: neither gradients nor weights, in no action of a whole epoch."""
    stale = SCHEDULES[OBJECTIVES[objective]().default_schedule].asynchronous
    made = job(objective, micro_batches=1 if stale else 2)
    blocks, moved = made.engine.blocks, set[tuple[int, str]]()
    for own in blocks:
        for act in ("backward", "update"):
            watch(blocks, own, act, moved)
    walk(made)
    trained = {
        (index, name)
        for index, block in blocks.items()
        for name, parameter in block.parameters.items()
        if parameter.requires_grad
    }
    assert moved >= trained  # or nothing was watched


def differs(objective: str) -> bool:
    """Say whether one block trains to other weights than an independent loop of backpropagation."""
    made = job(objective, partition={"blocks": 1}, micro_batches=1)
    layers = made.plan.layout.model.build(range(5), made.plan.run.settings.seed, torch.float64)
    net = nn.Sequential(*layers.values())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02, fused=True)
    samples = made.plan.data.train
    sequence = epoch_order(samples.size, made.plan.run.settings.seed, 0, "full")
    for start in range(0, 50, 16):
        batch = sequence[start : start + 16]
        optimizer.zero_grad()
        cross_entropy(net(samples.inputs(batch).double()), samples.targets(batch)).backward()
        optimizer.step()
    walk(made)
    found = made.engine.blocks[0].parameters
    wanted = {f"{n}.{p}": t for n, layer in layers.items() for p, t in layer.named_parameters()}
    return any(not torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_block_is_ordinary_backprop(objective: str) -> None:
    """Law 4, bit for bit; and who is excused from it really does something else."""
    assert differs(objective) == (objective in OWN)
