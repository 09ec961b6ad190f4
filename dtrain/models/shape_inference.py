"""Shapes and costs of all layers, inferred on every rank without communication.

All layers are run once on the meta device, which has shapes but no memory. Multiply-adds are
counted with torch's flop counter (one multiply-add is two flops) over two samples, since batch
normalisation needs two. A layer that cannot run on meta, or that uses autocast, which does nothing
there, is run on the CPU, as a temporary copy, on zeros. A layer that draws random numbers is run
several times, with fixed seeds, and costed by the most that it cost.

Invariant: a `LayerSpec` depends only on model, shape and dtype. It is the same on every machine and
for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dtrain.errors import ConfigError, DtrainError
from dtrain.models.compiled import without_compiling
from dtrain.models.layers import LayerStack, require_unshared
from dtrain.rng import fixed_random_numbers

SAMPLES = 2


DRAWS = 8
"""Runs of a layer that draws random numbers: one that is skipped half of the time is once run."""


@final
@dataclass(frozen=True)
class LayerSpec:
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


def infer_layers(
    model: LayerStack, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[LayerSpec, ...]:
    """Infer the specs of all layers, in order.

    Parameters
    ----------
    model : LayerStack
        The layers.
    shape : tuple of int
        Shape of one sample.
    dtype : torch.dtype
        Dtype of the weights and of the sample.

    Raises
    ------
    ConfigError
        A layer cannot take the output of the layer before it, does not return one tensor with the
        samples first, or shares a module or parameter. An exception in the user's own code keeps
        its type and traceback.
    """
    layers = model.meta_layers(dtype)
    require_unshared(
        {name: layer for name, layer in zip(model.names, layers, strict=True) if layer is not None}
    )
    specs: list[LayerSpec] = []
    # Layers of equal structure and input are measured once: deep networks repeat their layers.
    measured: dict[Hashable, LayerSpec] = {}
    input_dtype = dtype
    for index, layer in enumerate(layers):
        name, structure = model.names[index], model.structure_key(index)
        spec = measured.get((structure, shape, input_dtype)) if structure else None
        if spec is None:
            spec = _measure(layer, _builder(model, index, dtype), shape, input_dtype, name)
            measured[structure, shape, input_dtype] = spec
        specs.append(replace(spec, name=name))
        shape, input_dtype = spec.output_shape, spec.dtype
    return tuple(specs)


def profile_module(
    layer: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str = "",
    device: str = "meta",
) -> LayerSpec:
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
    with torch.device(device), torch.enable_grad(), without_compiling([layer]):
        sample = torch.zeros(SAMPLES, *shape, dtype=dtype)
        inputs = [sample.requires_grad_()] if dtype.is_floating_point else []
        # A clone, since a layer may work in place and autograd forbids that on a leaf.
        output, forward_macs = _count_macs(lambda: layer(sample.clone()))
        if not isinstance(output, Tensor) or output.shape[:1] != (SAMPLES,):
            raise _output_error(name, shape, output)
        weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        # Weight gradients of inner modules need the input gradients of the modules after them, so
        # the weights' cost is a difference.
        all_macs = _backward_macs(output, weights + inputs)
        input_macs = _backward_macs(output, inputs)
        return LayerSpec(
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
            skippable_macs=all_macs - _backward_macs(output, weights),
        )


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
) -> LayerSpec:
    """Return the spec of a layer; one that draws random numbers is run `DRAWS` times."""
    spec: LayerSpec | None = None
    for draw in range(DRAWS):
        with fixed_random_numbers(draw) as uses_generators:
            other = profile_module(layer, shape, dtype, name, device)
            is_random = uses_generators()
        spec = other if spec is None else _costlier(spec, other)
        if not is_random:
            break
    assert spec is not None
    return spec


def _costlier(spec: LayerSpec, other: LayerSpec) -> LayerSpec:
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


def _measure(
    layer: nn.Module | None,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str,
) -> LayerSpec:
    """Return the spec of a layer, run on meta where that works, else as a copy on the CPU."""
    try:
        if layer is not None:
            with AutocastWatch() as watch:
                spec = _profile_draws(layer, shape, dtype, name)
            if not watch.uses_autocast:  # autocast does nothing on meta
                return spec
    except Exception:  # not supported on meta, or a fault, which the copy repeats
        pass
    copy = build()
    try:
        return _profile_draws(copy, shape, dtype, name, device="cpu")
    except DtrainError:
        raise
    except Exception as error:
        if not _raised_by_torch(error):
            raise
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


def _count_macs(function: Callable[[], object]) -> tuple[object, int]:
    """Call a function; return its result and its multiply-adds per sample."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops() // (2 * SAMPLES)


def _backward_macs(output: Tensor, tensors: Sequence[Tensor]) -> int:
    """Return the multiply-adds per sample of the gradients to `tensors`."""
    if not tensors or not output.requires_grad:
        return 0
    cotangent = torch.ones_like(output)
    _, macs = _count_macs(
        lambda: torch.autograd.grad(
            output, tensors, cotangent, retain_graph=True, allow_unused=True
        )
    )
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
