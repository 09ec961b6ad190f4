"""Estimated time of the first segment of an epoch, by a costs file.

Invariant: the plans of a real run are simulated. Nothing is measured, and equal inputs give equal
estimates.

::

    F   rows x layers' forward         B   rows x (head's forward, all gradients; recomputation)
    U   mean over replicas, then the step          -- message: latency + bytes / rate -->
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple, final

from dtrain.errors import ConfigError, unknown_name
from dtrain.models.shape_inference import LayerProfile
from dtrain.planning.block_costs import profile_head
from dtrain.planning.block_memory import BlockMemory
from dtrain.planning.cost_file import HEADS, INTER_NODE, INTRA_NODE, CostFile, LinkSpeed
from dtrain.planning.layout import BlockLayout
from dtrain.planning.memory_plan import MemoryPlan, message_sizes
from dtrain.planning.plan import Plan
from dtrain.schedules.actions import Route
from dtrain.schedules.cost_model import BlockCost, CostModel, Link
from dtrain.schedules.forecast import Forecast, forecast, timeline
from dtrain.schedules.simulator import Span

MAX_ACTIONS, MIN_UPDATES = 40_000, 8
"""Length of a simulation: at most so many actions of a replica, but at least so many updates."""


DRAWN_MICRO_BATCHES = 40
"""Micro-batches of a drawing, which shows at least three updates."""


def estimate_time(plan: Plan, cost_file: CostFile, memory_plan: MemoryPlan) -> dict[str, Any]:
    """Return the estimated time of the first segment of an epoch, as plain values.

    Every micro-batch costs as much as a full one. Seconds and fractions of a stage are those of the
    replica in which they are largest; messages and bytes are summed over replicas.

    Raises
    ------
    ConfigError
        The costs file names a layer that does not exist, or lacks an entry that this run needs.
    """
    settings, length, layout = plan.run.settings, plan.training_length, plan.layout
    segment = min(length.updates_per_segment, length.updates_per_epoch, length.total_updates)
    actions = 2 * settings.micro_batches * len(layout.block_layouts)
    updates = min(segment, max(MIN_UPDATES, MAX_ACTIONS // actions))
    costs = _RunCosts(plan, cost_file, memory_plan)
    result = forecast(
        layout.schedule,
        layout.place,
        plan.batch_splitter.count_micro_batches(plan.data.train.size, 0, updates),
        layout.routes,
        costs.cost_model(),
        tied_routes=costs.late_routes,
    )
    samples = min(updates * settings.batch_size, plan.data.train.size)
    return {
        "file": str(cost_file.path),
        "segment_updates": segment,
        "updates": updates,
        "samples": samples,
        "makespan_s": result.makespan_s,
        "samples_per_s": samples / result.makespan_s if result.makespan_s else None,
        "bubble": result.bubble,
        "stages": [
            {"stage": stage, "busy_s": busy, "wait_s": wait, "mean_s": costs.mean_s(stage)}
            for stage, (busy, wait) in enumerate(zip(result.busy_s, result.wait_s, strict=True))
        ],
        "links": costs.traffic(result, updates),
    }


def estimate_timeline(plan: Plan, cost_file: CostFile, memory_plan: MemoryPlan) -> list[Span]:
    """Return the actions of the first replica in the first updates of an epoch, in seconds."""
    layout, micro_batches = plan.layout, plan.run.settings.micro_batches
    updates = min(
        plan.training_length.updates_per_segment,
        plan.training_length.updates_per_epoch,
        max(3, DRAWN_MICRO_BATCHES // micro_batches),
    )
    sizes = plan.batch_splitter.count_micro_batches(plan.data.train.size, 0, updates)
    costs = _RunCosts(plan, cost_file, memory_plan)
    return timeline(
        layout.schedule,
        layout.place,
        sizes,
        layout.routes,
        costs.cost_model(),
        tied_routes=costs.late_routes,
    )


class _Seconds(NamedTuple):
    """Seconds of one sample in one module; `skippable` of those of the input gradient."""

    forward: float
    input_gradient: float
    weight_gradient: float
    skippable: float


@final
class _RunCosts:
    """Seconds of one run's actions and messages by one costs file."""

    def __init__(self, plan: Plan, cost_file: CostFile, memory_plan: MemoryPlan) -> None:
        self.plan = plan
        self.cost_file = cost_file
        self.layout = plan.layout
        self.rows = plan.batch_splitter.largest_micro_batch
        self.ranks_per_node = cost_file.rank_speed.ranks_per_node or self.layout.mesh.ranks
        self._check_layer_names()
        self.block_memory = memory_plan.block_memory(self.rows)
        self.parameter_count = sum(
            block.parameters + block.head_parameters for block in self.layout.block_layouts
        )

    def _check_layer_names(self) -> None:
        """Refuse a table of a layer that the run does not have."""
        replaced = (block.replacement_layers for block in self.layout.block_layouts)
        names = [spec.name for spec in self.layout.layer_specs]
        names += [name for model in replaced if model is not None for name in model.names]
        legal_names = [*names, HEADS]
        for name in self.cost_file.layers:
            if name not in legal_names:
                error = unknown_name("layer in [layers.*]", name, legal_names)
                raise self._error("costs-file.unknown-layer", error.message)

    @property
    def late_routes(self) -> list[Route]:
        """The routes of tied parameters that run beside the pipeline."""
        return [route for route, _ in self.layout.late_messages()]

    def cost_model(self) -> CostModel:
        """Return the costs that the simulator adds up."""
        blocks = tuple(map(self._block_cost, self.layout.block_layouts, self.block_memory))
        late_sizes = [size for _, size in self.layout.late_messages()]
        sizes = [*message_sizes(self.plan, self.rows), *late_sizes]
        return CostModel(blocks, sizes, self._link)

    # ---- ranks

    def _block_cost(self, block: BlockLayout, memory: BlockMemory) -> BlockCost:
        """Return the seconds of one block. The head runs in the backward, forward included."""
        forward, input_gradient, weight_gradient = self._layer_seconds(block)
        head = self._head_seconds(block)
        recomputed = forward * (block.recompute + block.spec.rebuilds_input)
        return BlockCost(
            forward_s=self.rows * forward,
            input_gradient_s=self.rows
            * (input_gradient + head.forward + head.input_gradient + recomputed),
            weight_gradient_s=self.rows * (weight_gradient + head.weight_gradient),
            update_s=self._update_s(block, memory),
            sync_s=self._block_mean_s(memory, self.layout.place[block.spec.index])
            + self._exchange_s(block.spec.index),
            live_bytes=memory.activations + memory.backward,
            fixed_bytes=memory.parameters + memory.gradients + memory.optimizer,
        )

    def _layer_seconds(self, block: BlockLayout) -> tuple[float, float, float]:
        """Return the seconds of a block's layers: forward, input and weight gradients.

        Input gradients that no layer with parameters and no message needs are left out.
        """
        forward = input_gradient = weight_gradient = 0.0
        is_needed = self.layout.needs_input_gradient(block.spec.index)
        for spec in block.layer_specs:
            seconds = self._module_seconds(spec, spec.name)
            forward += seconds.forward
            input_gradient += seconds.input_gradient - (0 if is_needed else seconds.skippable)
            weight_gradient += seconds.weight_gradient
            is_needed = is_needed or spec.parameters > 0
        return forward, input_gradient, weight_gradient

    def _head_seconds(self, block: BlockLayout) -> _Seconds:
        objective = self.layout.objective
        head = profile_head(objective, block.spec)
        if head is None or objective.head_input_shape(block.spec) is None:
            return _Seconds(0.0, 0.0, 0.0, 0.0)
        return self._module_seconds(head, HEADS)

    def _module_seconds(self, spec: LayerProfile, name: str) -> _Seconds:
        """Return the seconds of a module by its table, else by its multiply-adds."""
        times, rate = self.cost_file.layers.get(name), self.cost_file.rank_speed.multiply_adds_per_s
        macs = _Seconds(
            spec.forward_macs,
            spec.input_gradient_macs,
            spec.weight_gradient_macs,
            spec.skippable_macs,
        )
        if times is None:
            if rate is None and any(macs):
                raise self._error(
                    "costs-file.layer-without-seconds",
                    f"layer '{name}' has no seconds: give [layers.{name}], or multiply-adds-per-s",
                )
            return _Seconds(*(count / (rate or 1) for count in macs))
        both = spec.input_gradient_macs + spec.weight_gradient_macs
        fraction = spec.input_gradient_macs / both if both else 0.5 if spec.parameters else 1.0
        skippable = spec.skippable_macs / both if both else fraction
        backward = times.backward_s
        return _Seconds(
            times.forward_s, backward * fraction, backward * (1 - fraction), backward * skippable
        )

    def _update_s(self, block: BlockLayout, memory: BlockMemory) -> float:
        """Return the seconds of a block's optimizer step.

        With `update-s` it is the block's fraction by parameters. Without, one multiply-add per
        element of parameters, gradients and optimizer state.
        """
        speed = self.cost_file.rank_speed
        if speed.update_s is not None:
            elements = block.parameters + block.head_parameters
            return speed.update_s * elements / self.parameter_count if self.parameter_count else 0.0
        total_bytes = memory.parameters + memory.gradients + memory.optimizer
        return total_bytes / self.layout.dtype.itemsize / (speed.multiply_adds_per_s or math.inf)

    # ---- links

    def _link(self, source: int, target: int) -> Link:
        """Return the link between two stages: the slower kind, where replicas differ."""
        if source == target:
            return Link()
        kinds = {self._link_kind(r, source, target) for r in range(self.layout.mesh.replicas)}
        speed = self._link_speed(INTER_NODE if INTER_NODE in kinds else INTRA_NODE)
        return Link(f"{source} {target}", speed.latency_s, speed.bytes_per_s)

    def _link_kind(self, replica: int, source: int, target: int) -> str:
        nodes = {self.layout.mesh.rank(replica, s) // self.ranks_per_node for s in (source, target)}
        return INTRA_NODE if len(nodes) == 1 else INTER_NODE

    def _link_speed(self, kind: str) -> LinkSpeed:
        if kind not in self.cost_file.links:
            ranks = self.layout.mesh.ranks
            nodes = -(-ranks // self.ranks_per_node)
            raise self._error(
                "costs-file.link-missing",
                f"[links.{kind}] is missing, and {ranks} ranks on {nodes} "
                f"{'node' if nodes == 1 else 'nodes'} send along it: give its bytes-per-s",
            )
        return self.cost_file.links[kind]

    def mean_s(self, stage: int) -> float:
        """Return the seconds per update of a stage's gradient mean over replicas."""
        return sum(
            self._block_mean_s(self.block_memory[b], stage)
            for b in self.layout.blocks_of_stage(stage)
        )

    def _block_mean_s(self, memory: BlockMemory, stage: int) -> float:
        """Return the seconds per update of the mean of a block's gradients.

        It runs among the replicas of a node, then among nodes. Each costs 2 (n - 1) / n of the
        bytes and two latencies (reduce-scatter, all-gather), none of it overlapped (Thakur et al.
        2005, "Optimization of Collective Communication Operations in MPICH").
        """
        mesh, means_per_update = self.layout.mesh, self.plan.run.sync.instance.communication_cost()
        nodes = Counter(mesh.rank(r, stage) // self.ranks_per_node for r in range(mesh.replicas))
        sizes = max(nodes.values()), len(nodes)
        seconds = 0.0
        for kind, n, means in zip((INTRA_NODE, INTER_NODE), sizes, means_per_update, strict=True):
            if n > 1 and means:
                speed = self._link_speed(kind)
                transfer_s = 2 * (n - 1) / n * memory.gradients / speed.bytes_per_s
                seconds += means * (transfer_s + 2 * speed.latency_s)
        return seconds

    def _exchange_s(self, block: int) -> float:
        """Return the seconds in which a block receives the gradients of tied parameters before its
        update, where the pipeline flushes."""
        seconds = 0.0
        for route, size in self._exchanged_messages():
            if route.target.block == block:
                link = self._link(*self._stages(route))
                seconds += link.latency_s + size / link.bytes_per_s
        return seconds

    def _exchanged_messages(self) -> list[tuple[Route, int]]:
        """Return the messages of tied parameters that the simulation does not have."""
        return [] if self.late_routes else list(self.layout.tied_messages())

    def _stages(self, route: Route) -> tuple[int, int]:
        return self.layout.place[route.source.block], self.layout.place[route.target.block]

    def traffic(self, result: Forecast, updates: int) -> dict[str, dict[str, int]]:
        """Return messages and bytes of all replicas in so many updates, by the kind of link."""
        totals = {kind: {"messages": 0, "bytes": 0} for kind in (INTRA_NODE, INTER_NODE)}

        def add(source: int, target: int, messages: int, size: int) -> None:
            for replica in range(self.layout.mesh.replicas):
                total = totals[self._link_kind(replica, source, target)]
                total["messages"] += messages
                total["bytes"] += size

        for stages, count in result.messages.items():
            source, target = map(int, stages.split())
            add(source, target, count, result.message_bytes[stages])
        for route, size in self.layout.tied_messages():
            # The simulation lacks messages that no step of these updates applies.
            missing = min(route.lag, updates) if self.late_routes else updates
            add(*self._stages(route), missing, missing * size)
        return totals

    def _error(self, key: str, message: str) -> ConfigError:
        return ConfigError(key, f"{self.cost_file.path}: {message}")
