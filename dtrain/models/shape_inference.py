"""Walk: shapes and costs of all layers, known to every rank without a message.

One walk over the whole list on the meta device, which has shapes but no memory. Multiply-adds are
counted by torch's flop counter (one multiply-add is two flops) over two samples, since
normalisation over a batch refuses one. A layer that cannot run on meta is run for real, on zeros,
in a transient copy.

Invariant: a `Spec` depends on the model, the shape and the dtype alone: it is the same on every
machine and for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dtrain.errors import ConfigError, DtrainError
from dtrain.models.layers import LayerStack, require_unshared

SAMPLES = 2


@final
@dataclass(frozen=True)
class LayerSpec:
    """Shapes and costs of one layer; costs are multiply-adds of ONE sample.

    Parameters
    ----------
    name : str
        The layer's name.
    inputs, outputs : tuple of int
        Shape of one sample that enters and leaves.
    dtype : torch.dtype
        Of what leaves.
    forward : int
        Cost of the forward.
    weight_gradient, input_gradient : int
        Cost of the two halves of the backward; what leads from one module inside the layer to the
        one before it belongs to the second.
    unasked : int
        What the backward saves where nobody asks for the gradient of what enters.
    parameters : int
        Number of parameters (elements).
    couples : bool
        Whether it has batch statistics, so that samples of a micro-batch depend on each other.
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
    """Return the specs of all layers, in order.

    Parameters
    ----------
    model : Model
        Whose layers are walked.
    shape : tuple of int
        Shape of one sample.
    dtype : torch.dtype
        Of the weights and of the sample.

    Raises
    ------
    DtrainError
        A layer that cannot take what the one before it gives, does not return one tensor with the
        samples first, or shares a module or parameter. An exception that is raised in the user's
        own code keeps its traceback.
    """
    layers = model.meta_layers(dtype)
    require_unshared(
        {name: layer for name, layer in zip(model.names, layers, strict=True) if layer is not None}
    )
    specs: list[LayerSpec] = []
    known: dict[
        Hashable, LayerSpec
    ] = {}  # a deep net repeats itself: equal layers are counted once
    entering = dtype
    for index, layer in enumerate(layers):
        name, kind = model.names[index], model.structure_key(index)
        spec = known.get((kind, shape, entering)) if kind else None
        if spec is None:
            build = _builder(model, index, dtype)
            spec = _measure(layer, build, shape, entering, name)
            known[kind, shape, entering] = spec
        spec = replace(spec, name=name)
        specs.append(spec)
        shape, entering = spec.output_shape, spec.dtype
    return tuple(specs)


def profile_module(
    layer: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str = "",
    device: str = "meta",
) -> LayerSpec:
    """Return the spec of one module, by running it on `device`, where its parameters must be.

    Parameters
    ----------
    layer : nn.Module
        Any module of one tensor; a local head is costed in the same way. Its buffers may change.
    shape : tuple of int
        Shape of one sample that enters.
    dtype : torch.dtype
        Of what enters.

    Raises
    ------
    DtrainError
        A result that is not one tensor with the samples first.
    """
    with torch.device(device), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        sample = torch.zeros(SAMPLES, *shape, dtype=dtype)
        entering = [sample.requires_grad_()] if dtype.is_floating_point else []
        # A copy enters, since a layer may work in place and a leaf may not be written to.
        leaving, forward = _count_macs(lambda: layer(sample.clone()))
        if not isinstance(leaving, Tensor) or leaving.shape[:1] != (SAMPLES,):
            raise _output_error(name, shape, leaving)
        weights = [each for each in layer.parameters() if each.requires_grad]
        inside = list(layer.modules())
        # The way to weights deep inside leads through the input gradients of those behind them.
        both, passed = (
            _backward_macs(leaving, weights + entering),
            _backward_macs(leaving, entering),
        )
        return LayerSpec(
            name=name,
            input_shape=tuple(shape),
            output_shape=tuple(leaving.shape[1:]),
            dtype=leaving.dtype,
            forward_macs=forward,
            weight_gradient_macs=both - passed,
            input_gradient_macs=passed,
            parameters=sum(each.numel() for each in layer.parameters()),
            couples_samples=any(
                isinstance(each, nn.modules.batchnorm._BatchNorm) for each in inside
            ),
            skippable_macs=both - _backward_macs(leaving, weights),
        )


def _builder(model: LayerStack, index: int, dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: model.build([index], seed=0, dtype=dtype)[model.names[index]]


def _measure(
    layer: nn.Module | None,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str,
) -> LayerSpec:
    """Return the spec of a layer: on meta where that works, else of a real copy."""
    try:
        if layer is not None:
            return profile_module(layer, shape, dtype, name)
    except Exception:  # whatever meta cannot do; a true fault shows again on the copy
        pass
    real = build()
    try:
        return profile_module(real, shape, dtype, name, device="cpu")
    except DtrainError:
        raise
    except Exception as error:
        if not _raised_by_torch(error):
            raise
        text = str(error).strip().splitlines()[0]
        raise ConfigError(
            "todo.key", f"layer '{name}' cannot take a sample of shape {shape}: {text}"
        ) from error


def _raised_by_torch(error: Exception) -> bool:
    """Say whether torch itself raised: under the counter, every operation passes through it."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    module = step.tb_frame.f_globals.get("__name__", "") if step is not None else ""
    return module.partition(".")[0] == "torch"


def _count_macs(function: Callable[[], object]) -> tuple[object, int]:
    """Return what `run` returns and its multiply-adds per sample."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops() // (2 * SAMPLES)


def _backward_macs(output: Tensor, tensors: Sequence[Tensor]) -> int:
    """Return the cost of the gradients to `tensors` alone."""
    if not tensors or not output.requires_grad:
        return 0
    told = torch.ones_like(output)
    return _count_macs(
        lambda: torch.autograd.grad(output, tensors, told, retain_graph=True, allow_unused=True)
    )[1]


def _output_error(name: str, shape: tuple[int, ...], output: object) -> DtrainError:
    gave = (
        f"a tensor of shape {tuple(output.shape)}"
        if isinstance(output, Tensor)
        else type(output).__name__
    )
    return ConfigError(
        "todo.key",
        f"layer '{name}' made {gave} of {SAMPLES} samples of shape {shape}: a layer "
        f"returns one tensor with the samples first",
    )
