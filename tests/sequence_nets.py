"""Tiny causal transformers over tokens, as lists of layers; the data are `graph_nets.tokens`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.graph_nets import LENGTH, VOCABULARY, CausalBlock, tokens

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


Layers = list[tuple[str, Any]]


class Embedding(nn.Module):
    """Tokens and their positions."""

    uses_rng = False

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (rows, steps, width) of tokens (rows, steps)."""
        return self.tokens(tokens) + self.positions


class Output(nn.Sequential):
    """A norm and the output matrix."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, vocabulary))


class Layer(CausalBlock):
    """A transformer layer that draws no random numbers."""

    uses_rng = False


def transformer(
    width: int = 8, layers: int = 4, vocabulary: int = VOCABULARY, splits_head: bool = False
) -> Layers:
    """Return an embedding, layers and a head, whose norm may be a layer of its own."""
    head = [("head", partial(Output, width, vocabulary))]
    if splits_head:
        head = [
            ("norm", partial(nn.LayerNorm, width)),
            ("head", partial(nn.Linear, width, vocabulary)),
        ]
    inner = [(f"layer{number}", partial(Layer, width)) for number in range(1, layers + 1)]
    return [("embedding", partial(Embedding, width, vocabulary)), *inner, *head]


def many_tokens() -> Arrays:
    """Return the sequences of `graph_nets.tokens` with targets of 300 classes."""
    x, y, x_test, y_test = tokens()
    y[0, 0] = 299
    return x, y, x_test, y_test
