"""Tied parameters: one parameter of the user's module that layers of several blocks use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dtrain.errors import ConfigError
from dtrain.models.layers import LayerStack, merge_layers


class TiedCopy(NamedTuple):
    """The copy of a tied parameter in one block, under its name there.

    `module_class` is the class of the module that holds it.
    """

    block: int
    name: str
    module_class: str


@dataclass(frozen=True)
class Tie:
    """A trained parameter that several blocks hold.

    Attributes
    ----------
    copies : tuple of TiedCopy
        Its copies, in the order of the blocks.
    nbytes : int
        Bytes of one copy; 0 if a lazy layer has not got its shape yet.
    """

    copies: tuple[TiedCopy, ...]
    nbytes: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that hold a copy."""
        return tuple(copy.block for copy in self.copies)


Ties = tuple[Tie, ...]


def find_ties(
    model: LayerStack, layers: Sequence[range], dtype: torch.dtype = torch.float32
) -> Ties:
    """Return the parameters with `requires_grad` that several blocks hold.

    Inside a block a shared parameter is one parameter, under the first of its names.

    Parameters
    ----------
    layers : sequence of range
        The layers of each block.
    dtype : torch.dtype
        That of the model.

    Raises
    ------
    ConfigError
        Blocks share a buffer, which only one of them would update.
    """
    if not model.tied_names:
        return ()
    meta_layers = model.meta_layers(dtype)
    holders: dict[str, dict[int, TiedCopy]] = {}
    tensors: dict[str, Tensor] = {}
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
                owner = module.get_submodule(name.rpartition(".")[0])
                blocks.setdefault(block, TiedCopy(block, path, type(owner).__name__))
                tensors[first] = tensor
    return tuple(
        Tie(
            tuple(copy for _, copy in sorted(blocks.items())),
            0 if is_lazy(tensors[first]) else tensors[first].nbytes,
        )
        for first, blocks in holders.items()
        if len(blocks) > 1 and tensors[first].requires_grad
    )
