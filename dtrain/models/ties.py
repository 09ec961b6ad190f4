"""Tied parameters: one parameter of the user's module that layers of several blocks use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from dtrain.errors import ConfigError
from dtrain.models.layers import LayerStack, merge_layers


class TiedCopy(NamedTuple):
    """The copy of a tied parameter in one block, under its name there."""

    block: int
    name: str


Ties = tuple[tuple[TiedCopy, ...], ...]
"""The copies of every parameter that several blocks hold, in the order of the blocks."""


def find_ties(model: LayerStack, layers: Sequence[range]) -> Ties:
    """Return the parameters that several blocks hold.

    Inside a block a shared parameter is one parameter, under the first of its names.

    Parameters
    ----------
    layers : sequence of range
        The layers of each block.

    Raises
    ------
    ConfigError
        Blocks share a buffer, which only one of them would update.
    """
    if not model.tied_names:
        return ()
    meta_layers = model.meta_layers(torch.float32)
    holders: dict[str, dict[int, str]] = {}
    for block, indices in enumerate(layers):
        modules = merge_layers(layer for i in indices if (layer := meta_layers[i]) is not None)
        for root, module in modules.items():
            for name, tensor in module.state_dict(keep_vars=True).items():
                path = f"{root}.{name}".strip(".")
                first = model.tied_names.get(path, path)
                blocks = holders.setdefault(first, {})
                if blocks.keys() - {block} and not isinstance(tensor, nn.Parameter):
                    raise ConfigError(
                        "model.shared-buffer",
                        f"buffer '{path}' is the same tensor as '{first}' of an earlier block: "
                        f"cut elsewhere, or make one for each layer",
                    )
                blocks.setdefault(block, path)
    return tuple(
        tuple(TiedCopy(block, name) for block, name in sorted(blocks.items()))
        for blocks in holders.values()
        if len(blocks) > 1
    )
