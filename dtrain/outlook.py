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

from dtrain import models
from dtrain.budget import Books, payload
from dtrain.costs import FAR, HEADS, NEAR, Cable, Sheet
from dtrain.errors import Refusal, unknown
from dtrain.footprint import Footprint
from dtrain.job import Plan
from dtrain.layout import Part
from dtrain.models import Spec
from dtrain.objectives.objective import GRADIENT
from dtrain.schedules.costs import Costs, Link, Price
from dtrain.schedules.forecast import Forecast, forecast, timeline
from dtrain.schedules.simulate import Span

MOST_ACTIONS, LEAST_UPDATES = 40_000, 8
"""What is simulated of a long segment: so many actions of a replica, and so many updates."""


DRAWN_MICROS = 40
"""Micro-batches of a picture, in at least three updates."""


def predict(plan: Plan, sheet: Sheet, books: Books) -> dict[str, Any]:
    """Return what the first segment of an epoch takes, as plain values.

    Every micro-batch costs what a full one costs. Seconds and shares of a stage are those of the
    replica that has most of it; messages and bytes are those of all replicas.

    Raises
    ------
    Refusal
        The costs file names a layer that is not there, or lacks what this run needs.
    """
    top, calendar, layout = plan.run.top, plan.calendar, plan.layout
    segment = min(calendar.step, calendar.per_epoch, calendar.total)
    actions = 2 * top.micro_batches * len(layout.parts)
    updates = min(segment, max(LEAST_UPDATES, MOST_ACTIONS // actions))
    rates = _Rates(plan, sheet, books)
    seen = forecast(
        layout.schedule,
        layout.place,
        plan.shares.sizes(plan.data.train.size, 0, updates),
        layout.routes,
        rates.costs(),
    )
    samples = min(updates * top.batch_size, plan.data.train.size)
    return {
        "file": str(sheet.path),
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


def expected(plan: Plan, sheet: Sheet, books: Books) -> list[Span]:
    """Return what the first replica does when, in the first updates of an epoch, in seconds."""
    layout, each = plan.layout, plan.run.top.micro_batches
    updates = min(plan.calendar.step, plan.calendar.per_epoch, max(3, DRAWN_MICROS // each))
    sizes = plan.shares.sizes(plan.data.train.size, 0, updates)
    costs = _Rates(plan, sheet, books).costs()
    return timeline(layout.schedule, layout.place, sizes, layout.routes, costs)


@final
class _Rates:
    """What one run costs by one file."""

    def __init__(self, plan: Plan, sheet: Sheet, books: Books) -> None:
        self.plan, self.sheet, self.layout = plan, sheet, plan.layout
        self.rows = plan.shares.largest
        self.per_node = sheet.pace.ranks_per_node or self.layout.mesh.ranks
        own = (n for part in self.layout.parts if part.own for n in part.own.names)
        legal = [*(spec.name for spec in self.layout.specs), *own, HEADS]
        for name in sheet.layers:
            if name not in legal:
                raise self._lacks(unknown("layer in [layers.*]", name, legal).message)
        self.foot = books.blocks(self.rows)
        self.elements = sum(part.parameters + part.head_parameters for part in self.layout.parts)

    def costs(self) -> Costs:
        """Return what the simulator needs."""
        prices = tuple(map(self._price, self.layout.parts, self.foot))
        return Costs(prices, payload(self.plan, self.rows), self._link)

    # ---- ranks

    def _price(self, part: Part, foot: Footprint) -> Price:
        """Return the seconds of one block, the head's forward among those of its learning."""
        forward, into, weights = map(sum, zip(*self._layers(part), strict=True))
        head, head_into, head_weights, _ = self._head(part)
        chosen = self.plan.run.partition.recompute
        again = chosen if isinstance(chosen, bool) else part.task.block in chosen
        return Price(
            forward_s=self.rows * forward,
            input_gradient_s=self.rows * (into + head + head_into + forward * again),
            weight_gradient_s=self.rows * (weights + head_weights),
            update_s=self._update_s(part, foot),
            meet_s=self._mean_s(foot, self.layout.place[part.task.block]),
            live_bytes=foot.kept + foot.learning,
            fixed_bytes=foot.parameters + foot.gradients + foot.optimizer,
        )

    def _layers(self, part: Part) -> list[tuple[float, float, float]]:
        """Return the seconds of each layer: forward, gradients of the input and of the weights.

        Where nobody asks for the gradient of the block's input, what leads to it is left out.
        """
        specs = [self.layout.specs[i] for i in part.layers]
        if part.own is not None:
            fed = self.layout.objective.fed(part.task)
            specs = list(models.walk(part.own, fed, self.layout.specs[0].dtype))
        asked = any(
            r.name == GRADIENT and r.source.block == part.task.block for r in self.layout.routes
        )
        found = []
        for spec in specs:
            forward, into, weights, unasked = self._seconds(spec, spec.name)
            found.append((forward, into - (0 if asked else unasked), weights))
            asked = asked or spec.parameters > 0
        return found

    def _head(self, part: Part) -> tuple[float, float, float, float]:
        objective, task = self.layout.objective, part.task
        with torch.device("meta"):
            helper = objective.build(task)
        shape = objective.helped(task)
        if helper is None or shape is None:
            return 0.0, 0.0, 0.0, 0.0
        return self._seconds(models.count(helper.to(task.dtype), shape, task.dtype), HEADS)

    def _seconds(self, spec: Spec, name: str) -> tuple[float, float, float, float]:
        """Return the seconds of one sample: forward, both gradients, and what nobody may ask."""
        counts = spec.forward, spec.input_gradient, spec.weight_gradient, spec.unasked
        times, rate = self.sheet.layers.get(name), self.sheet.pace.multiply_adds_per_s
        if times is None:
            if rate is None and any(counts):
                raise self._lacks(
                    f"layer '{name}' has no seconds: give [layers.{name}], or multiply-adds-per-s"
                )
            forward, into, weights, unasked = (count / (rate or 1) for count in counts)
            return forward, into, weights, unasked
        both = spec.input_gradient + spec.weight_gradient
        share = spec.input_gradient / both if both else 0.5 if spec.parameters else 1.0
        left = spec.unasked / both if both else share
        back = times.backward_s
        return times.forward_s, back * share, back * (1 - share), back * left

    def _update_s(self, part: Part, foot: Footprint) -> float:
        """Return the seconds of a block's step: its share of the model's, or one multiply-add for
        each element of parameters, gradients and optimizer state."""
        pace = self.sheet.pace
        if pace.update_s is not None:
            own = part.parameters + part.head_parameters
            return pace.update_s * own / self.elements if self.elements else 0.0
        held = foot.parameters + foot.gradients + foot.optimizer
        return held / self.layout.dtype.itemsize / (pace.multiply_adds_per_s or math.inf)

    # ---- links

    def _link(self, source: int, target: int) -> Link:
        """Return the link between two stages: the slower kind, where replicas differ."""
        if source == target:
            return Link()
        kinds = {self._kind(r, source, target) for r in range(self.layout.mesh.replicas)}
        cable = self._cable(FAR if FAR in kinds else NEAR)
        return Link(f"{source} {target}", cable.latency_s, cable.bytes_per_s)

    def _kind(self, replica: int, source: int, target: int) -> str:
        nodes = {self.layout.mesh.rank(replica, s) // self.per_node for s in (source, target)}
        return NEAR if len(nodes) == 1 else FAR

    def _cable(self, kind: str) -> Cable:
        if kind not in self.sheet.links:
            ranks = self.layout.mesh.ranks
            nodes = -(-ranks // self.per_node)
            raise self._lacks(
                f"[links.{kind}] is missing, and {ranks} ranks on {nodes} "
                f"{'node' if nodes == 1 else 'nodes'} send along it: give its bytes-per-s"
            )
        return self.sheet.links[kind]

    def mean_s(self, stage: int) -> float:
        """Return the seconds that a stage spends per update on the mean over replicas."""
        return sum(self._mean_s(self.foot[b], stage) for b in self.layout.blocks(stage))

    def _mean_s(self, foot: Footprint, stage: int) -> float:
        """Return the seconds of a mean of a block's gradients: among the replicas of a node, then
        among nodes, each 2 (n - 1) / n of the bytes and two latencies (reduce-scatter, all-gather;
        nothing of it hidden; Thakur et al. 2005, "Optimization of Collective Communication
        Operations in MPICH")."""
        mesh, often = self.layout.mesh, self.plan.run.make_sync().means()
        nodes = Counter(mesh.rank(r, stage) // self.per_node for r in range(mesh.replicas))
        seconds = 0.0
        for kind, n, means in zip(
            (NEAR, FAR), (max(nodes.values()), len(nodes)), often, strict=True
        ):
            if n > 1 and means:
                cable = self._cable(kind)
                once = 2 * (n - 1) / n * foot.gradients / cable.bytes_per_s + 2 * cable.latency_s
                seconds += means * once
        return seconds

    def traffic(self, seen: Forecast) -> dict[str, dict[str, int]]:
        """Return messages and bytes of all replicas, by the kind of link."""
        found = {kind: {"messages": 0, "bytes": 0} for kind in (NEAR, FAR)}
        for pair, count in seen.messages.items():
            source, target = map(int, pair.split())
            for replica in range(self.layout.mesh.replicas):
                row = found[self._kind(replica, source, target)]
                row["messages"] += count
                row["bytes"] += seen.message_bytes[pair]
        return found

    def _lacks(self, what: str) -> Refusal:
        return Refusal(f"{self.sheet.path}: {what}")
