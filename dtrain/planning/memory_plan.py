"""Planned memory of every rank, known before any tensor exists.

Invariant: a plan counts the same parts as a run does for `peak_memory_bytes`, so that the two can
be compared.

::

    rank    parameters | gradients | optimizer | sync | versions | live | messages | checkpoint
                                                  |      |         |      |          `- copies for
                                                  |      |         |      |    asynchronous saves
                                                  |      |         |      `- posted receives,
                                                  |      |         |         sends in flight
                                                  |      |         `- x, y, saved tensors
                                                  |      `- copies of weights for delayed backwards
                                                  `- copies of the trained parameters
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import nn

from dtrain.block.block import Block
from dtrain.block.split_backward import SplitBackward
from dtrain.models.layers import merge_layers
from dtrain.models.small_modules import MAX_MACS, has_hidden_memory, is_small
from dtrain.objectives.base import ExecutionMode
from dtrain.objectives.messages import all_routes
from dtrain.planning.block_costs import build_meta_head
from dtrain.planning.block_factory import (
    assemble_block,
    layer_source,
    make_block,
)
from dtrain.planning.block_memory import (
    BlockMemory,
    measure_block_memory,
    peak_live_bytes,
)
from dtrain.planning.lazy_modules import is_lazy
from dtrain.planning.plan import Plan
from dtrain.planning.structure_cache import StructureCache, layers_key
from dtrain.schedules.actions import Action
from dtrain.schedules.message_memory import peak_message_bytes
from dtrain.schedules.simulator import Span
from dtrain.schedules.stream_replay import StreamReplay
from dtrain.schedules.update_lags import peak_kept_gradients
from dtrain.schedules.weight_policy import peak_weight_copies

MetaLayers = Sequence[dict[str, nn.Module] | None]
"""The modules of a model's layers on the meta device; None where a layer cannot be made there."""


EXTRA_MICRO_BATCHES = 4
"""Micro-batches of an evaluation that use every credit, besides one per block."""


_BLOCK_MEMORY: StructureCache[tuple[BlockMemory, ...]] = StructureCache()
"""Memory of a layout's blocks by everything that decides it."""


@final
@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its peak.

    Attributes
    ----------
    parameters, gradients, optimizer : int
        Of its blocks, buffers and heads included; of tied parameters also the gradients that are
        kept for later updates.
    sync : int
        Copies of the trained parameters that the sync and `[ema]` keep.
    versions : int
        Copies of weights for forwards and delayed backwards.
    live : int
        Micro-batches between forward and backward, and tensors that heads cache from update to
        update.
    messages : int
        Posted receives, and sends in flight.
    checkpoint : int
        Copies of what an asynchronous checkpoint saves, from the first one on.
    """

    parameters: int
    gradients: int
    optimizer: int
    sync: int
    versions: int
    live: int
    messages: int
    checkpoint: int = 0

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        memory = self.parameters + self.gradients + self.optimizer + self.sync
        return memory + self.versions + self.live + self.messages + self.checkpoint


class ReplicaRows(NamedTuple):
    """Numbers of samples on which the memory of a replica depends.

    Attributes
    ----------
    update, micro_batch : int
        Samples of an update, and of its largest micro-batch.
    evaluated : int
        Micro-batches of the largest split that is evaluated.
    """

    update: int
    micro_batch: int
    evaluated: int


def replica_rows(plan: Plan, replica: int) -> ReplicaRows:
    """Return the numbers of samples on which the memory of a replica depends."""
    splitter, splits = plan.batch_splitter, plan.data.by_name().items()
    size = min(splitter.batch_size, plan.data.train.size)
    batch = splitter.batch(np.arange(size), 0, replica)
    evaluated = max(split.size for name, split in splits if name != "train")
    return ReplicaRows(
        update=splitter.part(size, replica),
        micro_batch=max(map(len, batch.micro_batch_indices), default=0),
        evaluated=math.ceil(splitter.part(evaluated, replica) / splitter.largest_micro_batch),
    )


def message_sizes(plan: Plan, rows: int, mode: ExecutionMode = "train") -> list[int]:
    """Return the bytes of one message on every route, for micro-batches of `rows` samples."""
    return [size for _, size in plan.layout.messages(rows, mode)]


@final
class MemoryPlan:
    """The planned memory of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.layout = plan.layout
        self._stage_memory = cache(self._sum_stages)
        self._measured_blocks = cache(self._measure_blocks)

    def block_memory(self, rows: int) -> tuple[BlockMemory, ...]:
        """Return the memory of every block, for micro-batches of `rows` samples.

        Raises
        ------
        Exception
            The exception of a layer or objective that fails on zeros.
        """
        return _BLOCK_MEMORY.get(self._block_key(rows), partial(self._measured_blocks, rows))

    def rank_memory(self) -> list[RankMemory]:
        """Return the planned memory of every rank, in rank order."""
        mesh = self.layout.mesh
        rows = [replica_rows(self.plan, replica) for replica in range(mesh.replicas)]
        coords = map(mesh.coords, range(mesh.ranks))
        return [
            self._with_checkpoint(self._stage_memory(rows[replica])[stage], replica)
            for replica, stage in coords
        ]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the planned memory of every rank as plain values."""
        rows, tables = [], dict[RankMemory, dict[str, int]]()
        for rank, memory in enumerate(self.rank_memory()):
            replica, stage = self.layout.mesh.coords(rank)
            if memory not in tables:  # most ranks of a stage need the same
                tables[memory] = {f"{part}_bytes": n for part, n in asdict(memory).items()}
            sizes = tables[memory]
            position = {"rank": rank, "replica": replica, "stage": stage}
            rows.append(position | sizes | {"peak_bytes": memory.peak})
        return rows

    def _with_checkpoint(self, memory: RankMemory, replica: int) -> RankMemory:
        """Add the copies that a rank of this replica keeps for asynchronous checkpoints."""
        traits, run = self.plan.run.sync.instance.traits(), self.plan.run
        if not run.checkpoint.asynchronous or (replica and not traits.replicas_diverge):
            return memory
        keeps_own = traits.replicas_diverge or traits.reparametrises
        weights = (replica == 0) + keeps_own
        own = weights * memory.parameters + memory.optimizer + memory.sync
        return replace(memory, checkpoint=own)

    # ---- stages

    def _sum_stages(self, rows: ReplicaRows) -> list[RankMemory]:
        """Return the memory of every stage of a replica."""
        blocks = dict(enumerate(self.block_memory(rows.micro_batch)))
        timeline, traits = self.plan.proof.timeline, self.plan.run.sync.instance.traits()
        copies_kept = traits.parameter_copies + (self.plan.run.ema is not None)
        policy = self.layout.schedule.policy(self.layout.place, self.layout.routes)
        stage_actions: list[list[Action]] = [[] for _ in range(self.layout.mesh.stages)]
        for span in timeline:
            stage_actions[span.stage].append(span.action)
        stages = []
        for stage, message_bytes in enumerate(self._message_bytes(rows)):
            in_stage = [blocks[b] for b in self.layout.blocks_of_stage(stage)]
            actions = stage_actions[stage]
            copies = peak_weight_copies(actions, policy)
            gradients = sum(block.gradients for block in in_stage)
            optimizer = sum(block.optimizer for block in in_stage)
            stages.append(
                RankMemory(
                    parameters=sum(block.parameters for block in in_stage),
                    gradients=gradients + self._kept_gradient_bytes(actions),
                    optimizer=0 if traits.keeps_no_optimizer_state else optimizer,
                    sync=copies_kept * gradients,
                    versions=sum(n * blocks[b].gradients for b, n in copies.items()),
                    live=peak_live_bytes(actions, blocks)
                    + rows.update * self._head_cache_bytes(stage),
                    messages=message_bytes + self._replay_bytes(stage, rows),
                )
            )
        return stages

    def _kept_gradient_bytes(self, actions: Sequence[Action]) -> int:
        """Return the bytes of the gradients of tied parameters that a rank keeps."""
        cycles = self.layout.tied_cycles
        if cycles is None:
            return 0
        return sum(
            tie.nbytes * peak_kept_gradients(actions, tie.blocks, cycles.lags(tie.blocks))
            for tie in self.layout.ties
        )

    def _head_cache_bytes(self, stage: int) -> int:
        """Return the bytes per sample that the heads of a stage cache from update to update."""
        specs = self.layout.block_specs
        return sum(
            self.layout.objective.cached_bytes_per_sample(specs[b])
            for b in self.layout.blocks_of_stage(stage)
        )

    def _message_bytes(self, rows: ReplicaRows) -> list[int]:
        """Return the message bytes of every stage: the larger of training and evaluation."""
        plan, place = self.plan, self.layout.place
        late = self.layout.late_messages()
        train = peak_message_bytes(
            plan.proof.timeline,
            place,
            (*self.layout.routes, *(route for route, _ in late)),
            [*message_sizes(plan, rows.micro_batch), *(size for _, size in late)],
            update_bytes=() if late else self._exchanged_bytes(),
        )
        largest = plan.batch_splitter.largest_micro_batch
        forwards = [
            Span(stage, micro + block, micro + block + 1, Action("F", block, 0, micro))
            for micro in range(min(rows.evaluated, len(place) + EXTRA_MICRO_BATCHES))
            for block, stage in enumerate(place)
        ]
        routes = all_routes(self.layout.objective, self.layout.block_specs, "predict")
        sizes = message_sizes(plan, largest, "predict")
        predict = peak_message_bytes(forwards, place, routes, sizes)
        return [max(pair) for pair in zip(train, predict, strict=True)]

    def _replay_bytes(self, stage: int, rows: ReplicaRows) -> int:
        """Return the bytes of the inputs that a stage keeps to replay them."""
        layout = self.layout
        if not isinstance(layout.schedule, StreamReplay):
            return 0
        sizes = zip(layout.routes, message_sizes(self.plan, rows.micro_batch), strict=True)
        return layout.schedule.buffer * sum(
            size
            for route, size in sizes
            if layout.place[route.target.block] == stage != layout.place[route.source.block]
        )

    def _exchanged_bytes(self) -> list[int]:
        """Return per stage the bytes of the gradients of tied parameters that it sends and receives
        in an update, all at once."""
        sizes = [0] * self.layout.mesh.stages
        for route, size in self.layout.tied_messages():
            for block in (route.source.block, route.target.block):
                sizes[self.layout.place[block]] += size
        return sizes

    # ---- blocks

    def _block_key(self, rows: int) -> Hashable | None:
        """Return the key of the memory of the blocks, None if it has no key."""
        run, layout = self.plan.run, self.layout
        blocks = layout.block_layouts
        replaced = [block.replacement_layers for block in blocks]
        models = layout.model, *(model for model in replaced if model is not None)
        structures = tuple(map(layers_key, models))
        if None in structures:
            return None
        return (
            structures,
            layout.dtype,
            layout.objective,
            layout.schedule.splits_backward,
            tuple(
                (b.spec, b.layers, b.replacement_layers is None, b.recompute, b.keeps_forward)
                for b in blocks
            ),
            repr(run.optimizer_settings()),
            layout.ties,
            run.settings.seed,  # of a block that is run for real
            rows,
        )

    def _measure_blocks(self, rows: int) -> tuple[BlockMemory, ...]:
        indices = range(len(self.layout.block_layouts))
        return tuple(self._measure_block(index, rows) for index in indices)

    def _measure_block(self, index: int, rows: int) -> BlockMemory:
        layout, parts = self.layout, self._meta_parts(index)
        if parts is not None and has_hidden_memory(*parts):
            parts = None
        return measure_block_memory(
            partial(self._real_block, index),
            None if parts is None else partial(self._fake_block, index, *parts),
            self.plan.run.optimizer_settings(),
            layout.objective,
            layout.block_specs,
            index,
            rows,
            parts is not None and self._is_small(index, rows, *parts),
        )

    def _is_small(
        self, index: int, rows: int, layers: Mapping[str, nn.Module], head: nn.Module | None
    ) -> bool:
        """Return whether a block is a chain of plain modules, with an objective of ours, that
        needs little time and memory."""
        layout = self.layout
        block_layout = layout.block_layouts[index]
        if (
            not type(layout.objective).__module__.startswith("dtrain.")
            or self.plan.run.weights_path is not None
            or block_layout.flow is not None
            or block_layout.cost * rows > MAX_MACS
        ):
            return False
        modules = [*layers.values(), *([] if head is None else [head])]
        return is_small(modules, block_layout.spec.input_shape, rows)

    @cached_property
    def _meta_layers(self) -> MetaLayers:
        return self.layout.model.meta_layers(self.layout.dtype)

    def _real_block(self, index: int) -> Block:
        """Return a block as a run makes it."""
        block = make_block(self.plan.run, self.layout, index, torch.device("cpu"))
        return self._attach_split(block)

    def _meta_parts(self, index: int) -> tuple[dict[str, nn.Module], nn.Module | None] | None:
        """Return layers and head of a block on the meta device, None where a layer cannot be made
        there."""
        layout, replacement = self.layout, self.layout.block_layouts[index].replacement_layers
        _, indices = layer_source(layout, index)
        meta_layers = (
            self._meta_layers if replacement is None else replacement.meta_layers(layout.dtype)
        )
        layers = [layer for i in indices if (layer := meta_layers[i]) is not None]
        head = build_meta_head(layout.objective, layout.block_specs[index])
        modules = [module for layer in layers for module in layer.values()]
        if len(layers) < len(indices) or is_lazy(modules):
            return None
        return merge_layers(layers), head

    def _fake_block(
        self, index: int, layers: Mapping[str, nn.Module], head: nn.Module | None
    ) -> Block:
        """Return a block of new CPU tensors, which are fake inside `FakeTensorMode`."""
        layers = {name: layer.to_empty(device="cpu") for name, layer in layers.items()}
        head = None if head is None else head.to_empty(device="cpu")
        return self._attach_split(assemble_block(self.plan.run, self.layout, index, layers, head))

    def _attach_split(self, block: Block) -> Block:
        """Give a block the split backward that the engine gives it."""
        if self.layout.schedule.splits_backward:
            block.split_backward = SplitBackward(block.roots.values())
        return block
