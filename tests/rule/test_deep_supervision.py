"""Deep supervision: the gradients are those of one loss over the whole net."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.base import GRADIENT
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.deep_supervision import DeepSupervision
from tests.refusals import refuses

D = torch.float64


@pytest.mark.parametrize("head", ["greedy", "dgl"])
def test_gradients_are_those_of_the_sum_of_all_losses(head: str) -> None:
    torch.manual_seed(0)
    objective = DeepSupervision(head=head, norm="none", hidden=1, weight=0.3)
    specs = [BlockSpec(b, 3, (6,), (6,) if b < 2 else (4,), D, 4) for b in range(3)]
    nets = [nn.Sequential(nn.Linear(6, spec.output_shape[0]), nn.Tanh()).to(D) for spec in specs]
    heads = [objective.make_head(spec) for spec in specs]
    blocks = [
        Block(b, {f"fc{b}": net}, head and head.to(D), torch.optim.SGD)
        for b, (net, head) in enumerate(zip(nets, heads, strict=True))
    ]
    x, targets = torch.randn(5, 6, dtype=D), torch.randint(0, 4, (5,))
    micro_batches = []
    for b, block in enumerate(blocks):
        x = x.detach().requires_grad_(b > 0)
        micro_batch = MicroBatch(x=x, targets=targets, rng_key=(0, 0, 0))
        micro_batches.append(block.run_forward(micro_batch))
        x = micro_batches[-1].y
    for b in (2, 1, 0):
        if b < 2:
            micro_batches[b].received[GRADIENT] = micro_batches[b + 1].x.grad
        blocks[b].backward(objective.backward_pairs(specs[b], blocks[b], micro_batches[b]))
    ours = [gradient.clone() for block in blocks for gradient in block.gradients()]
    for block in blocks:
        for parameter in block.trainable_parameters:
            parameter.grad = None
    total, y = torch.zeros((), dtype=D), micro_batches[0].x
    for net, head in zip(nets, heads, strict=True):
        y = net(y)
        loss = cross_entropy(y if head is None else head(y), targets)
        total = total + (loss if head is None else 0.3 * loss)
    total.backward()
    theirs = [p.grad for block in blocks for p in block.trainable_parameters]
    assert len(ours) == len(theirs)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-15)


def test_it_has_the_heads_of_local_heads_and_a_weight() -> None:
    spec = BlockSpec(0, 2, (3, 8, 8), (4, 8, 8), D, 10)
    for head in ("greedy", "1c2f"):
        names = ("local-head", "deep-supervision")
        local, deep = (OBJECTIVES[name](head=head).build_head(spec) for name in names)
        assert str(local) == str(deep)
    assert DeepSupervision().default_schedule == "1f1b"
    with refuses(ConfigError, "objective.weight-not-positive"):
        DeepSupervision(weight=0)
