"""Layout of a run on a number of ranks: blocks, stages, block specs and routes.

Invariant: a layout depends on the run file, the shape of the data and the number of ranks alone.
Every rank computes the same layout without a message, and `dtrain plan` shows the layout that
`dtrain train` uses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dtrain import partition
from dtrain.comm.wire_format import WireFormat
from dtrain.config.run import RunConfig
from dtrain.config.sections import Partition
from dtrain.errors import ConfigError
from dtrain.mesh import RankMesh
from dtrain.models.flow import BlockFlow, BlockProgram, block_flows
from dtrain.models.graph import ModelGraph, chain_graph
from dtrain.models.layers import FactoryLayers, LayerStack, merge_layers
from dtrain.models.shape_inference import LayerProfile, infer_layers
from dtrain.models.ties import Ties, find_ties
from dtrain.objectives.base import ExecutionMode, Objective, input_gradient_blocks
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.messages import all_routes, message_spec
from dtrain.planning import layout_checks as checks
from dtrain.planning.block_costs import BlockCosts, total_macs
from dtrain.planning.cut_choice import choose_cuts
from dtrain.planning.structure_cache import StructureCache, layers_key
from dtrain.planning.tied_checks import check_ties
from dtrain.schedules.actions import Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.stream_replay import StreamReplay
from dtrain.schedules.update_lags import UpdateCycles, tied_routes
from dtrain.schedules.verify import ScheduleReport, verify_schedule
from dtrain.tasks.task import Task

DTYPES = {"float32": torch.float32, "float64": torch.float64}

_LAYER_SPECS: StructureCache[tuple[LayerProfile, ...]] = StructureCache()
"""Specs of a model's layers by structure, sample shape and dtype."""


@dataclass(frozen=True)
class BlockLayout:
    """Layers, spec and costs of one block.

    Attributes
    ----------
    spec : BlockSpec
        Everything that the objective knows of the block.
    layers : range
        Indices of its layers in the model.
    layer_specs : tuple of LayerProfile
        The layers that the block runs, those of the objective included.
    parameters, head_parameters : int
        Parameter elements of the layers, and of the local head.
    cost : int
        Multiply-adds of one sample, forward and backward, local head included.
    head_cost : int
        Those of the local head.
    replacement_layers : LayerStack or None
        Layers of the objective that replace those of the model.
    couples_samples : bool
        Whether the objective makes samples depend on each other, by its loss or by batch
        statistics in the head.
    frozen : bool
        Whether the layers keep their initial weights.
    recompute : bool
        Whether the backward recomputes what the block's interior saved.
    keeps_forward : bool
        Whether a forward that is recomputed keeps its output; otherwise the input alone, and
        nothing where the block rebuilds its input.
    flow : BlockFlow or None
        The tensors that enter and leave the block; None where the layers are a chain.
    """

    spec: BlockSpec
    layers: range
    layer_specs: tuple[LayerProfile, ...]
    parameters: int
    head_parameters: int
    cost: int
    head_cost: int = 0
    replacement_layers: LayerStack | None = dataclasses.field(default=None, compare=False)
    couples_samples: bool = False
    frozen: bool = False
    recompute: bool = False
    keeps_forward: bool = True
    flow: BlockFlow | None = None


@dataclass(frozen=True)
class Layout:
    """Blocks and strategies of a run on a number of ranks.

    Attributes
    ----------
    layer_specs : tuple of LayerProfile
        The model's layers.
    block_layouts : tuple of BlockLayout
        The blocks, in order.
    place : tuple of int
        The stage of each block.
    routes : tuple of Route
        The messages of training.
    graph : ModelGraph or None
        The calls of the model; None where its layers are a chain.
    ties : Ties
        The parameters that several blocks hold.
    tied_cycles : UpdateCycles or None
        The cycles from which the lags of their gradients follow; None where nothing is late.
    """

    mesh: RankMesh
    model: LayerStack
    dtype: torch.dtype
    layer_specs: tuple[LayerProfile, ...]
    block_layouts: tuple[BlockLayout, ...]
    place: tuple[int, ...]
    objective: Objective
    schedule: Schedule
    routes: tuple[Route, ...]
    wire_format: WireFormat
    graph: ModelGraph | None = None
    ties: Ties = ()
    tied_cycles: UpdateCycles | None = None

    @property
    def block_specs(self) -> list[BlockSpec]:
        """The spec of each block, in order."""
        return [block.spec for block in self.block_layouts]

    @property
    def cuts(self) -> tuple[int, ...]:
        """The layers at which blocks 1, 2, ... start."""
        return tuple(block.layers.start for block in self.block_layouts[1:])

    @property
    def coupling_layers(self) -> list[str]:
        """Layers and heads that make the samples of a micro-batch depend on each other."""
        layers = [spec.name for spec in self.layer_specs if spec.couples_samples]
        heads = [f"heads.{b.spec.index}" for b in self.block_layouts if b.couples_samples]
        return layers + heads

    def program(self, block: int) -> BlockProgram | None:
        """Return the calls of a block, None where its layers are a chain."""
        block_layout = self.block_layouts[block]
        if self.graph is None or block_layout.flow is None:
            return None
        return BlockProgram(self.graph, block_layout.layers, self.layer_specs, block_layout.flow)

    @property
    def task(self) -> Task:
        """Loss, targets and metrics."""
        return self.block_layouts[0].spec.task

    def needs_input_gradient(self, block: int) -> bool:
        """Return whether a block computes the gradient of its input and sends it."""
        return block in input_gradient_blocks(self.routes)

    def blocks_of_stage(self, stage: int) -> list[int]:
        """Return the blocks of a stage."""
        return [block for block, its_stage in enumerate(self.place) if its_stage == stage]

    def stage_costs(self) -> list[int]:
        """Return multiply-adds of one sample per stage."""
        stages = range(self.mesh.stages)
        return [
            sum(self.block_layouts[b].cost for b in self.blocks_of_stage(stage)) for stage in stages
        ]

    def messages(self, rows: int, mode: ExecutionMode = "train") -> Iterator[tuple[Route, int]]:
        """Yield every route and the payload bytes of its message for `rows` samples."""
        for route in all_routes(self.objective, self.block_specs, mode):
            spec = message_spec(self.objective, route, self.block_specs, rows)
            shape, dtype = self.wire_format.encoded_spec(route, spec) if mode == "train" else spec
            yield route, math.prod(shape) * dtype.itemsize

    def tied_messages(self) -> Iterator[tuple[Route, int]]:
        """Yield the routes between ranks of the gradients of tied parameters, and the bytes of
        their messages, of which each update has one."""
        for tie in self.ties:
            for route in tied_routes(tie.blocks, self.place, self.tied_cycles):
                yield route, tie.nbytes

    def late_messages(self) -> list[tuple[Route, int]]:
        """Return those of `tied_messages` that run beside the pipeline: all, unless it flushes."""
        return [] if self.tied_cycles is None else list(self.tied_messages())

    def prove(self, sizes: list[list[int]]) -> ScheduleReport:
        """Prove that the plans of the schedule end; ``sizes[replica][update]`` micro-batches."""
        late_routes = [route for route, _ in self.late_messages()]
        return verify_schedule(self.schedule, self.place, sizes, self.routes, late_routes)


def make_layout(run: RunConfig, model: LayerStack, data_spec: BlockSpec, ranks: int) -> Layout:
    """Return the layout of `run` on `ranks` ranks.

    Parameters
    ----------
    data_spec : BlockSpec
        Facts of the data that all block specs share.

    Raises
    ------
    ConfigError
        The mesh, the partition or the schedule does not fit.
    """
    checks.check_stages(run, ranks)
    shares = run.mesh.shares or ()
    mesh = RankMesh.for_ranks(ranks, run.stages, run.mesh.placement, shares)
    objective, schedule = run.objective.instance, run.schedule.instance
    block_costs = make_block_costs(run, model, data_spec)
    layer_specs = block_costs.layer_specs
    cuts = choose_cuts(run, block_costs, mesh.stages)
    layers = partition.layer_ranges(len(layer_specs), cuts)
    checks.check_cuts(layer_specs, layers, objective)
    checks.check_block_numbers(run, len(layers))
    checks.check_clip(run, schedule)
    graph = _used_graph(model, layer_specs)
    _check_layers(run, model, is_chain=graph is None)
    blocks = _block_layouts(
        block_costs, layers, run.partition, schedule.recomputes or objective.recomputes
    )
    if graph is not None:
        blocks = _add_flows(graph, layer_specs, blocks)
        checks.check_in_place(layer_specs, layers)
    if schedule.rebuilds_inputs:
        blocks = _rebuild_inputs(run, blocks)
    routes = all_routes(objective, [block.spec for block in blocks], "train")
    schedule.check_routes(routes)
    if isinstance(schedule, StreamReplay):
        checks.check_replay(run, [block.spec for block in blocks])
    ties = find_ties(model, layers, DTYPES[run.settings.dtype])
    _check_replaced_ties(run, ties)
    cycles = None
    if ties and not schedule.flushes:
        cycles = schedule.update_cycles(len(blocks), routes)
    return Layout(
        mesh=mesh,
        model=model,
        dtype=DTYPES[run.settings.dtype],
        layer_specs=layer_specs,
        block_layouts=blocks,
        place=_choose_places(run, schedule, blocks, mesh.stages),
        objective=objective,
        schedule=schedule,
        routes=routes,
        wire_format=WireFormat(run.partition.activation_compression),
        graph=graph,
        ties=check_ties(run, ties, cycles, len(layers)),
        tied_cycles=cycles,
    )


def make_block_costs(run: RunConfig, model: LayerStack, data_spec: BlockSpec) -> BlockCosts:
    """Return the costs of all blocks that can be cut from a model, whose layers are inferred."""
    dtype, objective = DTYPES[run.settings.dtype], run.objective.instance
    shape = objective.model_input_shape(data_spec.sample_shape, data_spec.classes)
    input_dtype = data_spec.sample_dtype(dtype)
    layer_specs = _infer_layers(model, shape, dtype, input_dtype, data_spec.other_inputs)
    checks.check_outputs(layer_specs, data_spec)
    data_spec = dataclasses.replace(data_spec, prediction_shape=layer_specs[-1].output_shape)
    return BlockCosts(layer_specs, objective, model, data_spec, run.settings.seed)


def _check_layers(run: RunConfig, model: LayerStack, is_chain: bool) -> None:
    """Refuse a model that the objective cannot train."""
    objective = run.objective.instance
    if not is_chain and objective.needs_block_layers:
        raise checks.chain_error()
    if type(objective).check_layers is not Objective.check_layers:
        objective.check_layers(_meta_modules(model, DTYPES[run.settings.dtype]), is_chain)


def _check_replaced_ties(run: RunConfig, ties: Ties) -> None:
    """Refuse shared parameters in layers that the objective makes anew for every block."""
    if ties and run.objective.instance.needs_block_layers:
        raise ConfigError(
            "objective.ties-replaced",
            f"'{ties[0].copies[0].name}' and '{ties[0].copies[1].name}' are one parameter, and "
            f"'{run.objective.name}' gives every block layers of its own: give both their own",
        )


def _meta_modules(model: LayerStack, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the modules of a model by name, on the meta device; without those that cannot be."""
    return merge_layers(modules for modules in model.meta_layers(dtype) if modules is not None)


def _used_graph(model: LayerStack, layer_specs: Sequence[LayerProfile]) -> ModelGraph | None:
    """Return the graph with which the layers were inferred, None where they are a chain."""
    if not any(spec.writes for spec in layer_specs):
        return None
    return model.graph or chain_graph(model.names)


def _add_flows(
    graph: ModelGraph, layer_specs: Sequence[LayerProfile], blocks: Sequence[BlockLayout]
) -> tuple[BlockLayout, ...]:
    """Return the blocks with the tensors that enter and leave them."""
    for block in blocks:
        if block.replacement_layers is not None:
            raise checks.chain_error()
    flows = block_flows(graph, layer_specs, [block.layers for block in blocks])
    return tuple(
        dataclasses.replace(
            block,
            flow=flow,
            spec=dataclasses.replace(
                block.spec, skip_inputs=flow.skip_inputs, data_inputs=flow.data_inputs
            ),
        )
        for block, flow in zip(blocks, flows, strict=True)
    )


def _rebuild_inputs(run: RunConfig, blocks: Sequence[BlockLayout]) -> tuple[BlockLayout, ...]:
    """Return the blocks of a schedule that keeps no activations.

    The last block runs its backward right after its forward, so it keeps its graph.
    """
    changed = []
    for block in blocks[:-1]:
        rebuilds = (
            block.flow is None
            and block.replacement_layers is None
            and all(spec.reversible for spec in block.layer_specs)
        )
        if rebuilds and run.partition.activation_compression != "exact":
            raise ConfigError(
                "schedule.rebuilds-from-compressed",
                f"[partition] activation-compression rounds the output of block "
                f"{block.spec.index}, from which '{run.schedule.name}' rebuilds its input: leave "
                "out activation-compression",
            )
        spec = dataclasses.replace(block.spec, rebuilds_input=rebuilds)
        changed.append(dataclasses.replace(block, spec=spec, recompute=True, keeps_forward=False))
    return (*changed, blocks[-1])


def _infer_layers(
    model: LayerStack,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    input_dtype: torch.dtype | None = None,
    other_inputs: Sequence[tuple[tuple[int, ...], torch.dtype]] = (),
) -> tuple[LayerProfile, ...]:
    """Return the specs of a model's layers."""
    structure = layers_key(model)
    key = None if structure is None else (structure, tuple(shape), dtype, input_dtype)
    return _LAYER_SPECS.get(
        key, lambda: infer_layers(model, shape, dtype, input_dtype, other_inputs)
    )


def _choose_places(
    run: RunConfig, schedule: Schedule, blocks: Sequence[BlockLayout], stages: int
) -> tuple[int, ...]:
    """Return the stage of each block: those of the run file, else those of the schedule."""
    places = run.partition.places
    if places is None:
        return schedule.assign_stages([block.cost for block in blocks], stages)
    partition.check_places(places, len(blocks), stages)
    schedule.check_places(places)
    return tuple(places)


def _block_layouts(
    block_costs: BlockCosts, layers: Sequence[range], section: Partition, recomputes: bool
) -> tuple[BlockLayout, ...]:
    """Return the blocks. The last is made first, since a spec holds the next block's output."""
    blocks: list[BlockLayout] = []
    for index in reversed(range(len(layers))):
        next_output_shape = blocks[-1].spec.output_shape if blocks else ()
        block = _block_layout(block_costs, index, layers, next_output_shape)
        frozen = section.is_frozen(index, len(layers))
        spec = dataclasses.replace(block.spec, frozen=frozen)
        chosen = section.recompute
        recompute = recomputes or (chosen if isinstance(chosen, bool) else index in chosen)
        blocks.append(dataclasses.replace(block, spec=spec, frozen=frozen, recompute=recompute))
    return tuple(reversed(blocks))


def _block_layout(
    block_costs: BlockCosts, index: int, layers: Sequence[range], next_output_shape: tuple[int, ...]
) -> BlockLayout:
    """Return a block with its analytic costs."""
    objective, dtype = block_costs.objective, block_costs.layer_specs[0].dtype
    i, j = layers[index].start, layers[index].stop
    spec = block_costs.block_spec(index, len(layers), i, j)
    spec = dataclasses.replace(spec, next_output_shape=next_output_shape)
    layer_specs = block_costs.layer_specs[i:j]
    parameters, macs = block_costs.layer_parameters(i, j), block_costs.layer_macs(i, j)
    replacement, model = objective.replacement_layers(spec), None
    if replacement is not None:
        names, factories = zip(*replacement, strict=True)
        own = {layer.name for layer in spec.own_layers}  # they keep their names
        names = tuple(name if name in own else f"blocks{index}-{name}" for name in names)
        model = FactoryLayers(names, factories)
        layer_specs = _infer_layers(model, objective.block_input_shape(spec), dtype)
        last = layer_specs[-1]
        spec = dataclasses.replace(spec, output_shape=last.output_shape, dtype=last.dtype)
        parameters = sum(layer.parameters for layer in layer_specs)
        macs = sum(map(total_macs, layer_specs))
    head = block_costs.head_spec(spec)
    return BlockLayout(
        spec=spec,
        layers=layers[index],
        layer_specs=layer_specs,
        parameters=parameters,
        head_parameters=head.parameters if head else 0,
        cost=macs * objective.forward_passes(spec) + total_macs(head),
        head_cost=total_macs(head),
        replacement_layers=model,
        couples_samples=objective.couples_samples(spec)
        or (head is not None and head.couples_samples),
    )
