"""Blocks of an objective in one process, and what its routes bring: a net learns one micro-batch.

F   pass by pass, block by block          B   from the last block to the first
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.rng import seeded
from dtrain.schedules.actions import Point
from dtrain.schedules.messages import count_forward_passes

D = torch.float64
SAMPLES = 30


def step(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def made(
    objective: Objective, parts: Sequence[Sequence[nn.Module]], x: Tensor, classes: int
) -> list[tuple[BlockSpec, Block]]:
    """Return the blocks of a net whose layers are `parts`, in float64."""
    found: list[tuple[BlockSpec, Block]] = []
    h = x
    for index, part in enumerate(parts):
        inputs = tuple(h.shape[1:])
        h = nn.Sequential(*part)(h)
        shapes = inputs, tuple(h.shape[1:]), D, classes, tuple(x.shape[1:])
        task = BlockSpec(index, len(parts), *shapes, train_samples=SAMPLES)
        with seeded("heads", index):
            helper = objective.make_head(task)
        helper = helper if helper is None else helper.to(D)
        layers = {f"l{index}{n}": layer for n, layer in enumerate(part)}
        block = Block(index, layers, helper, step, detach_every=objective.detach_every)
        block.register_taps(objective.taps(block))
        found.append((task, block))
    return found


def learnt(
    objective: Objective,
    blocks: Sequence[tuple[BlockSpec, Block]],
    x: Tensor,
    y: Tensor,
    share: float = 1.0,
    indices: Tensor | None = None,
) -> list[MicroBatch]:
    """Add the gradients of one micro-batch to all blocks; return what each has left behind."""
    routes = objective.routes(len(blocks), "train")
    asked = {route.source.block for route in routes if route.name == "gradient"}
    which = torch.arange(len(x)) if indices is None else indices
    told: defaultdict[Point, dict[str, Tensor]] = defaultdict(dict)
    lives: dict[int, MicroBatch] = {}

    def offer(point: Point) -> None:
        for route in routes:
            if route.source == point:
                tensor = objective.make_message(route, blocks[point.block][1], lives[point.block])
                shapes = objective.message_spec(route, [task for task, _ in blocks], len(y))
                assert (tensor.shape, tensor.dtype) == shapes
                told[route.target][route.name] = tensor.clone()

    for pass_ in range(count_forward_passes(routes)):
        for index, (task, block) in enumerate(blocks):
            point, before = Point(index, "F", pass_), lives.get(index)
            if before is None:
                lives[index] = MicroBatch(
                    targets=y,
                    loss_scale=share,
                    received=told[point],
                    samples=None if index else x,
                    indices=which,
                    rng_key=(0, 0, 0),
                )
            else:
                lives[index] = before.next_pass(told[point])
            micro_batch = lives[index]
            micro_batch.x = objective.make_input(task, block, micro_batch).detach().clone()
            micro_batch.x.requires_grad_(index in asked)
            block.run_forward(micro_batch, objective.needs_graph(task, pass_))
            offer(point)
    for index, (task, block) in reversed(list(enumerate(blocks))):
        point = Point(index, "B")
        lives[index].received |= told[point]
        block.backward(objective.backward_pairs(task, block, lives[index]))
        offer(point)
    return [lives[index] for index in range(len(blocks))]
