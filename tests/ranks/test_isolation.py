"""Laws 4 and 7 over all objectives, through the real engine on one rank.

Invariant: an objective is covered by being in the dict. An objective whose last block does not
train by the true loss of the model's own head is listed in `OWN`, with the reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dtrain.build import RankJob, build_rank
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.data.sampler import epoch_order
from dtrain.objectives import OBJECTIVES
from dtrain.planning.plan import make_plan
from dtrain.schedules import SCHEDULES
from dtrain.testing.isolation import watch_blocks
from tests import tiny

OWN = {
    "cafo": "layers keep their initial weights, and the head is solved",
    "diffusion-blocks": "every block learns from samples and noisy labels, behind an inlet",
    "forward-forward": "the last block learns by goodness, and the head is a probe",
    "layer-collaboration": "the last block learns by goodness, and the head is a probe",
    "noprop": "every block learns from samples and noisy labels, behind an inlet",
    "scalable-ff": "the last block learns by goodness, and the head is a probe",
    "forward-gradient": "the last block learns by estimates of its gradient",
    "ulr": "the last block learns by estimates of its gradient",
    "dual-propagation": "activations have differences in place of derivatives, in every block",
    "pfa": "feedback takes the place of the weights, in every block",
}
"""Objectives with which one block is no ordinary backpropagation."""


def build_job(objective: str, **changes: Any) -> RankJob:
    """Return a run on one rank, ready to train."""
    run = tiny.run(objective__name=objective, epochs=1, optimizer__lr=0.02, **changes)
    return build_rank(make_plan(run, 1), Comm(SingleBackend()))


def train_epoch(job: RankJob) -> None:
    """Train an epoch of four updates."""
    plan = job.plan
    seed, shuffle = plan.run.settings.seed, plan.run.data.shuffle
    sequence = epoch_order(plan.data.train.size, seed, 0, shuffle)
    updates = range(plan.training_length.total_updates)
    batches = [plan.batch_splitter.batch(sequence, update, 0) for update in updates]
    assert len(list(job.engine.run(job.train_loader, batches, 0, 0))) == 4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_learning_of_a_block_moves_no_other(objective: str) -> None:
    """Law 7: neither gradients nor weights, in no action of a whole epoch."""
    asynchronous = SCHEDULES[OBJECTIVES[objective]().default_schedule].asynchronous
    job = build_job(objective, micro_batches=1 if asynchronous else 2)
    blocks = job.engine.blocks
    changed = watch_blocks(blocks, on_fault=lambda place, names: pytest.fail(f"{place}: {names}"))
    train_epoch(job)
    trained = {
        (index, name)
        for index, block in blocks.items()
        for name, parameter in block.parameters.items()
        if parameter.requires_grad
    }
    assert changed >= trained, "otherwise nothing was watched"


def differs_from_backprop(objective: str) -> bool:
    """Return whether one block gets other weights than in an independent loop of backprop."""
    job = build_job(objective, partition={"blocks": 1}, micro_batches=1)
    seed = job.plan.run.settings.seed
    layers = job.plan.layout.model.build(range(5), seed, torch.float64)
    model = nn.Sequential(*layers.values())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, fused=True)
    samples = job.plan.data.train
    sequence = epoch_order(samples.size, seed, 0, "full")
    for start in range(0, 50, 16):
        indices = sequence[start : start + 16]
        optimizer.zero_grad()
        output = model(samples.inputs(indices).double())
        cross_entropy(output, samples.targets(indices)).backward()
        optimizer.step()
    train_epoch(job)
    ours = job.engine.blocks[0].parameters
    theirs = {f"{n}.{p}": t for n, layer in layers.items() for p, t in layer.named_parameters()}
    return any(
        name not in ours or not torch.equal(ours[name], tensor) for name, tensor in theirs.items()
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_block_is_ordinary_backprop(objective: str) -> None:
    """Law 4, bit for bit; the objectives in `OWN` really do something else."""
    assert differs_from_backprop(objective) == (objective in OWN)
