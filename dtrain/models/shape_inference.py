"""Shapes and costs of all layers, inferred on every rank without communication.

All layers are run once on the meta device, which has shapes but no memory. Multiply-adds are
counted with torch's flop counter (one multiply-add is two flops) over two samples, since batch
normalisation needs two. A layer that cannot run on meta, or that uses autocast, which does nothing
there, is run on the CPU, as a temporary copy, on zeros; so is a small one of known classes, which
is faster (`small_modules`). A layer that draws random numbers is run several times, with fixed
seeds, and costed by the most that it cost.

Invariant: a `LayerProfile` depends only on model, shape and dtype. It is the same on every machine
and for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, cast, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from dtrain.eager_torch import defer_dynamo, gradients
from dtrain.errors import ConfigError, DtrainError
from dtrain.models.compiled import without_compiling
from dtrain.models.graph import (
    GraphLayer,
    ModelGraph,
    NodeValue,
    TensorSpec,
    chain_graph,
    compare_values,
    has_gradient,
)
from dtrain.models.layers import LayerStack, require_unshared
from dtrain.models.reversible import Reversible
from dtrain.models.saved_bytes import NOTHING_SAVED, SavedBytes, record_saved, summarise_saved
from dtrain.models.small_modules import is_small, zeros_on_cpu
from dtrain.rng import fixed_random_numbers

SAMPLES = 2


DRAWS = 8
"""Runs of a layer that draws random numbers: one that is skipped half of the time is once run."""


COUNTER_MODE: Any = getattr(flop_counter, "_FlopCounterMode", FlopCounterMode)
"""The dispatch mode of torch's flop counter."""


def _attention_flops(q: Sequence[int], k: Sequence[int], *_others: object, **_keys: object) -> int:
    """Return the flops of q k^T and of the product with v, for shapes (n, heads, steps, width)."""
    rows, heads, steps, width = q
    return 4 * rows * heads * steps * k[-2] * width


def _attention_backward_flops(
    _gradient: Sequence[int], q: Sequence[int], k: Sequence[int], *_others: object, **_keys: object
) -> int:
    """Return the flops of the gradients of both products."""
    return 2 * _attention_flops(q, k)


ATTENTION_FLOPS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Operations that torch's flop counter does not know, with their flops."""


defer_dynamo(COUNTER_MODE.__torch_dispatch__)


@final
@dataclass(frozen=True)
class LayerProfile:
    """Shapes and costs of one layer; costs are multiply-adds (macs) of one sample.

    Parameters
    ----------
    name : str
        The layer's name.
    input_shape, output_shape : tuple of int
        Shape of one sample of the input and of the output.
    dtype : torch.dtype
        Dtype of the output.
    forward_macs : int
        Cost of the forward pass.
    weight_gradient_macs, input_gradient_macs : int
        Cost of the two halves of the backward pass. Gradients between modules inside the layer
        belong to the second.
    parameters : int
        Number of parameters (elements).
    couples_samples : bool
        Whether the layer has batch statistics, which make samples of a micro-batch depend on each
        other.
    skippable_macs : int
        Cost that the backward pass saves where the gradient of the layer's input is not needed.
    reads : tuple of str
        Where the model is a graph: values of earlier layers and of the data that the layer reads.
    writes : tuple of NodeValue
        Where the model is a graph: values of the layer that later layers read, or the output.
    main_value : str
        Where the model is a graph: the tensor of `output_shape`, the last of `writes` with the
        samples first; empty where there is none, so that no cut may follow.
    overwrites : tuple of str
        Where the model is a graph: those of `reads` on which the layer works in place.
    saved : SavedBytes
        Tensors that the layer keeps for its backward.
    reversible : bool
        Whether the layer is a `Reversible`, so that its input follows from its output.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    forward_macs: int
    weight_gradient_macs: int
    input_gradient_macs: int
    parameters: int
    couples_samples: bool = False
    skippable_macs: int = 0
    reads: tuple[str, ...] = ()
    writes: tuple[NodeValue, ...] = field(default=(), compare=False, repr=False)
    main_value: str = ""
    overwrites: tuple[str, ...] = ()
    saved: SavedBytes = NOTHING_SAVED
    reversible: bool = False


def infer_layers(
    model: LayerStack,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    input_dtype: torch.dtype | None = None,
    other_inputs: Sequence[tuple[tuple[int, ...], torch.dtype]] = (),
) -> tuple[LayerProfile, ...]:
    """Infer the specs of all layers, in order.

    Parameters
    ----------
    model : LayerStack
        The layers.
    shape : tuple of int
        Shape of one sample, of its first input where there are several.
    dtype : torch.dtype
        Dtype of the weights.
    input_dtype : torch.dtype, optional
        Dtype of the sample; default: that of the weights.
    other_inputs : sequence of (shape, dtype)
        Further inputs of a sample.

    Raises
    ------
    ConfigError
        A layer cannot take the output of the layer before it, does not return one tensor with the
        samples first, or shares a parameter with another factory's layer. An exception in the
        user's own code keeps its type and traceback.
    """
    inputs = [(shape, input_dtype or dtype), *other_inputs]
    if model.graph is not None:
        return infer_graph(model, model.graph, inputs, dtype)
    layers = model.meta_layers(dtype)
    if not model.builds_all_layers:
        require_unshared(layers)
    specs: list[LayerProfile] = []
    # Layers of equal structure and input are measured once: deep networks repeat their layers.
    measured: dict[Hashable, LayerProfile] = {}
    layer_dtype = inputs[0][1]
    for index, modules in enumerate(layers):
        name, structure = model.names[index], model.structure_key(index)
        spec = measured.get((structure, shape, layer_dtype)) if structure else None
        if spec is None:
            layer = None if modules is None else modules[name]
            try:
                spec = _measure(layer, _builder(model, index, dtype), shape, layer_dtype, name)
            except SeveralTensors:
                return infer_graph(model, chain_graph(model.names), inputs, dtype)
            measured[structure, shape, layer_dtype] = spec
        specs.append(replace(spec, name=name))
        shape, layer_dtype = spec.output_shape, spec.dtype
    return tuple(specs)


def profile_module(
    layer: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str = "",
    device: str = "meta",
) -> LayerProfile:
    """Measure one module by running it on `device`, where its parameters must be.

    Parameters
    ----------
    layer : nn.Module
        A module of one tensor, such as a layer or an auxiliary head. Its buffers may change, and
        so may the states of random number generators.
    shape : tuple of int
        Shape of one sample of the input.
    dtype : torch.dtype
        Dtype of the input.
    name : str
        The layer's name, for the spec and the messages.

    Raises
    ------
    ConfigError
        The result is not one tensor with the samples first.
    """
    if device == "meta" and is_small([layer], shape):
        layer, device = zeros_on_cpu(layer), "cpu"
    with torch.device(device), torch.enable_grad(), without_compiling([layer]):
        sample = torch.zeros(SAMPLES, *shape, dtype=dtype)
        inputs = [sample.requires_grad_()] if has_gradient(dtype) else []
        # A clone, since a layer may work in place and autograd forbids that on a leaf.
        given = sample.clone()
        with record_saved() as sizes:
            output, forward_macs = count_macs(lambda: layer(given))
        if isinstance(output, tuple | list | dict):
            raise SeveralTensors(_output_error(name, shape, output))
        if not isinstance(output, Tensor) or output.shape[:1] != (SAMPLES,):
            raise _output_error(name, shape, output)
        weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        # Weight gradients of inner modules need the input gradients of the modules after them, so
        # the weights' cost is a difference.
        all_macs = backward_macs(output, weights + inputs)
        input_macs = backward_macs(output, inputs)
        return LayerProfile(
            name=name,
            input_shape=tuple(shape),
            output_shape=tuple(output.shape[1:]),
            dtype=output.dtype,
            forward_macs=forward_macs,
            weight_gradient_macs=all_macs - input_macs,
            input_gradient_macs=input_macs,
            parameters=sum(parameter.numel() for parameter in layer.parameters()),
            couples_samples=any(
                isinstance(module, nn.modules.batchnorm._BatchNorm) for module in layer.modules()
            ),
            skippable_macs=all_macs - backward_macs(output, weights),
            reversible=isinstance(layer, Reversible),
            saved=summarise_saved(sizes, _tensors(layer), [given], [output], SAMPLES),
        )


def _tensors(*modules: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of modules."""
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


class AutocastWatch(TorchFunctionMode):
    """Records whether a function of torch is called under autocast.

    Attributes
    ----------
    uses_autocast : bool
        Whether one was called so.
    """

    uses_autocast = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and read the state of autocast."""
        self.uses_autocast = self.uses_autocast or torch.is_autocast_enabled("cpu")
        return func(*args, **(kwargs or {}))


def _profile_draws(
    layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, name: str, device: str = "meta"
) -> LayerProfile:
    """Return the spec of a layer; one that draws random numbers is run `DRAWS` times."""
    spec: LayerProfile | None = None
    for draw in range(DRAWS):
        with fixed_random_numbers(draw) as uses_generators:
            other = profile_module(layer, shape, dtype, name, device)
            is_random = uses_generators()
        spec = other if spec is None else _costlier(spec, other)
        if not is_random:
            break
    assert spec is not None
    return spec


def _costlier(spec: LayerProfile, other: LayerProfile) -> LayerProfile:
    """Return a spec with the larger of each cost.

    Raises
    ------
    ConfigError
        The outputs differ in shape or dtype.
    """
    if (spec.output_shape, spec.dtype) != (other.output_shape, other.dtype):
        raise ConfigError(
            "model.layer-output-random",
            f"layer '{spec.name}' returns {spec.output_shape} {spec.dtype} for some random numbers "
            f"and {other.output_shape} {other.dtype} for others: return the same shape every time",
        )
    costs = ("forward_macs", "weight_gradient_macs", "input_gradient_macs", "skippable_macs")
    return replace(spec, **{cost: max(getattr(spec, cost), getattr(other, cost)) for cost in costs})


def _builder(model: LayerStack, index: int, dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: model.build([index], seed=0, dtype=dtype)[model.names[index]]


class SeveralTensors(Exception):
    """A layer returned a structure of tensors; its argument is the error to raise elsewhere."""


def _measure(
    layer: nn.Module | None,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str,
) -> LayerProfile:
    """Return the spec of a layer, run on meta where that works, else as a copy on the CPU."""
    try:
        if layer is not None:
            with AutocastWatch() as watch:
                spec = _profile_draws(layer, shape, dtype, name)
            if not watch.uses_autocast:  # autocast does nothing on meta
                return spec
    except SeveralTensors:
        raise
    except Exception:  # not supported on meta, or a fault, which the copy repeats
        pass
    copy = build()
    try:
        return _profile_draws(copy, shape, dtype, name, device="cpu")
    except (DtrainError, SeveralTensors):
        raise
    except Exception as error:
        raise_input_error(error, name, shape)


def raise_input_error(error: Exception, name: str, shape: tuple[int, ...]) -> NoReturn:
    """Raise an error of torch's about the input of a layer as a `ConfigError`; another as it is."""
    if not _raised_by_torch(error):
        raise error
    text = str(error).strip().splitlines()[0]
    raise ConfigError(
        "model.layer-input", f"layer '{name}' cannot take a sample of shape {shape}: {text}"
    ) from error


def _raised_by_torch(error: Exception) -> bool:
    """Return whether torch raised the error: its frame is then innermost."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return module.partition(".")[0] == "torch"


def count_macs(function: Callable[[], object]) -> tuple[object, int]:
    """Call a function; return its result and its multiply-adds per sample."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        result = function()
    return result, counter.get_total_flops() // (2 * SAMPLES)


def backward_macs(output: Tensor | Sequence[Tensor], tensors: Sequence[Tensor]) -> int:
    """Return the multiply-adds per sample of the gradients of `output` to `tensors`."""
    outputs = [output] if isinstance(output, Tensor) else list(output)
    outputs = [tensor for tensor in outputs if tensor.requires_grad]
    if not tensors or not outputs:
        return 0
    cotangents = [torch.ones_like(tensor) for tensor in outputs]
    _, macs = count_macs(lambda: gradients(outputs, tensors, cotangents))
    return macs


def _output_error(name: str, shape: tuple[int, ...], output: object) -> DtrainError:
    result = type(output).__name__
    if isinstance(output, Tensor):
        result = f"a tensor of shape {tuple(output.shape)}"
    return ConfigError(
        "model.layer-output",
        f"layer '{name}' returned {result} for {SAMPLES} samples of shape {shape}: return one "
        f"tensor with the samples first",
    )


# ---- graphs


def infer_graph(
    model: LayerStack,
    graph: ModelGraph,
    inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
    dtype: torch.dtype,
) -> tuple[LayerProfile, ...]:
    """Infer the specs of the layers of a graph, which are run on meta, or else as copies."""
    meta_layers = [layer for layer in model.meta_layers(dtype) if layer is not None]
    if len(meta_layers) == len(model.names):
        try:
            return _infer_graph(graph, meta_layers, inputs, "meta")
        except DtrainError:
            raise
        except Exception:  # not supported on meta, or a fault, which the copy repeats
            pass
    return _infer_graph(graph, model.build_each(range(len(model.names)), 0, dtype), inputs, "cpu")


def _infer_graph(
    graph: ModelGraph,
    layers: Sequence[Mapping[str, nn.Module]],
    inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
    device: str,
) -> tuple[LayerProfile, ...]:
    """Run the layers with two numbers of samples, and measure them with the smaller one."""
    modules = {name: module for layer in layers for name, module in layer.items()}
    tensors = {name: t for layer in layers for name, t in free_tensors(layer).items()}
    runs = [
        {
            name: torch.zeros(rows, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in zip(graph.inputs, inputs, strict=True)
        }
        | dict(graph.defaults)
        for rows in (SAMPLES, SAMPLES + 1)
    ]
    few, more = runs
    specs: list[LayerProfile] = []
    previous = inputs[0][0]
    for layer in graph.layers:
        with (
            torch.device(device),
            fixed_random_numbers(0),
            without_compiling(modules[path] for path in layer.modules),
        ):
            before = _versions(few, layer.reads)
            for run in runs:
                keep = {*run, *layer.writes}
                with torch.no_grad():
                    try:
                        graph.run(layer.nodes, modules, tensors, run, keep, no_context)
                    except Exception as error:
                        raise_input_error(error, layer.name, previous)
            overwritten = [n for n, v in _versions(few, layer.reads).items() if v != before[n]]
            writes = [compare_values(n, few[n], more[n], SAMPLES) for n in layer.writes]
            spec = _profile_layer(graph, layer, modules, tensors, runs[0], writes, previous)
            spec = replace(spec, overwrites=tuple(overwritten))
        specs.append(spec)
        previous = spec.output_shape
    return tuple(specs)


def _versions(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[int]]:
    """Return how often the tensors of values were written to, by name of the value."""
    leaves = {name: pytree.tree_leaves(values[name]) for name in names}
    return {
        name: [leaf._version for leaf in value if isinstance(leaf, Tensor)]
        for name, value in leaves.items()
    }


def _profile_layer(
    graph: ModelGraph,
    layer: GraphLayer,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    writes: Sequence[NodeValue],
    previous: tuple[int, ...],
) -> LayerProfile:
    """Return the spec of one layer of a graph, given the values that it reads."""
    leaves: list[Tensor] = []

    def detach(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        copy = leaf.detach().clone()
        if not has_gradient(copy.dtype):
            return copy
        leaves.append(copy.requires_grad_())
        return copy.clone()

    env = {name: pytree.tree_map(detach, values[name]) for name in layer.reads}
    with torch.enable_grad():
        given = [leaf for leaf in pytree.tree_leaves(env) if isinstance(leaf, Tensor)]
        with record_saved() as sizes:
            _, forward = count_macs(
                lambda: graph.run(layer.nodes, modules, tensors, env, layer.writes, no_context)
            )
        outputs = [t for value in writes for t in value.flatten(env[value.node]).values()]
        own = [modules[path] for path in layer.modules]
        own_tensors = [*_tensors(*own), *(tensors[name] for name in layer.tensors)]
        parameters = {id(p): p for module in own for p in module.parameters()}
        parameters |= {
            id(tensors[n]): cast(nn.Parameter, tensors[n])
            for n in layer.tensors
            if isinstance(tensors[n], nn.Parameter)
        }
        weights = [p for p in parameters.values() if p.requires_grad]
        all_macs = backward_macs(outputs, weights + leaves)
        input_macs = backward_macs(outputs, leaves)
        skippable = all_macs - backward_macs(outputs, weights)
    main = main_tensor(writes)
    norms = nn.modules.batchnorm._BatchNorm
    return LayerProfile(
        name=layer.name,
        input_shape=previous,
        output_shape=() if main is None else main.sample_shape or (),
        dtype=torch.float32 if main is None else main.dtype,
        forward_macs=forward,
        weight_gradient_macs=all_macs - input_macs,
        input_gradient_macs=input_macs,
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        couples_samples=any(isinstance(m, norms) for module in own for m in module.modules()),
        skippable_macs=skippable,
        reads=layer.reads,
        writes=tuple(writes),
        main_value="" if main is None else main.name,
        saved=summarise_saved(sizes, own_tensors, given, outputs, SAMPLES),
    )


def main_tensor(writes: Sequence[NodeValue]) -> TensorSpec | None:
    """Return the tensor that a block passes on as its output: the first one with the samples first
    of the last value that has one; a complex one only where there is no real one."""
    tensors = [
        tensor
        for value in reversed(writes)
        for tensor in value.tensors
        if tensor.sample_shape is not None and has_gradient(tensor.dtype)
    ]
    return next((t for t in tensors if t.dtype.is_floating_point), next(iter(tensors), None))


def free_tensors(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the parameters and buffers outside sub-modules, by dotted name."""
    if "" not in layers:
        return {}
    return {**dict(layers[""].named_parameters()), **dict(layers[""].named_buffers())}


def no_context(_name: str) -> AbstractContextManager[None]:
    """Return the context of calls whose random numbers do not matter."""
    return nullcontext()
