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
from dtrain.block.micro_batch import MicroBatch, RowRandom
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
    update: int = 0,
) -> list[MicroBatch]:
    """Add the gradients of one micro-batch to all blocks; return the micro-batch of each block."""
    routes = objective.routes(len(blocks), "train")
    gradient_senders = {route.source.block for route in routes if route.name == "gradient"}
    specs = [spec for spec, _ in blocks]
    messages: defaultdict[Point, dict[str, Tensor]] = defaultdict(dict)
    micro_batches: dict[int, MicroBatch] = {}

    def send(source: Point) -> None:
        for route in routes:
            if route.source == source:
                index = source.block
                message = objective.make_message(route, blocks[index][1], micro_batches[index])
                spec = objective.message_spec(route, specs, len(y))
                assert (message.shape, message.dtype) == spec
                messages[route.target][route.name] = message.clone()

    def begin_pass(point: Point) -> MicroBatch:
        if point.pass_:
            return micro_batches[point.block].next_pass(messages[point])
        return MicroBatch(
            targets=y,
            loss_scale=loss_scale,
            received=messages[point],
            samples=None if point.block else x,
            indices=torch.arange(len(x)) if indices is None else indices,
            row_random=RowRandom(0, point.block, update, len(x), 0, len(x)),
            rng_key=(update, 0, 0),
        )

    for pass_ in range(count_forward_passes(routes)):
        for index, (spec, block) in enumerate(blocks):
            point = Point(index, "F", pass_)
            micro_batch = micro_batches[index] = begin_pass(point)
            micro_batch.x = objective.make_input(spec, block, micro_batch).detach().clone()
            micro_batch.x.requires_grad_(index in gradient_senders)
            block.run_forward(micro_batch, objective.needs_graph(spec, pass_))
            send(point)
    for index, (spec, block) in reversed(list(enumerate(blocks))):
        point = Point(index, "B")
        micro_batches[index].received |= messages[point]
        block.backward(objective.backward_pairs(spec, block, micro_batches[index]))
        send(point)
    return [micro_batches[index] for index in range(len(blocks))]
