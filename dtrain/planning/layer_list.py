"""The layers of a model for people and for functions that choose cuts: sizes, costs, messages.

Invariant: no MPI, and no weights are made where the layers run on the meta device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError, DataError
from dtrain.models import load_model
from dtrain.models.flow import block_flows
from dtrain.models.graph import ModelGraph, chain_graph
from dtrain.models.integer_inputs import takes_integers
from dtrain.models.layers import LayerStack, as_layers
from dtrain.models.shape_inference import LayerProfile, infer_layers
from dtrain.object_names import object_name
from dtrain.planning.block_costs import total_macs
from dtrain.planning.formatting import align_columns
from dtrain.user_code import bind_arguments

Model = nn.Module | Callable[..., object] | Sequence[tuple[str, Callable[[], nn.Module]]] | str
"""A module, a function that makes one, a list of (name, factory), or "module:function"."""

NAMES_SHOWN = 3
"""Skips that a row of the table names."""


@final
@dataclass(frozen=True)
class LayerSpec:
    """One layer, and the messages of a cut before it; all sizes are those of one sample.

    Attributes
    ----------
    name : str
        Its name in `[partition] cuts`.
    input_shape, output_shape : tuple of int
        Shape of its input and of its output.
    parameters : int
        Parameter elements.
    flops : int
        Floating-point operations, forward and backward; two for each multiply-add.
    activation_bytes : int
        Bytes that its block keeps from the forward to the backward on its account. A block keeps
        the sum over its layers and its input.
    cut_bytes, cut_tensors : int
        Bytes and number of the tensors that a cut before this layer would send forward; 0 where no
        cut can stand.
    skips : tuple of str
        Names of those that are not the output of the layer before.
    can_cut : bool
        Whether a block may start at this layer.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    flops: int
    activation_bytes: int
    cut_bytes: int = 0
    cut_tensors: int = 0
    skips: tuple[str, ...] = ()
    can_cut: bool = True


@final
class LayerList(list[LayerSpec]):
    """Layers in order; its text is a table."""

    def __str__(self) -> str:
        head = ("", "layer", "input", "output", "parameters", "flops", "activations", "a cut here")
        rows = [head, *(_row(number, layer) for number, layer in enumerate(self))]
        note = "flops and bytes of one sample; [partition] cuts names layers or their numbers"
        return "\n".join([*align_columns(rows), note])

    __repr__ = __str__


def list_layers(
    model: Model,
    example: Any,
    *,
    open: Collection[str] = (),
    classes: int = 0,
    **options: object,
) -> LayerList:
    """Return the layers at which a model may be cut.

    Parameters
    ----------
    model : nn.Module, callable, list of (name, factory) or str
        The model, as `dtrain.Run` takes it. A string names a function, "module:function" in the
        current folder or on Python's path, or a model of dtrain.
    example : array or tensor, or tuple of these
        Samples, rows first; a tuple for a model of several inputs. Values do not matter.
    open : collection of str
        Dotted names of sub-modules whose parts are layers of their own.
    classes : int
        Number of classes, for a function with that argument.
    **options
        Further arguments of the function.

    Raises
    ------
    DataError
        The example has no rows.
    ConfigError
        The model has no legal layers, or cannot take the example.
    """
    examples = example if isinstance(example, tuple) else (example,)
    tensors = [_as_rows(item) for item in examples]
    shape = tuple(tensors[0].shape[1:])
    stack = _as_stack(model, shape, classes, len(tensors), open, options)
    others = [(tuple(t.shape[1:]), _weight_dtype(t)) for t in tensors[1:]]
    dtype = torch.float32
    integers = takes_integers(stack, shape, tensors[0].dtype, others)
    profiles = infer_layers(stack, shape, dtype, torch.int64 if integers else dtype, others)
    return describe_layers(profiles, stack)


def describe_layers(profiles: Sequence[LayerProfile], model: LayerStack) -> LayerList:
    """Return the public description of inferred layers."""
    graph = (model.graph or chain_graph(model.names)) if any(p.writes for p in profiles) else None
    kept = activation_bytes(profiles)
    return LayerList(
        LayerSpec(
            profile.name,
            profile.input_shape,
            profile.output_shape,
            profile.parameters,
            2 * total_macs(profile),
            kept[index],
            *_cut_before(index, profiles, graph),
        )
        for index, profile in enumerate(profiles)
    )


def activation_bytes(profiles: Sequence[LayerProfile]) -> list[int]:
    """Return the bytes of one sample that a block keeps on account of each layer.

    A tensor that several layers keep counts for the layer that makes it. The input of the block is
    not counted.
    """
    makers = _makers(profiles)
    own = [profile.saved.inner for profile in profiles]
    for maker in _kept_outputs(profiles, makers):
        own[maker] += output_bytes(profiles[maker])
    return own


def unkept_output_bytes(profiles: Sequence[LayerProfile]) -> list[int]:
    """Return the bytes of one sample of each layer's output that `activation_bytes` leaves out, as
    no layer keeps it; a block keeps that of its last layer all the same."""
    makers = _makers(profiles)
    kept = _kept_outputs(profiles, makers)
    return [
        0 if maker is None or maker in kept else output_bytes(profile)
        for profile, maker in zip(profiles, makers, strict=True)
    ]


def _makers(profiles: Sequence[LayerProfile]) -> list[int | None]:
    """Return the layer that makes the memory of each layer's output; None: the model's input."""
    makers: list[int | None] = []
    for index, profile in enumerate(profiles):
        before = makers[-1] if makers else None
        makers.append(before if profile.saved.is_view else index)
    return makers


def _kept_outputs(profiles: Sequence[LayerProfile], makers: Sequence[int | None]) -> set[int]:
    """Return the layers whose output some layer keeps for its backward."""
    inputs = [None, *makers[:-1]]
    kept = {maker for p, maker in zip(profiles, makers, strict=True) if p.saved.keeps_output}
    kept |= {maker for p, maker in zip(profiles, inputs, strict=True) if p.saved.keeps_input}
    return {maker for maker in kept if maker is not None}


def output_bytes(profile: LayerProfile) -> int:
    """Return the bytes of a layer's output for one sample."""
    return math.prod(profile.output_shape) * profile.dtype.itemsize


def _cut_before(
    index: int, profiles: Sequence[LayerProfile], graph: ModelGraph | None
) -> tuple[int, int, tuple[str, ...], bool]:
    """Return bytes, tensors and skips of a cut before a layer, and whether it is legal."""
    if not index or not profiles[index - 1].dtype.is_floating_point:
        return 0, 0, (), False
    main = output_bytes(profiles[index - 1])
    if graph is None:
        return main, 1, (), True
    blocks = [range(index), range(index, len(profiles))]
    try:
        skips = [skip.tensor for skip in block_flows(graph, profiles, blocks)[1].skip_inputs]
    except ConfigError:
        return 0, 0, (), False
    size = main + sum(math.prod(skip.shape(1)) * skip.dtype.itemsize for skip in skips)
    return size, 1 + len(skips), tuple(skip.name for skip in skips), True


def _as_stack(
    model: Model,
    shape: tuple[int, ...],
    classes: int,
    inputs: int,
    open_names: Collection[str],
    options: dict[str, object],
) -> LayerStack:
    """Return the layers of a model of any form."""
    if isinstance(model, str):
        return load_model(model, options, Path.cwd(), shape, classes, inputs, open_names)
    if isinstance(model, nn.Module):
        return as_layers(partial(_copy, model), type(model).__name__, inputs, open_names)
    if not callable(model):
        pairs = list(model)
        return as_layers(lambda: pairs, "list", inputs, open_names)
    context = {"shape": shape, "classes": classes}
    arguments = bind_arguments("[model]", model, options, context)
    name = object_name(model)
    return as_layers(partial(model, **arguments), name, inputs, open_names)


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module on torch's default device, which is meta while shapes are taken."""
    return copy.deepcopy(module).to(torch.get_default_device())


def _as_rows(example: Any) -> Tensor:
    """Return an example as a tensor with at least one row."""
    rows = torch.as_tensor(example)
    if rows.ndim < 1 or len(rows) < 1:
        raise DataError(
            "layers.example-empty",
            f"example has the shape {tuple(rows.shape)}: give samples with the rows first, at "
            "least one, such as x[:2]",
        )
    return rows


def _weight_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _row(number: int, layer: LayerSpec) -> tuple[str, ...]:
    """Return the cells of one layer."""
    return (
        str(number),
        layer.name,
        _shape_text(layer.input_shape),
        _shape_text(layer.output_shape),
        f"{layer.parameters:,}",
        f"{layer.flops:,}",
        f"{layer.activation_bytes:,}",
        _cut_text(layer) if number else "-",
    )


def _cut_text(layer: LayerSpec) -> str:
    if not layer.can_cut:
        return "impossible"
    skips = list(layer.skips[:NAMES_SHOWN]) + ["..."] * (len(layer.skips) > NAMES_SHOWN)
    noun = "tensor" if layer.cut_tensors == 1 else "tensors"
    text = f"{layer.cut_bytes:,} bytes in {layer.cut_tensors} {noun}"
    return f"{text} (skips {' '.join(skips)})" if skips else text


def _shape_text(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "()"
