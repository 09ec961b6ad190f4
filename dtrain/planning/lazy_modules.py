"""Lazy modules: parameters that get their shapes from the first input.

Invariant: the weights depend on the seed and the block alone, not on the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from dtrain.rng import seeded

if TYPE_CHECKING:  # a layout's cuts may ask for lazy modules
    from dtrain.planning.layout import Layout

ROWS = 2


def is_lazy(modules: Iterable[nn.Module]) -> bool:
    """Return whether a module has parameters or buffers without a shape."""
    return any(
        isinstance(tensor, UninitializedTensorMixin)
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    )


def materialise(layout: Layout, index: int, layers: Mapping[str, nn.Module], seed: int) -> None:
    """Give the lazy modules of a block their shapes and weights, by running it on zeros."""
    if not is_lazy(layers.values()):
        return
    block_layout, dtype = layout.block_layouts[index], layout.dtype
    spec, program = block_layout.spec, layout.program(index)
    dtype = layout.block_specs[index - 1].dtype if index else spec.sample_dtype(dtype)
    first = layout.layer_specs[block_layout.layers.start]
    x = torch.zeros(ROWS, *first.input_shape, dtype=dtype)
    with torch.no_grad(), seeded(seed, f"lazy.{index}"):
        for layer in layers.values():
            layer.eval()
        if program is None:
            for layer in layers.values():
                x = layer(x)
        else:
            inputs = {program.main_input: x}
            for skip in spec.skip_inputs:
                tensor = skip.tensor
                inputs[tensor.name] = torch.zeros(tensor.shape(ROWS), dtype=tensor.dtype)
            others = [(spec.sample_shape, dtype), *spec.other_inputs]
            for name, number in program.data_inputs.items():
                shape, input_dtype = others[number]
                inputs[name] = torch.zeros(ROWS, *shape, dtype=input_dtype)
            program.run(layers, inputs, lambda _name: nullcontext())
        for layer in layers.values():
            layer.train()
