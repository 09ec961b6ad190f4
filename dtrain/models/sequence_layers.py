"""First and last layers of models of sequences: embedding, positions, head.

A sequence is (T,), token ids, or (T, F), numbers. Between the layers it is (n, T, width).
"""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.models.output_spec import OutputSpec

Norm = Literal["layer", "rms"]


EMBEDDING_STD = 0.02
"""Standard deviation of the initial embeddings and positions, as in GPT-2."""


def sequence_norm(kind: Norm, width: int) -> nn.Module:
    """Make the norm of the last dimension: layer normalisation, or without mean and bias."""
    return nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=1e-5)


def dropout(rate: float) -> nn.Module:
    """Make a dropout layer, which is left out at a rate of 0."""
    return nn.Dropout(rate) if rate else nn.Identity()


def check_dropout(rate: float) -> None:
    """Refuse a rate of dropout outside [0, 1).

    Raises
    ------
    ConfigError
        It names the key.
    """
    if not 0 <= rate < 1:
        raise ConfigError("model.dropout", f"[model] dropout = {rate} must be >= 0 and < 1")


def check_sizes(**sizes: int | None) -> None:
    """Refuse sizes below 1; None stands for a default.

    Raises
    ------
    ConfigError
        It names the key.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(
                "model.size", f"[model] {name.replace('_', '-')} = {size} must be >= 1"
            )


def vocabulary_size(
    model: str, shape: tuple[int, ...], output: OutputSpec, vocabulary: int | None
) -> int | None:
    """Return the number of tokens of a sample (T,), None for one of numbers (T, F).

    Without a key it is the number of classes, where each position has some.

    Raises
    ------
    ConfigError
        The sample is no sequence, or the number of tokens is unknown.
    """
    if len(shape) == 2:
        return None
    if len(shape) != 1:
        raise ConfigError(
            "model.needs-sequences",
            f"model '{model}' needs sequences of tokens (steps,) or of numbers (steps, features), "
            f"but a sample of the data has shape {shape}",
        )
    if vocabulary is None and output.class_axis is None:
        raise ConfigError(
            "model.no-vocabulary",
            f"samples of shape {shape} are taken for token ids: set [model] vocabulary to the "
            f"number of tokens; numbers need the shape ({shape[0]}, 1)",
        )
    return output.classes if vocabulary is None else vocabulary


@final
class SequenceEmbedding(nn.Module):
    """Token ids (n, T), or numbers (n, T, F), to (n, T, width), with learned positions or none.

    Parameters
    ----------
    inputs : int
        Number of tokens, or of features.
    are_tokens : bool
        Whether the input is token ids.
    width : int
        Width of the output.
    steps : int
        T, for learned positions; 0 for none.
    rate : float
        Rate of dropout.
    """

    uses_rng = False

    def __init__(
        self, inputs: int, are_tokens: bool, width: int, steps: int = 0, rate: float = 0.0
    ) -> None:
        super().__init__()
        self.tokens: nn.Module
        if are_tokens:
            self.tokens = nn.Embedding(inputs, width)
            nn.init.normal_(self.tokens.weight, std=EMBEDDING_STD)
        else:
            self.tokens = nn.Linear(inputs, width)
        self.positions: nn.Parameter | None = None
        if steps:
            self.positions = nn.Parameter(torch.empty(steps, width))
            nn.init.normal_(self.positions, std=EMBEDDING_STD)
        self.dropout = dropout(rate)

    def forward(self, input: Tensor) -> Tensor:
        """Return (n, T, width)."""
        x: Tensor = self.tokens(input)
        if self.positions is not None:
            x = x + self.positions
        y: Tensor = self.dropout(x)
        return y


Pool = Literal["last", "mean", "first"]


@final
class SequenceHead(nn.Module):
    """Norm and linear layer: (n, T, width) to the output of a task.

    ::

        a class per position     norm - linear ---------> (n, T, C) or (n, C, T)
        one output per sample    pool - norm - linear --> (n, *shape)

    Parameters
    ----------
    width : int
        Width of the input.
    output : OutputSpec
        The output.
    norm : str or None
        The norm; None for none.
    pool : "last", "mean" or "first"
        The last step, the mean over all steps, or the first one, for one output per sample.
    bias : bool
        Whether the linear layer has a bias.
    """

    uses_rng = False

    def __init__(
        self, width: int, output: OutputSpec, norm: Norm | None, pool: Pool, bias: bool = True
    ) -> None:
        super().__init__()
        self.output, self.pool = output, pool
        outputs = math.prod(output.shape) if output.class_axis is None else output.classes
        self.norm = nn.Identity() if norm is None else sequence_norm(norm, width)
        self.linear = nn.Linear(width, outputs, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output (n, ...)."""
        if self.output.class_axis is None:
            step = {"first": 0, "last": -1}.get(self.pool)
            input = input.mean(1) if step is None else input[:, step]
        scores: Tensor = self.linear(self.norm(input))
        if self.output.class_axis is None:
            return scores.view(len(scores), *self.output.shape)
        return scores.transpose(1, 2) if self.output.class_axis == 0 else scores


def check_positions(model: str, output: OutputSpec, steps: int) -> None:
    """Refuse classes of other positions than the steps of a sequence.

    Raises
    ------
    ConfigError
        It names both.
    """
    if output.class_axis is not None and output.positions != (steps,):
        raise ConfigError(
            "model.positions-differ",
            f"model '{model}' returns one class per step of a sequence of {steps}, but the targets "
            f"have the positions {output.positions}: give one label per step, or one per sample",
        )
