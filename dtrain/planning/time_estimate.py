"""Predicted time: what the first segment of an epoch takes by a costs file.

Invariant: the plans that would run, simulated; nothing is measured, and equal inputs give equal
predictions.

::

    F   rows x layers' forward         B   rows x (head's forward, all gradients; recomputation)
    U   mean over replicas, then the step          -- message: latency + bytes / rate -->
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, final

import torch

from dtrain.errors import ConfigError, DtrainError, unknown_name
from dtrain.models.shape_inference import LayerSpec, infer_layers, profile_module
from dtrain.objectives.base import GRADIENT
from dtrain.planning.block_memory import BlockMemory
from dtrain.planning.cost_file import HEADS, INTER_NODE, INTRA_NODE, CostFile, LinkSpeed
from dtrain.planning.layout import BlockLayout
from dtrain.planning.memory import MemoryPlan, message_sizes
from dtrain.planning.plan import Plan
from dtrain.schedules.cost_model import BlockCost, CostModel, Link
from dtrain.schedules.forecast import Forecast, forecast, timeline
from dtrain.schedules.simulator import Span

MAX_ACTIONS, MIN_UPDATES = 40_000, 8
"""What is simulated of a long segment: so many actions of a replica, and so many updates."""


DRAWN_MICRO_BATCHES = 40
"""Micro-batches of a picture, in at least three updates."""


def estimate_time(plan: Plan, cost_file: CostFile, memory_plan: MemoryPlan) -> dict[str, Any]:
    """Return what the first segment of an epoch takes, as plain values.

    Every micro-batch costs what a full one costs. Seconds and shares of a stage are those of the
    replica that has most of it; messages and bytes are those of all replicas.

    Raises
    ------
    DtrainError
        The costs file names a layer that is not there, or lacks what this run needs.
    """
    top, calendar, layout = plan.run.settings, plan.training_length, plan.layout
    segment = min(calendar.updates_per_segment, calendar.updates_per_epoch, calendar.total_updates)
    actions = 2 * top.micro_batches * len(layout.block_layouts)
    updates = min(segment, max(MIN_UPDATES, MAX_ACTIONS // actions))
    rates = _RunCosts(plan, cost_file, memory_plan)
    seen = forecast(
        layout.schedule,
        layout.place,
        plan.batch_splitter.count_micro_batches(plan.data.train.size, 0, updates),
        layout.routes,
        rates.cost_model(),
    )
    samples = min(updates * top.batch_size, plan.data.train.size)
    return {
        "file": str(cost_file.path),
        "segment_updates": segment,
        "updates": updates,
        "samples": samples,
        "makespan_s": seen.makespan_s,
        "samples_per_s": samples / seen.makespan_s if seen.makespan_s else None,
        "bubble": seen.bubble,
        "stages": [
            {"stage": stage, "busy_s": busy, "wait_s": wait, "mean_s": rates.mean_s(stage)}
            for stage, (busy, wait) in enumerate(zip(seen.busy_s, seen.wait_s, strict=True))
        ],
        "links": rates.traffic(seen),
    }


def estimate_timeline(plan: Plan, cost_file: CostFile, memory_plan: MemoryPlan) -> list[Span]:
    """Return what the first replica does when, in the first updates of an epoch, in seconds."""
    layout, each = plan.layout, plan.run.settings.micro_batches
    updates = min(
        plan.training_length.updates_per_segment,
        plan.training_length.updates_per_epoch,
        max(3, DRAWN_MICRO_BATCHES // each),
    )
    sizes = plan.batch_splitter.count_micro_batches(plan.data.train.size, 0, updates)
    costs = _RunCosts(plan, cost_file, memory_plan).cost_model()
    return timeline(layout.schedule, layout.place, sizes, layout.routes, costs)


@final
class _RunCosts:
    """What one run costs by one file."""

    def __init__(self, plan: Plan, cost_file: CostFile, memory_plan: MemoryPlan) -> None:
        self.plan, self.cost_file, self.layout = plan, cost_file, plan.layout
        self.rows = plan.batch_splitter.largest_micro_batch
        self.ranks_per_node = cost_file.rank_speed.ranks_per_node or self.layout.mesh.ranks
        own = (
            n
            for part in self.layout.block_layouts
            if part.replacement_layers
            for n in part.replacement_layers.names
        )
        legal = [*(spec.name for spec in self.layout.layer_specs), *own, HEADS]
        for name in cost_file.layers:
            if name not in legal:
                raise self._file_error(unknown_name("layer in [layers.*]", name, legal).message)
        self.block_memory = memory_plan.block_memory(self.rows)
        self.parameter_count = sum(
            part.parameters + part.head_parameters for part in self.layout.block_layouts
        )

    def cost_model(self) -> CostModel:
        """Return what the simulator needs."""
        prices = tuple(map(self._block_cost, self.layout.block_layouts, self.block_memory))
        return CostModel(prices, message_sizes(self.plan, self.rows), self._link)

    # ---- ranks

    def _block_cost(self, block: BlockLayout, memory: BlockMemory) -> BlockCost:
        """Return the seconds of one block, the head's forward among those of its learning."""
        forward, into, weights = map(sum, zip(*self._layer_seconds(block), strict=True))
        head, head_into, head_weights, _ = self._head_seconds(block)
        chosen = self.plan.run.partition.recompute
        again = chosen if isinstance(chosen, bool) else block.spec.index in chosen
        return BlockCost(
            forward_s=self.rows * forward,
            input_gradient_s=self.rows * (into + head + head_into + forward * again),
            weight_gradient_s=self.rows * (weights + head_weights),
            update_s=self._update_s(block, memory),
            sync_s=self._block_mean_s(memory, self.layout.place[block.spec.index]),
            live_bytes=memory.activations + memory.backward,
            fixed_bytes=memory.parameters + memory.gradients + memory.optimizer,
        )

    def _layer_seconds(self, block: BlockLayout) -> list[tuple[float, float, float]]:
        """Return the seconds of each layer: forward, gradients of the input and of the weights.

        Where nobody asks for the gradient of the block's input, what leads to it is left out.
        """
        specs = [self.layout.layer_specs[i] for i in block.layers]
        if block.replacement_layers is not None:
            fed = self.layout.objective.block_input_shape(block.spec)
            specs = list(
                infer_layers(block.replacement_layers, fed, self.layout.layer_specs[0].dtype)
            )
        asked = any(
            r.name == GRADIENT and r.source.block == block.spec.index for r in self.layout.routes
        )
        found = []
        for spec in specs:
            forward, into, weights, unasked = self._module_seconds(spec, spec.name)
            found.append((forward, into - (0 if asked else unasked), weights))
            asked = asked or spec.parameters > 0
        return found

    def _head_seconds(self, block: BlockLayout) -> tuple[float, float, float, float]:
        objective, task = self.layout.objective, block.spec
        with torch.device("meta"):
            helper = objective.build_head(task)
        shape = objective.head_input_shape(task)
        if helper is None or shape is None:
            return 0.0, 0.0, 0.0, 0.0
        return self._module_seconds(profile_module(helper.to(task.dtype), shape, task.dtype), HEADS)

    def _module_seconds(self, spec: LayerSpec, name: str) -> tuple[float, float, float, float]:
        """Return the seconds of one sample: forward, both gradients, and what nobody may ask."""
        counts = (
            spec.forward_macs,
            spec.input_gradient_macs,
            spec.weight_gradient_macs,
            spec.skippable_macs,
        )
        times, rate = self.cost_file.layers.get(name), self.cost_file.rank_speed.multiply_adds_per_s
        if times is None:
            if rate is None and any(counts):
                raise self._file_error(
                    f"layer '{name}' has no seconds: give [layers.{name}], or multiply-adds-per-s"
                )
            forward, into, weights, unasked = (count / (rate or 1) for count in counts)
            return forward, into, weights, unasked
        both = spec.input_gradient_macs + spec.weight_gradient_macs
        share = spec.input_gradient_macs / both if both else 0.5 if spec.parameters else 1.0
        left = spec.skippable_macs / both if both else share
        back = times.backward_s
        return times.forward_s, back * share, back * (1 - share), back * left

    def _update_s(self, block: BlockLayout, memory: BlockMemory) -> float:
        """Return the seconds of a block's step: its share of the model's, or one multiply-add for
        each element of parameters, gradients and optimizer state."""
        pace = self.cost_file.rank_speed
        if pace.update_s is not None:
            own = block.parameters + block.head_parameters
            return pace.update_s * own / self.parameter_count if self.parameter_count else 0.0
        held = memory.parameters + memory.gradients + memory.optimizer
        return held / self.layout.dtype.itemsize / (pace.multiply_adds_per_s or math.inf)

    # ---- links

    def _link(self, source: int, target: int) -> Link:
        """Return the link between two stages: the slower kind, where replicas differ."""
        if source == target:
            return Link()
        kinds = {self._link_kind(r, source, target) for r in range(self.layout.mesh.replicas)}
        cable = self._link_speed(INTER_NODE if INTER_NODE in kinds else INTRA_NODE)
        return Link(f"{source} {target}", cable.latency_s, cable.bytes_per_s)

    def _link_kind(self, replica: int, source: int, target: int) -> str:
        nodes = {self.layout.mesh.rank(replica, s) // self.ranks_per_node for s in (source, target)}
        return INTRA_NODE if len(nodes) == 1 else INTER_NODE

    def _link_speed(self, kind: str) -> LinkSpeed:
        if kind not in self.cost_file.links:
            ranks = self.layout.mesh.ranks
            nodes = -(-ranks // self.ranks_per_node)
            raise self._file_error(
                f"[links.{kind}] is missing, and {ranks} ranks on {nodes} "
                f"{'node' if nodes == 1 else 'nodes'} send along it: give its bytes-per-s"
            )
        return self.cost_file.links[kind]

    def mean_s(self, stage: int) -> float:
        """Return the seconds that a stage spends per update on the mean over replicas."""
        return sum(
            self._block_mean_s(self.block_memory[b], stage)
            for b in self.layout.blocks_of_stage(stage)
        )

    def _block_mean_s(self, memory: BlockMemory, stage: int) -> float:
        """Return the seconds of a mean of a block's gradients: among the replicas of a node, then
        among nodes, each 2 (n - 1) / n of the bytes and two latencies (reduce-scatter, all-gather;
        nothing of it hidden; Thakur et al. 2005, "Optimization of Collective Communication
        Operations in MPICH")."""
        mesh, often = self.layout.mesh, self.plan.run.make_sync().communication_cost()
        nodes = Counter(mesh.rank(r, stage) // self.ranks_per_node for r in range(mesh.replicas))
        seconds = 0.0
        for kind, n, means in zip(
            (INTRA_NODE, INTER_NODE), (max(nodes.values()), len(nodes)), often, strict=True
        ):
            if n > 1 and means:
                cable = self._link_speed(kind)
                once = 2 * (n - 1) / n * memory.gradients / cable.bytes_per_s + 2 * cable.latency_s
                seconds += means * once
        return seconds

    def traffic(self, prediction: Forecast) -> dict[str, dict[str, int]]:
        """Return messages and bytes of all replicas, by the kind of link."""
        found = {kind: {"messages": 0, "bytes": 0} for kind in (INTRA_NODE, INTER_NODE)}
        for pair, count in prediction.messages.items():
            source, target = map(int, pair.split())
            for replica in range(self.layout.mesh.replicas):
                row = found[self._link_kind(replica, source, target)]
                row["messages"] += count
                row["bytes"] += prediction.message_bytes[pair]
        return found

    def _file_error(self, message: str) -> DtrainError:
        return ConfigError("todo.key", f"{self.cost_file.path}: {message}")
