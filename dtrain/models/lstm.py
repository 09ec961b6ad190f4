"""LSTM over tokens or numbers: `embed` for tokens, `lstm1` ... `lstmN`, `head`.

Source: Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (1997), with the
forget gate of Gers et al.; equations and initial weights are those of `torch.nn.LSTM`.

Invariant: sequences are batch-first, and one tensor (n, T, width) crosses a cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import final

from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.models.layers import Factory, NamedFactories
from dtrain.models.output_spec import OutputModel, OutputSpec
from dtrain.models.sequence_layers import (
    SequenceEmbedding,
    SequenceHead,
    check_dropout,
    check_positions,
    check_sizes,
    dropout,
    vocabulary_size,
)


@final
@dataclass(frozen=True)
class Lstm(OutputModel):
    """Stacked LSTMs; the head follows the targets of the data.

    Parameters
    ----------
    widths : tuple of int
        Units of `lstm1`, `lstm2`, ...
    embedding : int, optional
        Width of the embedding of tokens, by default that of `lstm1`.
    dropout : float
        Rate of dropout behind the embedding and each LSTM.
    vocabulary : int, optional
        Number of tokens, by default that of the classes where each step has one.

    Raises
    ------
    ConfigError
        No widths, or a size below 1.
    """

    widths: tuple[int, ...] = (128, 128)
    embedding: int | None = None
    dropout: float = 0.0
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(
                "model.lstm-widths",
                f"[model] widths = {list(self.widths)}: give the units of each LSTM, as in "
                "widths = [128, 128]",
            )
        check_sizes(embedding=self.embedding, vocabulary=self.vocabulary)
        check_dropout(self.dropout)

    def layers(self, shape: tuple[int, ...], output: OutputSpec) -> NamedFactories:
        """Return the layers for sequences of `shape`, as (name, factory) pairs.

        ::

            (T,) -> embed ->(T, e)
                    (T, F) -> lstm1 -> (T, w1) -> ... -> lstmN -> (T, wN) -> head
                a class per step: (C, T)        one output per sample: its shape

        Raises
        ------
        ConfigError
            The samples are no sequences.
        """
        tokens = vocabulary_size("lstm", shape, output, self.vocabulary)
        check_positions("lstm", output, shape[0])
        layers: list[tuple[str, Factory]] = []
        inputs = shape[-1]
        if tokens is not None:
            inputs = self.embedding or self.widths[0]
            embedding = partial(SequenceEmbedding, tokens, True, inputs, 0, self.dropout)
            layers.append(("embed", embedding))
        for number, pair in enumerate(pairwise((inputs, *self.widths)), start=1):
            layers.append((f"lstm{number}", partial(LstmLayer, *pair, self.dropout)))
        head = partial(SequenceHead, self.widths[-1], output, None, "last")
        return [*layers, ("head", head)]


@final
class LstmLayer(nn.Module):
    """The hidden states of one LSTM: (n, T, inputs) to (n, T, width); states start at zero."""

    uses_rng = False

    def __init__(self, inputs: int, width: int, rate: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, width, batch_first=True)
        self.dropout = dropout(rate)

    def forward(self, input: Tensor) -> Tensor:
        """Return the hidden states of all steps."""
        states, _ = self.lstm(input)
        y: Tensor = self.dropout(states)
        return y
