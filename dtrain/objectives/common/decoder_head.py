"""Decoder heads: private layers like those that follow the block, and a copy of the model's head.

::

    block k --h--> next block                            model:  ... layer - layer - norm, matrix
              |                                                                            |
              '--> private layer x n --> norm, matrix --> scores                           |
                                    own: trained   or   shared: frozen <----- route -------'

Green, "Blockwise local training" (frasgreen.com/blog, 2026; one author's report). A private layer
is made as the layers of the model are that follow the block and keep the shape of its output, in
their order and over again, with initial weights of its own: so it has their attention, their norm
and their mask. The head is the model's last layer, and the layers before it that have no matrix,
such as a norm.

Invariant: a shared last layer gets no gradient and changes by `load_output` alone. It starts with
the initial weights of the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec, DownstreamLayer
from dtrain.objectives.common.layer_weights import split_like

SEEDS = 2**62
"""Number of seeds of private layers."""


@final
class DecoderHead(nn.Module):
    """Private layers, and a head like the model's, from (rows, *block output) to its scores.

    Parameters
    ----------
    layers : sequence of nn.Module
        Private layers and norms, in their order.
    output : nn.Module
        The last layer.
    shared : bool
        Whether the last layer is a frozen copy.
    """

    uses_rng = False

    def __init__(self, layers: Sequence[nn.Module], output: nn.Module, shared: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.output = output.requires_grad_(False) if shared else output

    def forward(self, input: Tensor) -> Tensor:
        """Return the scores (rows, ...), in the shape of the model's output."""
        for layer in self.layers:
            input = layer(input)
        scores: Tensor = self.output(input)
        return scores

    @torch.no_grad()
    def load_output(self, theta: Tensor) -> None:
        """Copy the flat parameters `theta` (parameters,) of the model's last layer."""
        for parameter, new in zip(
            self.output.parameters(), split_like(theta, self.output), strict=True
        ):
            parameter.copy_(new)


def decoder_head(spec: BlockSpec, private_layers: int, shared: bool) -> DecoderHead:
    """Return the decoder head of an earlier block, drawn under torch's generator.

    Raises
    ------
    ConfigError
        The model's head takes another shape than the block's output, or no layer after the block
        keeps its shape.
    """
    *inner, last = spec.downstream_layers
    norms: list[DownstreamLayer] = []
    while inner and _has_no_matrix(inner[-1], spec):
        norms.insert(0, inner.pop())
    _check_head_input(spec, inner)
    kept = [
        layer for layer in inner if layer.parameters and layer.output_shape == spec.output_shape
    ]
    if not kept and spec.last_layer is not None and spec.feature_shape == spec.output_shape:
        kept = [spec.last_layer]
    if private_layers and not kept:
        raise ConfigError(
            "objective.decoder-without-layers",
            f'[objective] head = "decoder": no layer after block {spec.index} keeps the shape '
            f"{spec.output_shape} of its output, so it has no private layer to copy: set "
            "private-layers = 0, or cut the model between layers that keep their shape",
        )
    layers = [_draw(kept[number % len(kept)]) for number in range(private_layers)]
    layers += [_draw(norm) for norm in norms]
    return DecoderHead(layers, last.make() if shared else _draw(last), shared)


def _check_head_input(spec: BlockSpec, inner: Sequence[DownstreamLayer]) -> None:
    """Refuse a block whose output the model's head does not take."""
    head_input = inner[-1].output_shape if inner else spec.output_shape
    if head_input != spec.output_shape:
        raise ConfigError(
            "objective.decoder-shape",
            f'[objective] head = "decoder": block {spec.index} returns {spec.output_shape} for a '
            f"sample, and the model's head takes {head_input}: cut where both are equal, or set "
            'head = "dgl"',
        )


def _has_no_matrix(layer: DownstreamLayer, spec: BlockSpec) -> bool:
    """Return whether a layer keeps the shape and has no parameter of two dimensions, as a norm."""
    if layer.output_shape != spec.output_shape:
        return False
    with torch.device("meta"):
        module = layer.make()
    return all(parameter.dim() < 2 for parameter in module.parameters())


def _draw(layer: DownstreamLayer) -> nn.Module:
    """Return a layer with initial weights under a seed from torch's generator."""
    seed = int(torch.randint(SEEDS, (), device="cpu"))
    assert layer.draw is not None
    return layer.draw(seed)
