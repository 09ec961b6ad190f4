"""Flow of tensors between the blocks of a graph, and the part of the graph that one block runs.

The main output of a block goes to the next block, as in a chain. Every other tensor that crosses a
cut is a skip: it goes straight from the block that makes it to each block that reads it::

    block 0            block 1           block 2
    down -- a -------> mid -- b -------> up, cat, out        main outputs
           `---------------------------> (a)                 a skip from block 0 to block 2

Invariant: the flow depends on the graph and the cuts alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.models.graph import (
    CallContext,
    ModelGraph,
    NodeValue,
    PreparedCall,
    TensorSpec,
    describe_node,
    prepare_calls,
)
from dtrain.models.shape_inference import LayerProfile, free_tensors


@final
@dataclass(frozen=True)
class SkipInput:
    """A tensor that a block reads and that is no main output of the block before.

    Attributes
    ----------
    tensor : TensorSpec
        Name, shape and dtype.
    source : int
        The block that makes it.
    """

    tensor: TensorSpec
    source: int


@final
@dataclass(frozen=True)
class BlockFlow:
    """The tensors that enter and leave one block.

    Attributes
    ----------
    main_input, main_output : str
        Output of the block before (of block 0: the first input of the data), and of this block.
    skip_inputs : tuple of SkipInput
        Tensors of earlier blocks.
    data_inputs : tuple of int
        Positions of the data's inputs that the block reads, beside `main_input`.
    skip_outputs : tuple of str
        Tensors that later blocks read, beside the main output in the next block.
    reads : tuple of NodeValue
        The values of earlier blocks that are assembled of these tensors.
    """

    main_input: str
    main_output: str
    skip_inputs: tuple[SkipInput, ...] = ()
    data_inputs: tuple[int, ...] = ()
    skip_outputs: tuple[str, ...] = ()
    reads: tuple[NodeValue, ...] = ()


def block_flows(
    graph: ModelGraph, layer_specs: Sequence[LayerProfile], layers: Sequence[range]
) -> list[BlockFlow]:
    """Return the flow of every block.

    Parameters
    ----------
    layers : sequence of range
        The layers of each block.

    Raises
    ------
    ConfigError
        A block makes no tensor with the samples first, so that no cut can follow it.
    """
    sources = {
        value.node: block
        for block, indices in enumerate(layers)
        for index in indices
        for value in layer_specs[index].writes
    }
    values = {value.node: value for spec in layer_specs for value in spec.writes}
    outputs = [_main_output(layer_specs, indices) for indices in layers]
    flows = []
    for block, indices in enumerate(layers):
        names = dict.fromkeys(name for index in indices for name in layer_specs[index].reads)
        reads = [values[name] for name in names if sources.get(name, block) != block]
        skips = [
            SkipInput(tensor, sources[value.node])
            for value in reads
            for tensor in value.tensors
            if (sources[value.node], tensor.name) != (block - 1, outputs[block - 1])
        ]
        data = [graph.inputs.index(name) for name in names if name in graph.inputs]
        main = outputs[block - 1] if block else graph.inputs[0]
        flows.append(
            BlockFlow(
                main_input=main,
                main_output=outputs[block],
                skip_inputs=tuple(skips),
                data_inputs=tuple(position for position in data if block or position),
                reads=tuple(reads),
            )
        )
    return [_add_skip_outputs(block, flows) for block in range(len(flows))]


def _main_output(layer_specs: Sequence[LayerProfile], layers: range) -> str:
    spec = layer_specs[layers.stop - 1]
    if not spec.main_value:
        raise ConfigError(
            "partition.no-main-output",
            f"layer '{spec.name}' makes no real or complex tensor with the samples first, so no "
            f"block can end there: cut elsewhere ([partition] cuts)",
        )
    return spec.main_value


def _add_skip_outputs(block: int, flows: Sequence[BlockFlow]) -> BlockFlow:
    flow = flows[block]
    names = [s.tensor.name for f in flows for s in f.skip_inputs if s.source == block]
    return BlockFlow(
        main_input=flow.main_input,
        main_output=flow.main_output,
        skip_inputs=flow.skip_inputs,
        data_inputs=flow.data_inputs,
        skip_outputs=tuple(dict.fromkeys(names)),
        reads=flow.reads,
    )


@final
class BlockProgram:
    """The calls of one block.

    Parameters
    ----------
    graph : ModelGraph
        The model's graph.
    layers : range
        The block's layers.
    layer_specs : sequence of LayerProfile
        Of the whole model.
    flow : BlockFlow
        What enters and leaves the block.
    """

    def __init__(
        self, graph: ModelGraph, layers: range, layer_specs: Sequence[LayerProfile], flow: BlockFlow
    ) -> None:
        self.graph = graph
        self.layers = [graph.layers[index] for index in layers]
        self.layer_specs = [layer_specs[index] for index in layers]
        self.flow = flow
        self.main_input = flow.main_input
        self.main_output = flow.main_output
        self.skip_outputs = flow.skip_outputs
        self.data_inputs = {graph.inputs[position]: position for position in flow.data_inputs}
        self._outputs = {flow.main_output, *flow.skip_outputs}
        writes = [value for spec in self.layer_specs for value in spec.writes]
        self._made = [v for v in writes if self._outputs & {t.name for t in v.tensors}]
        self._calls = self._prepare()

    def _prepare(self) -> list[list[PreparedCall]]:
        """Return the calls of every layer; each frees what no later layer reads."""
        keep, calls = {value.node for value in self._made}, []
        for layer, spec in zip(reversed(self.layers), reversed(self.layer_specs), strict=True):
            own = {value.node for value in spec.writes}  # a cut behind the layer detaches them
            calls.append(prepare_calls(layer.nodes, keep | own))
            keep |= set(layer.reads)
        return calls[::-1]

    def layer_of(self, call: str) -> str:
        """Return the name of the layer to which a call belongs."""
        names = (
            layer.name
            for layer in self.layers
            for node in layer.nodes
            if node.meta.get("call", node.name) == call
        )
        return next(names)

    def calls(self) -> dict[str, str]:
        """Return the calls of each layer as text, by its name."""
        return {layer.name: "\n".join(map(describe_node, layer.nodes)) for layer in self.layers}

    def run(
        self,
        modules: Mapping[str, nn.Module],
        inputs: Mapping[str, Tensor],
        context: CallContext,
        layer_outputs: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run the block; return its main output and its skip outputs by name.

        Parameters
        ----------
        modules : mapping
            The block's modules by dotted name.
        inputs : mapping
            Main input, skip inputs and inputs of the data by name.
        layer_outputs : dict, optional
            Receives the main output of every layer; the graph is then cut after every layer.
        """
        main = inputs[self.flow.main_input]
        values: dict[str, Any] = dict(self.graph.defaults)
        values |= {name: inputs[name] for name in self.graph.inputs if name in inputs}
        for value in self.flow.reads:
            values[value.node] = value.assemble(inputs, len(main), main.device)
        tensors = free_tensors(modules)
        for calls, spec in zip(self._calls, self.layer_specs, strict=True):
            for call in calls:
                call.run(modules, tensors, values, context)
            if layer_outputs is not None:
                self._cut(spec, values, layer_outputs)
        outputs: dict[str, Tensor] = {}
        for value in self._made:
            outputs |= value.flatten(values[value.node])
        return {name: outputs[name] for name in sorted(self._outputs)}

    def _cut(
        self, spec: LayerProfile, values: dict[str, Any], layer_outputs: dict[str, Tensor]
    ) -> None:
        """Record the main output of a layer, and detach all that the layer made."""
        for value in spec.writes:
            made = value.flatten(values[value.node])
            if spec.main_value in made:
                layer_outputs[spec.name] = made[spec.main_value]
            detached = {name: tensor.detach() for name, tensor in made.items()}
            device = torch.device("cpu")
            for tensor in detached.values():
                device = tensor.device
            rows = _rows(value, made)
            values[value.node] = value.assemble(detached, rows, device)


def _rows(value: NodeValue, tensors: Mapping[str, Tensor]) -> int:
    """Return the number of samples, read off the tensors of a value; 0 where none has it."""
    for spec in value.tensors:
        for size, row_size, actual in zip(
            spec.sizes, spec.row_sizes, tensors[spec.name].shape, strict=True
        ):
            if row_size:
                return (actual - size) // row_size
    return 0
