"""Planned memory: what every rank will hold, known before anything is made.

Invariant: counted as a run counts its `peak_memory_bytes`, part by part, so that the two can be
laid side by side.

::

    rank    parameters | gradients | optimizer | sync | versions | live | messages
                                                  |      |         |      `- receives posted,
                                                  |      |         |         sends under way
                                                  |      |         `- x, y, what autograd saves
                                                  |      `- of weights, for late backwards
                                                  `- copies of what is trained
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, final

import numpy as np
import torch
from torch import nn

from dtrain.assembly import assembled, drawn, origin, stepper
from dtrain.block import Block
from dtrain.footprint import Footprint, Make, footprint, live_bytes
from dtrain.job import Plan
from dtrain.objectives.objective import Mode
from dtrain.schedules.action import Action
from dtrain.schedules.held import held_bytes
from dtrain.schedules.policy import copies_of
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
    sync : int
        Copies of what is trained that the sync keeps.
    versions : int
        Copies of it that forwards and late backwards compute with.
    live : int
        Micro-batches between forward and learning, and what helpers keep of earlier updates.
    messages : int
        Posted receives, and sends under way.
    """

    parameters: int
    gradients: int
    optimizer: int
    sync: int
    versions: int
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
        timeline, sync = self.plan.proof.timeline, self.plan.run.make_sync()
        policy = self.layout.schedule.policy(self.layout.place, self.layout.routes)
        found = []
        for stage, messages in enumerate(held):
            own = [blocks[b] for b in self.layout.blocks(stage)]
            actions = [span.action for span in timeline if span.stage == stage]
            shelves = copies_of(actions, policy)
            found.append(
                Budget(
                    parameters=sum(each.parameters for each in own),
                    gradients=sum(each.gradients for each in own),
                    optimizer=0 if sync.idles else sum(each.optimizer for each in own),
                    sync=sync.copies * sum(each.gradients for each in own),
                    versions=sum(n * blocks[b].gradients for b, n in shelves.items()),
                    live=live_bytes(actions, blocks) + self._remembered(stage),
                    messages=messages,
                )
            )
        return found

    def _remembered(self, stage: int) -> int:
        """Return what the helpers of a stage keep from update to update."""
        plan, tasks = self.plan, self.layout.tasks
        rows = -(-min(plan.shares.size, plan.data.train.size) // self.layout.mesh.replicas)
        return rows * sum(
            self.layout.objective.remembers(tasks[b]) for b in self.layout.blocks(stage)
        )

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
        layout, step = self.layout, stepper(self.plan.run)
        skeletons = layout.model.skeletons(layout.dtype)
        found = []
        for index in range(len(layout.parts)):
            real, fake = partial(self._real, index), self._fakes(index, skeletons)
            objective, tasks = layout.objective, layout.tasks
            found.append(footprint(real, fake, step, objective, tasks, index, rows))
        return found

    def _real(self, index: int) -> Block:
        """Return a block as a run makes it."""
        return self._ready(drawn(self.plan.run, self.layout, index, torch.device("cpu")))

    def _fakes(self, index: int, skeletons: Skeletons) -> Make | None:
        """Return what makes a block of fake tensors, None where a layer has no skeleton."""
        layout, part = self.layout, self.layout.parts[index]
        model, indices = origin(layout, index)
        made = skeletons if part.own is None else part.own.skeletons(layout.dtype)
        layers = {model.names[i]: layer for i in indices if (layer := made[i]) is not None}
        with torch.device("meta"):
            helper = layout.objective.build(part.task)
        if helper is not None:
            helper = helper.to(part.task.dtype)
        return partial(self._fake, index, layers, helper) if len(layers) == len(indices) else None

    def _fake(self, index: int, layers: Mapping[str, nn.Module], helper: nn.Module | None) -> Block:
        """Return a block of such tensors as are made now: those of a CPU, without memory."""
        faked = {name: layer.to_empty(device="cpu") for name, layer in layers.items()}
        helper = None if helper is None else helper.to_empty(device="cpu")
        return self._ready(assembled(self.plan.run, self.layout, index, faked, helper))

    def _ready(self, block: Block) -> Block:
        """Return a block as the engine has it when it starts."""
        if self.layout.schedule.splits:
            block.split = Split(block.roots.values())
        return block
