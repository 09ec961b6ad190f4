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

from dtrain.block.block import Block
from dtrain.block.split_backward import SplitBackward
from dtrain.objectives.base import ExecutionMode
from dtrain.planning.block_factory import (
    assemble_block,
    layer_source,
    make_block,
    optimizer_factory,
)
from dtrain.planning.block_memory import (
    BlockFactory,
    BlockMemory,
    measure_block_memory,
    peak_live_bytes,
)
from dtrain.planning.plan import Plan
from dtrain.schedules.actions import Action
from dtrain.schedules.message_memory import peak_message_bytes
from dtrain.schedules.simulator import Span
from dtrain.schedules.weight_policy import peak_weight_copies

MetaLayers = Sequence[nn.Module | None]
"""A model's layers without memory; None where that cannot be."""


EXTRA_MICRO_BATCHES = 4
"""Micro-batches of an evaluation that fill every credit, beyond those that fill the blocks."""


@final
@dataclass(frozen=True)
class RankMemory:
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


def largest_micro_batch(plan: Plan, replica: int) -> int:
    """Return the rows of a replica's largest micro-batch."""
    size = min(plan.batch_splitter.batch_size, plan.data.train.size)
    batch = plan.batch_splitter.batch(np.arange(size), 0, replica)
    return max(map(len, batch.micro_batch_indices), default=0)


def message_sizes(plan: Plan, rows: int, mode: ExecutionMode = "train") -> list[int]:
    """Return the bytes of one message of every route."""
    return [size for _, size in plan.layout.messages(rows, mode)]


@final
class MemoryPlan:
    """The planned memory of one plan; each number of rows is counted once.

    Attributes
    ----------
    blocks : callable
        Returns what every block holds with micro-batches of so many rows, a list of `Footprint`.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.layout = plan, plan.layout
        self.block_memory = cache(self._measure_blocks)
        self._stage_memory = cache(self._sum_stages)

    def rank_memory(self) -> list[RankMemory]:
        """Return the planned memory of every rank, in rank order."""
        mesh = self.layout.mesh
        rows = [largest_micro_batch(self.plan, replica) for replica in range(mesh.replicas)]
        places = map(mesh.coords, range(mesh.ranks))
        return [self._stage_memory(rows[replica])[stage] for replica, stage in places]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the planned memory of every rank as plain values."""
        rows = []
        for rank, budget in enumerate(self.rank_memory()):
            replica, stage = self.layout.mesh.coords(rank)
            sizes = {f"{part}_bytes": size for part, size in asdict(budget).items()}
            place = {"rank": rank, "replica": replica, "stage": stage}
            rows.append(place | sizes | {"peak_bytes": budget.peak})
        return rows

    def _sum_stages(self, rows: int) -> list[RankMemory]:
        """Return the budget of every stage."""
        blocks, held = dict(enumerate(self.block_memory(rows))), self._message_bytes(rows)
        timeline, sync = self.plan.proof.timeline, self.plan.run.sync.instance
        policy = self.layout.schedule.policy(self.layout.place, self.layout.routes)
        found = []
        for stage, messages in enumerate(held):
            own = [blocks[b] for b in self.layout.blocks_of_stage(stage)]
            actions = [span.action for span in timeline if span.stage == stage]
            shelves = peak_weight_copies(actions, policy)
            found.append(
                RankMemory(
                    parameters=sum(each.parameters for each in own),
                    gradients=sum(each.gradients for each in own),
                    optimizer=0
                    if sync.keeps_no_optimizer_state
                    else sum(each.optimizer for each in own),
                    sync=sync.parameter_copies * sum(each.gradients for each in own),
                    versions=sum(n * blocks[b].gradients for b, n in shelves.items()),
                    live=peak_live_bytes(actions, blocks) + self._head_cache_bytes(stage),
                    messages=messages,
                )
            )
        return found

    def _head_cache_bytes(self, stage: int) -> int:
        """Return what the helpers of a stage keep from update to update."""
        plan, tasks = self.plan, self.layout.block_specs
        rows = -(
            -min(plan.batch_splitter.batch_size, plan.data.train.size) // self.layout.mesh.replicas
        )
        return rows * sum(
            self.layout.objective.cached_bytes_per_sample(tasks[b])
            for b in self.layout.blocks_of_stage(stage)
        )

    def _message_bytes(self, rows: int) -> list[int]:
        """Return the messages of every stage: the more of training and of evaluation."""
        plan, place = self.plan, self.layout.place
        learnt = peak_message_bytes(
            plan.proof.timeline, place, self.layout.routes, message_sizes(plan, rows)
        )
        count = math.ceil(
            plan.data.test.size
            / plan.layout.mesh.replicas
            / plan.batch_splitter.largest_micro_batch
        )
        seen = [
            Span(stage, micro + block, micro + block + 1, Action("F", block, 0, micro))
            for micro in range(min(count, len(place) + EXTRA_MICRO_BATCHES))
            for block, stage in enumerate(place)
        ]
        routes = self.layout.objective.routes(len(place), "predict")
        told = peak_message_bytes(
            seen,
            place,
            routes,
            message_sizes(plan, plan.batch_splitter.largest_micro_batch, "predict"),
        )
        return [max(pair) for pair in zip(learnt, told, strict=True)]

    def _measure_blocks(self, rows: int) -> list[BlockMemory]:
        layout, step = self.layout, optimizer_factory(self.plan.run)
        skeletons = layout.model.meta_layers(layout.dtype)
        found = []
        for index in range(len(layout.block_layouts)):
            real, fake = partial(self._real_block, index), self._fake_factory(index, skeletons)
            objective, tasks = layout.objective, layout.block_specs
            found.append(measure_block_memory(real, fake, step, objective, tasks, index, rows))
        return found

    def _real_block(self, index: int) -> Block:
        """Return a block as a run makes it."""
        return self._attach_split(
            make_block(self.plan.run, self.layout, index, torch.device("cpu"))
        )

    def _fake_factory(self, index: int, meta_layers: MetaLayers) -> BlockFactory | None:
        """Return what makes a block of fake tensors, None where a layer has no skeleton."""
        layout, part = self.layout, self.layout.block_layouts[index]
        model, indices = layer_source(layout, index)
        made = (
            meta_layers
            if part.replacement_layers is None
            else part.replacement_layers.meta_layers(layout.dtype)
        )
        layers = {model.names[i]: layer for i in indices if (layer := made[i]) is not None}
        with torch.device("meta"):
            helper = layout.objective.build_head(part.spec)
        if helper is not None:
            helper = helper.to(part.spec.dtype)
        return (
            partial(self._fake_block, index, layers, helper)
            if len(layers) == len(indices)
            else None
        )

    def _fake_block(
        self, index: int, layers: Mapping[str, nn.Module], head: nn.Module | None
    ) -> Block:
        """Return a block of such tensors as are made now: those of a CPU, without memory."""
        faked = {name: layer.to_empty(device="cpu") for name, layer in layers.items()}
        head = None if head is None else head.to_empty(device="cpu")
        return self._attach_split(assemble_block(self.plan.run, self.layout, index, faked, head))

    def _attach_split(self, block: Block) -> Block:
        """Return a block as the engine has it when it starts."""
        if self.layout.schedule.splits_backward:
            block.split_backward = SplitBackward(block.roots.values())
        return block
