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

from dtrain.errors import Refusal
from dtrain.models.model import Model, unshared

SAMPLES = 2


@final
@dataclass(frozen=True)
class Spec:
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
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: torch.dtype
    forward: int
    weight_gradient: int
    input_gradient: int
    parameters: int
    couples: bool = False
    unasked: int = 0


def walk(model: Model, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Spec, ...]:
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
    Refusal
        A layer that cannot take what the one before it gives, does not return one tensor with the
        samples first, or shares a module or parameter. An exception that is raised in the user's
        own code keeps its traceback.
    """
    layers = model.skeletons(dtype)
    unshared(
        {name: layer for name, layer in zip(model.names, layers, strict=True) if layer is not None}
    )
    specs: list[Spec] = []
    known: dict[Hashable, Spec] = {}  # a deep net repeats itself: equal layers are counted once
    entering = dtype
    for index, layer in enumerate(layers):
        name, kind = model.names[index], model.kind(index)
        spec = known.get((kind, shape, entering)) if kind else None
        if spec is None:
            build = _builder(model, index, dtype)
            spec = _measure(layer, build, shape, entering, name)
            known[kind, shape, entering] = spec
        spec = replace(spec, name=name)
        specs.append(spec)
        shape, entering = spec.outputs, spec.dtype
    return tuple(specs)


def count(
    layer: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str = "",
    device: str = "meta",
) -> Spec:
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
    Refusal
        A result that is not one tensor with the samples first.
    """
    with torch.device(device), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        sample = torch.zeros(SAMPLES, *shape, dtype=dtype)
        entering = [sample.requires_grad_()] if dtype.is_floating_point else []
        # A copy enters, since a layer may work in place and a leaf may not be written to.
        leaving, forward = _counted(lambda: layer(sample.clone()))
        if not isinstance(leaving, Tensor) or leaving.shape[:1] != (SAMPLES,):
            raise _batchless(name, shape, leaving)
        weights = [each for each in layer.parameters() if each.requires_grad]
        inside = list(layer.modules())
        # The way to weights deep inside leads through the input gradients of those behind them.
        both, passed = _backward(leaving, weights + entering), _backward(leaving, entering)
        return Spec(
            name=name,
            inputs=tuple(shape),
            outputs=tuple(leaving.shape[1:]),
            dtype=leaving.dtype,
            forward=forward,
            weight_gradient=both - passed,
            input_gradient=passed,
            parameters=sum(each.numel() for each in layer.parameters()),
            couples=any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in inside),
            unasked=both - _backward(leaving, weights),
        )


def _builder(model: Model, index: int, dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: model.build([index], seed=0, dtype=dtype)[model.names[index]]


def _measure(
    layer: nn.Module | None,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str,
) -> Spec:
    """Return the spec of a layer: on meta where that works, else of a real copy."""
    try:
        if layer is not None:
            return count(layer, shape, dtype, name)
    except Exception:  # whatever meta cannot do; a true fault shows again on the copy
        pass
    real = build()
    try:
        return count(real, shape, dtype, name, device="cpu")
    except Refusal:
        raise
    except Exception as error:
        if not _torch(error):
            raise
        text = str(error).strip().splitlines()[0]
        raise Refusal(f"layer '{name}' cannot take a sample of shape {shape}: {text}") from error


def _torch(error: Exception) -> bool:
    """Say whether torch itself raised: under the counter, every operation passes through it."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    module = step.tb_frame.f_globals.get("__name__", "") if step is not None else ""
    return module.partition(".")[0] == "torch"


def _counted(run: Callable[[], object]) -> tuple[object, int]:
    """Return what `run` returns and its multiply-adds per sample."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops() // (2 * SAMPLES)


def _backward(leaving: Tensor, tensors: Sequence[Tensor]) -> int:
    """Return the cost of the gradients to `tensors` alone."""
    if not tensors or not leaving.requires_grad:
        return 0
    told = torch.ones_like(leaving)
    return _counted(
        lambda: torch.autograd.grad(leaving, tensors, told, retain_graph=True, allow_unused=True)
    )[1]


def _batchless(name: str, shape: tuple[int, ...], leaving: object) -> Refusal:
    gave = (
        f"a tensor of shape {tuple(leaving.shape)}"
        if isinstance(leaving, Tensor)
        else type(leaving).__name__
    )
    return Refusal(
        f"layer '{name}' made {gave} of {SAMPLES} samples of shape {shape}: a layer "
        f"returns one tensor with the samples first"
    )
