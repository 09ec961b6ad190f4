"""Deep supervision: the gradients are those of one loss over the whole net."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import DtrainError
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.base import GRADIENT
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.deep_supervision import DeepSupervision

D = torch.float64


@pytest.mark.parametrize("head", ["greedy", "dgl"])
def test_gradients_are_those_of_the_sum_of_all_losses(head: str) -> None:
    torch.manual_seed(0)
    objective = DeepSupervision(head=head, norm="none", hidden=1, weight=0.3)
    tasks = [BlockSpec(b, 3, (6,), (6,) if b < 2 else (4,), D, 4) for b in range(3)]
    nets = [nn.Sequential(nn.Linear(6, task.output_shape[0]), nn.Tanh()).to(D) for task in tasks]
    helpers = [objective.build_head(task) for task in tasks]
    blocks = [
        Block(b, {f"fc{b}": net}, None if helper is None else helper.to(D), torch.optim.SGD)
        for b, (net, helper) in enumerate(zip(nets, helpers, strict=True))
    ]
    x, targets = torch.randn(5, 6, dtype=D), torch.randint(0, 4, (5,))
    lives = []
    for b, block in enumerate(blocks):
        x = x.detach().requires_grad_(b > 0)
        lives.append(block.run_forward(MicroBatch(x=x, targets=targets, rng_key=(0, 0, 0))))
        x = lives[-1].y
    for b in (2, 1, 0):
        if b < 2:
            lives[b].received[GRADIENT] = lives[b + 1].x.grad
        blocks[b].backward(objective.backward_pairs(tasks[b], blocks[b], lives[b]))
    ours = [
        p.grad.clone() for block in blocks for p in block.trainable_parameters if p.grad is not None
    ]
    for block in blocks:
        for parameter in block.trainable_parameters:
            parameter.grad = None
    whole, y = torch.zeros((), dtype=D), lives[0].x
    for b, (net, helper) in enumerate(zip(nets, helpers, strict=True)):
        y = net(y)
        whole = whole + (
            cross_entropy(y, targets) if b == 2 else 0.3 * cross_entropy(helper(y), targets)
        )
    whole.backward()
    theirs = [p.grad for block in blocks for p in block.trainable_parameters]
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_it_has_the_heads_of_local_heads_and_a_weight() -> None:
    task = BlockSpec(0, 2, (3, 8, 8), (4, 8, 8), D, 10)
    for head in ("greedy", "1c2f"):
        one, other = (
            OBJECTIVES[name](head=head).build_head(task)
            for name in ("local-head", "deep-supervision")
        )
        assert str(one) == str(other)
    assert DeepSupervision().default_schedule == "1f1b"
    with pytest.raises(DtrainError, match="weight = 0: give more than 0"):
        DeepSupervision(weight=0)
