"""Whether a model takes samples of integers as they are: token ids, categories, counts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dtrain.models.graph import has_gradient
from dtrain.models.layers import LayerStack, merge_layers
from dtrain.models.shape_inference import SAMPLES, free_tensors
from dtrain.rng import fixed_random_numbers

IMAGE_DIMENSIONS = 3
"""Dimensions of a sample from which bytes are taken for an image."""


InputShapes = Sequence[tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each input of a sample."""


def takes_integers(
    model: LayerStack,
    shape: tuple[int, ...],
    input_dtype: torch.dtype,
    other_inputs: InputShapes = (),
) -> bool:
    """Return whether samples are given to a model as integers, neither scaled nor standardised.

    They are if its first layers run on integers, as an embedding does; linear layers and
    convolutions refuse them. Bytes of images (C, H, W) are real numbers wherever that works, too.

    Parameters
    ----------
    shape : tuple of int
        Shape of one sample.
    input_dtype : torch.dtype
        Dtype of the stored samples; the answer is False for real numbers.
    other_inputs : sequence of (shape, dtype)
        Further inputs of a sample.
    """
    if has_gradient(input_dtype):
        return False

    def runs_on(dtype: torch.dtype) -> bool:
        try:
            with torch.no_grad(), fixed_random_numbers(0):
                return _reaches_real_numbers(model, [(shape, dtype), *other_inputs])
        except Exception:  # of any kind: a real fault is raised again when the run is laid out
            return False

    are_images = input_dtype == torch.uint8 and len(shape) >= IMAGE_DIMENSIONS
    return runs_on(torch.int64) and not (are_images and runs_on(torch.float32))


def _reaches_real_numbers(model: LayerStack, inputs: InputShapes) -> bool:
    """Run layers on zeros until one returns real numbers alone; return whether one does.

    They are run on the CPU: on the meta device torch does not compare dtypes.
    """
    count = len(model.names)
    built = model.build_each(range(count), 0, torch.float32) if model.builds_all_layers else []
    zeros = [torch.zeros(SAMPLES, *shape, dtype=dtype) for shape, dtype in inputs]
    values: dict[str, Any] = {}
    if model.graph is not None:
        values = dict(zip(model.graph.inputs, zeros, strict=True)) | dict(model.graph.defaults)
    x: Any = zeros[0]
    for index in range(count):
        layer = built[index] if built else model.build([index], 0, torch.float32)
        if model.graph is None:
            [module] = layer.values()
            x = module(x)
        else:
            modules = merge_layers(built)
            x = _run_graph_layer(model, index, modules, values)
        tensors = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
        if all(has_gradient(tensor.dtype) for tensor in tensors):
            return True
    return False


def _run_graph_layer(
    model: LayerStack, index: int, modules: dict[str, nn.Module], values: dict[str, Any]
) -> list[Any]:
    """Run one layer of a graph; return the values that later layers read."""
    assert model.graph is not None
    layer = model.graph.layers[index]
    keep = {*values, *layer.writes}
    tensors = free_tensors(modules)
    model.graph.run(layer.nodes, modules, tensors, values, keep, lambda _name: nullcontext())
    return [values[name] for name in layer.writes]
