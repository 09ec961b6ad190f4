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
from dtrain.comm.wire_format import WireFormat
from dtrain.config.run import RunConfig
from dtrain.config.sections import PartitionSection
from dtrain.errors import ConfigError
from dtrain.mesh import Mesh
from dtrain.models.layers import FactoryLayers, LayerStack
from dtrain.models.shape_inference import LayerSpec, infer_layers
from dtrain.objectives.base import ExecutionMode, Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.planning.block_costs import BlockCosts, total_macs
from dtrain.schedules.actions import Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.verify import ScheduleReport, verify_schedule

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class BlockLayout:
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

    spec: BlockSpec
    layers: range
    parameters: int
    head_parameters: int
    cost: int
    replacement_layers: LayerStack | None = None
    couples_samples: bool = False
    frozen: bool = False


@dataclass(frozen=True)
class Layout:
    """A run, settled on a number of ranks."""

    mesh: Mesh
    model: LayerStack
    dtype: torch.dtype
    layer_specs: tuple[LayerSpec, ...]
    block_layouts: tuple[BlockLayout, ...]
    place: tuple[int, ...]
    objective: Objective
    schedule: Schedule
    routes: tuple[Route, ...]
    wire_format: WireFormat

    @property
    def block_specs(self) -> list[BlockSpec]:
        """One task per block, in order."""
        return [part.spec for part in self.block_layouts]

    @property
    def cuts(self) -> tuple[int, ...]:
        """The layers at which blocks 1, 2, ... start."""
        return tuple(part.layers.start for part in self.block_layouts[1:])

    @property
    def coupling_layers(self) -> list[str]:
        """Layers that make the samples of a micro-batch depend on each other."""
        heads = (
            f"heads.{block}"
            for block, part in enumerate(self.block_layouts)
            if part.couples_samples
        )
        return [*(spec.name for spec in self.layer_specs if spec.couples_samples), *heads]

    def blocks_of_stage(self, stage: int) -> list[int]:
        """Return the blocks of a stage."""
        return [block for block, own in enumerate(self.place) if own == stage]

    def stage_costs(self) -> list[int]:
        """Return multiply-adds of one sample per stage."""
        stages = range(self.mesh.stages)
        return [
            sum(self.block_layouts[b].cost for b in self.blocks_of_stage(stage)) for stage in stages
        ]

    def messages(self, rows: int, mode: ExecutionMode = "train") -> Iterator[tuple[Route, int]]:
        """Yield every route with the payload bytes that `rows` samples send along it."""
        for route in self.objective.routes(len(self.block_layouts), mode):
            spec = self.objective.message_spec(route, self.block_specs, rows)
            shape, dtype = self.wire_format.encoded_spec(route, spec) if mode == "train" else spec
            yield route, math.prod(shape) * dtype.itemsize

    def prove(self, sizes: list[list[int]]) -> ScheduleReport:
        """Return the report of a proof that the plans end; ``sizes[replica][update]``."""
        return verify_schedule(self.schedule, self.place, sizes, self.routes)


def make_layout(run: RunConfig, model: LayerStack, data_spec: BlockSpec, ranks: int) -> Layout:
    """Return the layout of `run` on `ranks` ranks; what is known of the data is the same in the
    tasks of all blocks.

    Raises
    ------
    DtrainError
        The mesh, the partition or the schedule does not fit.
    """
    _check_stages(run, ranks)
    mesh = Mesh.for_ranks(ranks, run.mesh.stages, run.mesh.placement)
    dtype = DTYPES[run.settings.dtype]
    objective, schedule = run.make_objective(), run.make_schedule()
    specs = infer_layers(
        model, objective.model_input_shape(data_spec.sample_shape, data_spec.classes), dtype
    )
    if specs[-1].output_shape != (data_spec.classes,):
        raise ConfigError(
            "todo.key",
            f"layer '{specs[-1].name}' returns {specs[-1].output_shape} for a sample, but the data has "
            f"{data_spec.classes} classes: end the model with {data_spec.classes} outputs",
        )
    for spec in specs:
        if not spec.dtype.is_floating_point:
            raise ConfigError(
                "todo.key",
                f"layer '{spec.name}' returns {spec.dtype}: a layer returns real numbers",
            )
    prices = BlockCosts(specs, objective, model, data_spec, run.settings.seed)
    layers = partition.layer_ranges(len(specs), _choose_cuts(run, prices, mesh.stages))
    _check_block_numbers(run, len(layers))
    routes = objective.routes(len(layers), "train")
    schedule.check_routes(routes)
    _check_clip(run, schedule)
    parts = _block_layouts(prices, layers, run.partition)
    place = schedule.assign_stages([part.cost for part in parts], mesh.stages)
    parcel = WireFormat(run.partition.activation_compression)
    return Layout(mesh, model, dtype, specs, parts, place, objective, schedule, routes, parcel)


def _check_stages(run: RunConfig, ranks: int) -> None:
    if run.mesh.stages is None and run.partition.blocks is None and run.partition.cuts is None:
        return
    stages, blocks = run.mesh.stages or ranks, run.partition.blocks
    if run.partition.cuts is not None:
        blocks = len(run.partition.cuts) + 1
    if blocks is not None and blocks < stages:
        raise ConfigError(
            "todo.key",
            f"{blocks} blocks cannot fill {stages} stages: set [mesh] stages = {blocks} or less, "
            f"or [partition] blocks = {stages} or more",
        )


def _choose_cuts(run: RunConfig, block_costs: BlockCosts, stages: int) -> tuple[int, ...]:
    """Return where blocks start: as the run file says, else balanced over analytic costs."""
    cut, layers = run.partition, len(block_costs.layer_specs)
    if cut.cuts is not None:
        return partition.cuts_from_names([spec.name for spec in block_costs.layer_specs], cut.cuts)
    costs: dict[str, Callable[[int, int], int]] = {
        "flops": block_costs.flops,
        "parameters": block_costs.parameters,
        "layers": lambda i, j: j - i,
    }
    return partition.balanced_cuts(layers, cut.blocks or stages, costs[cut.balance], cut.weights)


def _check_block_numbers(run: RunConfig, blocks: int) -> None:
    """Refuse keys that name a block that is not there."""
    for key, named in run.partition.blocks_by_key().items():
        for block in named:
            if not 0 <= block < blocks:
                raise ConfigError(
                    "todo.key",
                    f"[partition] {key} names block {block}, but there are {blocks} "
                    f"(0 to {blocks - 1}): name one of those",
                )


def _check_clip(run: RunConfig, schedule: Schedule) -> None:
    """Refuse a clip over the model where its gradients are never there together."""
    if (
        run.optimizer_options.clip
        and run.optimizer_options.clip_over == "model"
        and not schedule.flushes
    ):
        raise ConfigError(
            "todo.key",
            f'[optimizer] clip-over = "model" needs the whole gradient before any update, and '
            f"'{run.schedule.name}' updates block by block: set clip-over = \"block\", or "
            'schedule.name = "1f1b" or "fill-drain"',
        )


def _block_layouts(
    block_costs: BlockCosts, layers: Sequence[range], section: PartitionSection
) -> tuple[BlockLayout, ...]:
    """Return the blocks, the last made first: a task knows what leaves the next block."""
    parts: list[BlockLayout] = []
    for block in reversed(range(len(layers))):
        above = parts[-1].spec.output_shape if parts else ()
        part, frozen = (
            _block_layout(block_costs, block, layers, above),
            section.is_frozen(block, len(layers)),
        )
        task = dataclasses.replace(part.spec, frozen=frozen)
        parts.append(dataclasses.replace(part, spec=task, frozen=frozen))
    return tuple(reversed(parts))


def _block_layout(
    block_costs: BlockCosts, block: int, layers: Sequence[range], next_output_shape: tuple[int, ...]
) -> BlockLayout:
    """Return a block with its analytic costs."""
    i, j = layers[block].start, layers[block].stop
    task = dataclasses.replace(
        block_costs.block_spec(block, len(layers), i, j), next_output_shape=next_output_shape
    )
    own, model = block_costs.objective.replacement_layers(task), None
    parameters, cost = block_costs.layer_parameters(i, j), block_costs.layer_macs(i, j)
    if own is not None:
        model = FactoryLayers(tuple(f"blocks{block}-{n}" for n, _ in own), tuple(m for _, m in own))
        specs = infer_layers(
            model, block_costs.objective.block_input_shape(task), block_costs.layer_specs[0].dtype
        )
        task = dataclasses.replace(task, output_shape=specs[-1].output_shape, dtype=specs[-1].dtype)
        parameters, cost = sum(spec.parameters for spec in specs), sum(map(total_macs, specs))
    helper = block_costs.head_spec(task)
    couples = block_costs.objective.couples_samples(task) or (
        helper is not None and helper.couples_samples
    )
    head = helper.parameters if helper else 0
    cost = cost * block_costs.objective.forward_passes(task) + total_macs(helper)
    return BlockLayout(task, layers[block], parameters, head, cost, model, couples)


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
                "block": part.spec.index,
                "stage": layout.place[part.spec.index],
                "layers": [layout.layer_specs[i].name for i in part.layers],
                "parameters": part.parameters,
                "head_parameters": part.head_parameters,
                "multiply_adds": part.cost,
                "frozen": part.frozen,
            }
            for part in layout.block_layouts
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
