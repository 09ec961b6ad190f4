"""Planned memory: what every rank will hold, known before anything is made.

Invariant: counted as a run counts its `peak_memory_bytes`, part by part, so that the two can be
laid side by side.

::

    rank    parameters | gradients | optimizer | live | messages
                                                  |       `- receives posted, sends under way
                                                  `- x, y and what autograd saves, per micro-batch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, final

import numpy as np
import torch
from torch import nn

from dtrain import optimizers
from dtrain.block import Block, Step
from dtrain.footprint import Footprint, footprint, live_bytes
from dtrain.job import Plan
from dtrain.layout import Part
from dtrain.objectives.objective import Mode
from dtrain.objectives.task import Task
from dtrain.schedules.action import Action
from dtrain.schedules.held import held_bytes
from dtrain.schedules.simulate import Span
from dtrain.split import Split

Skeletons = Sequence[nn.Module | None]
"""A model's layers without memory; None where that cannot be."""

MICROS = 4
"""Micro-batches of an evaluation that fill every credit, beyond those that fill the blocks."""


@final
@dataclass(frozen=True)
class Budget:
    """Bytes of one rank: what it holds all the time, and the most that comes and goes.

    Attributes
    ----------
    parameters, gradients, optimizer : int
        Of its blocks, buffers and heads included.
    live : int
        Micro-batches between forward and learning.
    messages : int
        Posted receives, and sends under way.
    """

    parameters: int
    gradients: int
    optimizer: int
    live: int
    messages: int

    @property
    def peak(self) -> int:
        """All together."""
        return sum(asdict(self).values())


def fullest(plan: Plan, replica: int) -> int:
    """Return the rows of a replica's largest micro-batch."""
    size = min(plan.shares.size, plan.data.train.size)
    batch = plan.shares.batch(np.arange(size), 0, replica)
    return max(map(len, batch.micros), default=0)


def payload(plan: Plan, rows: int, mode: Mode = "train") -> list[int]:
    """Return the bytes of one message of every route."""
    return [size for _, size in plan.layout.messages(rows, mode)]


@final
class Books:
    """The planned memory of one plan; each number of rows is counted once.

    Attributes
    ----------
    blocks : callable
        Returns what every block holds with micro-batches of so many rows, a list of `Footprint`.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.layout = plan, plan.layout
        self.blocks = cache(self._blocks)
        self._budgets = cache(self._stages)

    def ranks(self) -> list[Budget]:
        """Return the planned memory of every rank, in rank order."""
        mesh = self.layout.mesh
        rows = [fullest(self.plan, replica) for replica in range(mesh.replicas)]
        places = map(mesh.coords, range(mesh.ranks))
        return [self._budgets(rows[replica])[stage] for replica, stage in places]

    def table(self) -> list[dict[str, Any]]:
        """Return the planned memory of every rank as plain values."""
        rows = []
        for rank, budget in enumerate(self.ranks()):
            replica, stage = self.layout.mesh.coords(rank)
            sizes = {f"{part}_bytes": size for part, size in asdict(budget).items()}
            place = {"rank": rank, "replica": replica, "stage": stage}
            rows.append(place | sizes | {"peak_bytes": budget.peak})
        return rows

    def _stages(self, rows: int) -> list[Budget]:
        """Return the budget of every stage."""
        blocks, held = dict(enumerate(self.blocks(rows))), self._held(rows)
        timeline = self.plan.proof.timeline
        found = []
        for stage, messages in enumerate(held):
            own = [blocks[b] for b in self.layout.blocks(stage)]
            actions = (span.action for span in timeline if span.stage == stage)
            found.append(
                Budget(
                    parameters=sum(each.parameters for each in own),
                    gradients=sum(each.gradients for each in own),
                    optimizer=sum(each.optimizer for each in own),
                    live=live_bytes(actions, blocks),
                    messages=messages,
                )
            )
        return found

    def _held(self, rows: int) -> list[int]:
        """Return the messages of every stage: the more of training and of evaluation."""
        plan, place = self.plan, self.layout.place
        learnt = held_bytes(plan.proof.timeline, place, self.layout.routes, payload(plan, rows))
        count = math.ceil(plan.data.test.size / plan.layout.mesh.replicas / plan.shares.largest)
        seen = [
            Span(stage, micro + block, micro + block + 1, Action("F", block, 0, micro))
            for micro in range(min(count, len(place) + MICROS))
            for block, stage in enumerate(place)
        ]
        routes = self.layout.objective.routes(len(place), "predict")
        told = held_bytes(seen, place, routes, payload(plan, plan.shares.largest, "predict"))
        return [max(pair) for pair in zip(learnt, told, strict=True)]

    def _blocks(self, rows: int) -> list[Footprint]:
        run, layout = self.plan.run, self.layout
        skeletons = layout.model.skeletons(layout.dtype)
        step = partial(optimizers.make, run.optimizer.name, run.optimizer.fields)
        found = []
        for index, part in enumerate(layout.parts):
            own = part.own.skeletons(layout.dtype) if part.own else skeletons
            with torch.device("meta"):
                make = partial(self._block, part, own, self._helper(part.task), step)
            found.append(footprint(make, step, layout.objective, layout.tasks, index, rows))
        return found

    def _helper(self, task: Task) -> nn.Module | None:
        helper = self.layout.objective.build(task)
        return None if helper is None else helper.to(task.dtype)

    def _block(
        self, part: Part, made: Skeletons, helper: nn.Module | None, step: Step, real: bool
    ) -> Block:
        """Return a block as `build` makes it; not real, it is made of fake tensors."""
        layout, chosen, index = self.layout, self.plan.run.partition.recompute, part.task.block
        model = layout.model if part.own is None else part.own
        indices = part.layers if part.own is None else range(len(model.names))
        if real:
            layers = model.build(indices, 0, layout.dtype)
            helper = self._helper(part.task)
        else:
            layers = {model.names[i]: _faked(made[i]) for i in indices}
            helper = None if helper is None else _faked(helper)
        for layer in layers.values():
            if not layout.objective.trains:
                layer.requires_grad_(False)
        again = chosen if isinstance(chosen, bool) else index in chosen
        block = Block(index, layers, helper, step, 0, layout.objective.grain, again)
        if layout.schedule.splits:
            block.split = Split(block.roots.values())
        return block


def _faked(layer: nn.Module | None) -> nn.Module:
    """Return a layer without memory as one on the CPU; called in the mode of fake tensors."""
    if layer is None:
        raise NotImplementedError("a layer that cannot be made without memory")
    return layer.to_empty(device="cpu")
