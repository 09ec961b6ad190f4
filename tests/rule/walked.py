"""Blocks of an objective in one process, trained on one micro-batch; messages follow the routes.

F   pass by pass, block by block          B   from the last block to the first
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.block.block import Block
from dtrain.block.micro_batch import Given, MicroBatch
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.rng import seeded
from dtrain.schedules.actions import Point
from dtrain.schedules.messages import count_forward_passes

D = torch.float64
SAMPLES = 30


def sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def build_blocks(
    objective: Objective, parts: Sequence[Sequence[nn.Module]], x: Tensor, classes: int
) -> list[tuple[BlockSpec, Block]]:
    """Return the blocks of a model whose blocks have the layers `parts`, in float64."""
    blocks: list[tuple[BlockSpec, Block]] = []
    h = x
    for index, part in enumerate(parts):
        input_shape = tuple(h.shape[1:])
        h = nn.Sequential(*part)(h)
        shapes = input_shape, tuple(h.shape[1:]), D, classes, tuple(x.shape[1:])
        spec = BlockSpec(index, len(parts), *shapes, train_samples=SAMPLES)
        with seeded("heads", index):
            head = objective.make_head(spec)
        layers = {f"l{index}{n}": layer for n, layer in enumerate(part)}
        block = Block(index, layers, head and head.to(D), sgd, detach_every=objective.detach_every)
        block.register_taps(objective.taps(block))
        blocks.append((spec, block))
    return blocks


def train_micro_batch(
    objective: Objective,
    blocks: Sequence[tuple[BlockSpec, Block]],
    x: Tensor,
    y: Tensor,
    loss_scale: float = 1.0,
    indices: Tensor | None = None,
) -> list[MicroBatch]:
    """Add the gradients of one micro-batch to all blocks; return the micro-batch of each block."""
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
            given = Given(y, told[point], None if index else x, None, which, pass_=pass_)
            fed = objective.make_input(task, block, given).detach().clone()
            fed.requires_grad_(index in asked)
            kept = block.run_forward(fed, (0, 0, 0), objective.needs_graph(task, pass_))
            lives[index] = MicroBatch(
                **kept,
                targets=y,
                loss_scale=loss_scale,
                received=told[point],
                indices=which,
                previous_pass=before,
            )
            offer(point)
    for index, (task, block) in reversed(list(enumerate(blocks))):
        point = Point(index, "B")
        lives[index].received |= told[point]
        block.backward(objective.backward_pairs(task, block, lives[index]))
        offer(point)
    return [lives[index] for index in range(len(blocks))]
