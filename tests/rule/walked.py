"""Blocks of an objective in one process, and what its routes bring: a net learns one micro-batch.

F   pass by pass, block by block          B   from the last block to the first
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.block import Block
from dtrain.live import Given, Live
from dtrain.objectives.objective import Objective
from dtrain.objectives.task import Task
from dtrain.schedules.action import Point
from dtrain.schedules.messages import passes
from dtrain.seeds import seeded

D = torch.float64
SAMPLES = 30


def step(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def made(
    objective: Objective, parts: Sequence[Sequence[nn.Module]], x: Tensor, classes: int
) -> list[tuple[Task, Block]]:
    """Return the blocks of a net whose layers are `parts`, in float64."""
    found: list[tuple[Task, Block]] = []
    h = x
    for index, part in enumerate(parts):
        inputs = tuple(h.shape[1:])
        h = nn.Sequential(*part)(h)
        shapes = inputs, tuple(h.shape[1:]), D, classes, tuple(x.shape[1:])
        task = Task(index, len(parts), *shapes, samples=SAMPLES)
        with seeded("heads", index):
            helper = objective.build(task)
        helper = helper if helper is None else helper.to(D)
        layers = {f"l{index}{n}": layer for n, layer in enumerate(part)}
        block = Block(index, layers, helper, step, grain=objective.grain)
        block.tap(objective.taps(block))
        found.append((task, block))
    return found


def learnt(
    objective: Objective,
    blocks: Sequence[tuple[Task, Block]],
    x: Tensor,
    y: Tensor,
    share: float = 1.0,
    indices: Tensor | None = None,
) -> list[Live]:
    """Add the gradients of one micro-batch to all blocks; return what each has left behind."""
    routes = objective.routes(len(blocks), "train")
    asked = {route.source.block for route in routes if route.name == "gradient"}
    which = torch.arange(len(x)) if indices is None else indices
    told: defaultdict[Point, dict[str, Tensor]] = defaultdict(dict)
    lives: dict[int, Live] = {}

    def offer(point: Point) -> None:
        for route in routes:
            if route.source == point:
                tensor = objective.tell(route, blocks[point.block][1], lives[point.block])
                shapes = objective.shape(route, [task for task, _ in blocks], len(y))
                assert (tensor.shape, tensor.dtype) == shapes
                told[route.target][route.name] = tensor.clone()

    for pass_ in range(passes(routes)):
        for index, (task, block) in enumerate(blocks):
            point, before = Point(index, "F", pass_), lives.get(index)
            given = Given(y, told[point], None if index else x, None, which, pass_=pass_)
            fed = objective.feed(task, block, given).detach().clone()
            fed.requires_grad_(index in asked)
            kept = block.run(fed, (0, 0, 0), objective.traced(task, pass_))
            lives[index] = Live(
                **kept, targets=y, share=share, told=told[point], indices=which, before=before
            )
            offer(point)
    for index, (task, block) in reversed(list(enumerate(blocks))):
        point = Point(index, "B")
        lives[index].told |= told[point]
        block.learn(objective.pulls(task, block, lives[index]))
        offer(point)
    return [lives[index] for index in range(len(blocks))]
