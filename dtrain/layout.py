"""What is trained and where: blocks, stages, tasks and routes of one run on a number of ranks.

Invariant: pure in the run file, the data's shape and the number of ranks. Every rank computes the
same layout without a message, and `dtrain plan` shows the one that `dtrain train` uses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dtrain import partition
from dtrain.config import Run
from dtrain.errors import Refusal
from dtrain.keys import Cut
from dtrain.mesh import Mesh
from dtrain.models import Model, Spec, walk
from dtrain.models.model import Listed
from dtrain.objectives.objective import Mode, Objective
from dtrain.objectives.task import Task
from dtrain.parcel import Parcel
from dtrain.prices import Prices, total
from dtrain.schedules.action import Route
from dtrain.schedules.check import Report, check
from dtrain.schedules.schedule import Schedule

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Part:
    """One block: its layers, where it stands and what it costs.

    Attributes
    ----------
    layers : range
        Indices of its layers.
    parameters, head_parameters : int
        Elements, those of the objective's helper apart.
    cost : int
        Multiply-adds of one sample, forward and backward, local head included.
    own : Model or None
        The objective's layers, where they take the place of the model's.
    couples : bool
        Whether the objective makes samples depend on each other, by a loss or batch statistics.
    frozen : bool
        Whether its layers keep their first weights.
    """

    task: Task
    layers: range
    parameters: int
    head_parameters: int
    cost: int
    own: Model | None = None
    couples: bool = False
    frozen: bool = False


@dataclass(frozen=True)
class Layout:
    """A run, settled on a number of ranks."""

    mesh: Mesh
    model: Model
    dtype: torch.dtype
    specs: tuple[Spec, ...]
    parts: tuple[Part, ...]
    place: tuple[int, ...]
    objective: Objective
    schedule: Schedule
    routes: tuple[Route, ...]
    parcel: Parcel

    @property
    def tasks(self) -> list[Task]:
        """One task per block, in order."""
        return [part.task for part in self.parts]

    @property
    def cuts(self) -> tuple[int, ...]:
        """The layers at which blocks 1, 2, ... start."""
        return tuple(part.layers.start for part in self.parts[1:])

    @property
    def coupling(self) -> list[str]:
        """Layers that make the samples of a micro-batch depend on each other."""
        heads = (f"heads.{block}" for block, part in enumerate(self.parts) if part.couples)
        return [*(spec.name for spec in self.specs if spec.couples), *heads]

    def blocks(self, stage: int) -> list[int]:
        """Return the blocks of a stage."""
        return [block for block, own in enumerate(self.place) if own == stage]

    def stage_costs(self) -> list[int]:
        """Return multiply-adds of one sample per stage."""
        stages = range(self.mesh.stages)
        return [sum(self.parts[b].cost for b in self.blocks(stage)) for stage in stages]

    def messages(self, rows: int, mode: Mode = "train") -> Iterator[tuple[Route, int]]:
        """Yield every route with the payload bytes that `rows` samples send along it."""
        for route in self.objective.routes(len(self.parts), mode):
            spec = self.objective.shape(route, self.tasks, rows)
            shape, dtype = self.parcel.spec(route, spec) if mode == "train" else spec
            yield route, math.prod(shape) * dtype.itemsize

    def prove(self, sizes: list[list[int]]) -> Report:
        """Return the report of a proof that the plans end; ``sizes[replica][update]``."""
        return check(self.schedule, self.place, sizes, self.routes)


def settle(run: Run, model: Model, about: Task, ranks: int) -> Layout:
    """Return the layout of `run` on `ranks` ranks; what is known of the data is the same in the
    tasks of all blocks.

    Raises
    ------
    Refusal
        The mesh, the partition or the schedule does not fit.
    """
    _stages_fit(run, ranks)
    mesh = Mesh.fit(ranks, run.mesh.stages, run.mesh.placement)
    dtype = DTYPES[run.top.dtype]
    objective, schedule = run.make_objective(), run.make_schedule()
    specs = walk(model, objective.sees(about.sample, about.classes), dtype)
    if specs[-1].outputs != (about.classes,):
        raise Refusal(
            f"layer '{specs[-1].name}' returns {specs[-1].outputs} for a sample, but the data has "
            f"{about.classes} classes: end the model with {about.classes} outputs"
        )
    for spec in specs:
        if not spec.dtype.is_floating_point:
            raise Refusal(f"layer '{spec.name}' returns {spec.dtype}: a layer returns real numbers")
    prices = Prices(specs, objective, model, about, run.top.seed)
    layers = partition.ranges(len(specs), _cuts(run, prices, mesh.stages))
    _there(run, len(layers))
    routes = objective.routes(len(layers), "train")
    schedule.admit(routes)
    _clips(run, schedule)
    parts = _parts(prices, layers, run.partition)
    place = schedule.place([part.cost for part in parts], mesh.stages)
    parcel = Parcel(run.partition.wire)
    return Layout(mesh, model, dtype, specs, parts, place, objective, schedule, routes, parcel)


def _stages_fit(run: Run, ranks: int) -> None:
    if run.mesh.stages is None and run.partition.blocks is None and run.partition.cuts is None:
        return
    stages, blocks = run.mesh.stages or ranks, run.partition.blocks
    if run.partition.cuts is not None:
        blocks = len(run.partition.cuts) + 1
    if blocks is not None and blocks < stages:
        raise Refusal(
            f"{blocks} blocks cannot fill {stages} stages: set [mesh] stages = {blocks} or less, "
            f"or [partition] blocks = {stages} or more"
        )


def _cuts(run: Run, prices: Prices, stages: int) -> tuple[int, ...]:
    """Return where blocks start: as the run file says, else balanced over analytic costs."""
    cut, layers = run.partition, len(prices.specs)
    if cut.cuts is not None:
        return partition.explicit([spec.name for spec in prices.specs], cut.cuts)
    costs: dict[str, Callable[[int, int], int]] = {
        "flops": prices.flops,
        "parameters": prices.parameters,
        "layers": lambda i, j: j - i,
    }
    return partition.balanced(layers, cut.blocks or stages, costs[cut.balance], cut.weights)


def _there(run: Run, blocks: int) -> None:
    """Refuse keys that name a block that is not there."""
    for key, named in run.partition.named().items():
        for block in named:
            if not 0 <= block < blocks:
                raise Refusal(
                    f"[partition] {key} names block {block}, but there are {blocks} "
                    f"(0 to {blocks - 1}): name one of those"
                )


def _clips(run: Run, schedule: Schedule) -> None:
    """Refuse a clip over the model where its gradients are never there together."""
    if run.step.clip and run.step.clip_over == "model" and not schedule.flushes:
        raise Refusal(
            f'[optimizer] clip-over = "model" needs the whole gradient before any update, and '
            f"'{run.schedule.name}' updates block by block: set clip-over = \"block\", or "
            'schedule.name = "1f1b" or "fill-drain"'
        )


def _parts(prices: Prices, layers: Sequence[range], cut: Cut) -> tuple[Part, ...]:
    """Return the blocks, the last made first: a task knows what leaves the next block."""
    parts: list[Part] = []
    for block in reversed(range(len(layers))):
        above = parts[-1].task.outputs if parts else ()
        part, frozen = _part(prices, block, layers, above), cut.freezes(block, len(layers))
        task = dataclasses.replace(part.task, frozen=frozen)
        parts.append(dataclasses.replace(part, task=task, frozen=frozen))
    return tuple(reversed(parts))


def _part(prices: Prices, block: int, layers: Sequence[range], above: tuple[int, ...]) -> Part:
    """Return a block with its analytic costs."""
    i, j = layers[block].start, layers[block].stop
    task = dataclasses.replace(prices.task(block, len(layers), i, j), above=above)
    own, model = prices.objective.own(task), None
    parameters, cost = prices.elements(i, j), prices.layers(i, j)
    if own is not None:
        model = Listed(tuple(f"blocks{block}-{n}" for n, _ in own), tuple(m for _, m in own))
        specs = walk(model, prices.objective.fed(task), prices.specs[0].dtype)
        task = dataclasses.replace(task, outputs=specs[-1].outputs, dtype=specs[-1].dtype)
        parameters, cost = sum(spec.parameters for spec in specs), sum(map(total, specs))
    helper = prices.helper(task)
    couples = prices.objective.couples(task) or (helper is not None and helper.couples)
    head = helper.parameters if helper else 0
    cost = cost * prices.objective.copies(task) + total(helper)
    return Part(task, layers[block], parameters, head, cost, model, couples)


def describe(layout: Layout, rows: int) -> dict[str, Any]:
    """Return the layout as plain values; `rows` are the samples of one micro-batch."""
    return {
        "ranks": layout.mesh.ranks,
        "replicas": layout.mesh.replicas,
        "stages": layout.mesh.stages,
        "placement": layout.mesh.placement,
        "cuts": list(layout.cuts),
        "place": list(layout.place),
        "blocks": [
            {
                "block": part.task.block,
                "stage": layout.place[part.task.block],
                "layers": [layout.specs[i].name for i in part.layers],
                "parameters": part.parameters,
                "head_parameters": part.head_parameters,
                "multiply_adds": part.cost,
                "frozen": part.frozen,
            }
            for part in layout.parts
        ],
        "imbalance": partition.imbalance(layout.stage_costs()),
        "messages": [
            {
                "route": route.name,
                "from_block": route.source.block,
                "from_stage": layout.place[route.source.block],
                "to_block": route.target.block,
                "to_stage": layout.place[route.target.block],
                "bytes": size,
                "wire": layout.place[route.source.block] != layout.place[route.target.block],
            }
            for route, size in layout.messages(rows)
        ],
    }
