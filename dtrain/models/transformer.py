"""Transformer over tokens or numbers: `embed`, `layer1` ... `layerN`, `head`.

Invariant: the network can be cut between any two layers, and one tensor (n, T, width) crosses.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

from torch import nn

from dtrain.errors import ConfigError
from dtrain.models.layers import Factory, NamedFactories
from dtrain.models.output_spec import OutputModel, OutputSpec
from dtrain.models.sequence_layers import (
    Norm,
    Pool,
    SequenceEmbedding,
    SequenceHead,
    check_dropout,
    check_positions,
    check_sizes,
    vocabulary_size,
)
from dtrain.models.transformer_layers import LayerOptions, TransformerLayer


@final
@dataclass(frozen=True)
class Transformer(OutputModel):
    """A pre-norm transformer; its head follows the targets of the data.

    Parameters
    ----------
    depth : int
        Layers between embedding and head.
    width : int
        Width of the residual stream.
    heads : int
        Attention heads; they divide `width`.
    kv_heads : int, optional
        Heads of keys and values; they divide `heads`. By default as many.
    mlp_width : int, optional
        Hidden units of the perceptrons, by default 4 `width`.
    norm : str
        "layer" (LayerNorm) or "rms" (RMSNorm).
    positions : str
        "learned": a vector per step; "rotary": queries and keys are rotated.
    causal : bool
        Whether a step attends to itself and to earlier steps only.
    dropout : float
        Rate of dropout behind embedding, attention and perceptrons.
    tied_head : bool
        Whether the head has the weight of the embedding, and no bias.
    vocabulary : int, optional
        Number of tokens, by default that of the classes where each step has one.

    Raises
    ------
    ConfigError
        A size below 1, or one that does not divide another.
    """

    depth: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    mlp_width: int | None = None
    norm: Norm = "layer"
    positions: Literal["learned", "rotary"] = "learned"
    causal: bool = True
    dropout: float = 0.0
    tied_head: bool = False
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        names = ("depth", "width", "heads", "kv_heads", "mlp_width", "vocabulary")
        check_sizes(**{name: getattr(self, name) for name in names})
        check_dropout(self.dropout)
        check_heads(self.width, self.heads, self.kv_heads, self.positions == "rotary")

    def layers(self, shape: tuple[int, ...], output: OutputSpec) -> NamedFactories | nn.Module:
        """Return the layers for sequences of `shape`; with a tied head as one module.

        ::

            (T,) or (T, F) -> embed -> layer1 ... layerN -> (T, width) -> head
                a class per step: (C, T)        one output per sample: its shape

        Raises
        ------
        ConfigError
            The samples are no sequences; or the head cannot be tied.
        """
        tokens = vocabulary_size("transformer", shape, output, self.vocabulary)
        check_positions("transformer", output, shape[0])
        steps = shape[0] if self.positions == "learned" else 0
        inputs = shape[-1] if tokens is None else tokens
        embedding = inputs, tokens is not None, self.width, steps, self.dropout
        pool: Pool = "last" if self.causal else "mean"
        head = self.width, output, self.norm, pool, not self.tied_head
        layers: list[tuple[str, Factory]] = [
            ("embed", partial(SequenceEmbedding, *embedding)),
            *(
                (f"layer{number}", partial(TransformerLayer, self._options))
                for number in range(1, self.depth + 1)
            ),
            ("head", partial(SequenceHead, *head)),
        ]
        if not self.tied_head:
            return layers
        if output.class_axis is None or output.classes != tokens:
            raise ConfigError(
                "model.tied-head",
                "[model] tied-head = true needs as many classes per step as there are tokens: "
                "leave it out, or predict tokens",
            )
        return tie_head(nn.Sequential(OrderedDict((name, make()) for name, make in layers)))

    @property
    def _options(self) -> LayerOptions:
        return LayerOptions(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            mlp_width=self.mlp_width or 4 * self.width,
            norm=self.norm,
            rotary=self.positions == "rotary",
            causal=self.causal,
            dropout=self.dropout,
            depth=self.depth,
        )


def tie_head(model: nn.Sequential) -> nn.Sequential:
    """Give the head the weight of the embedding; return the model."""
    embed, head = model[0], model[-1]
    assert isinstance(embed, SequenceEmbedding)
    assert isinstance(head, SequenceHead)
    assert isinstance(embed.tokens, nn.Embedding)
    head.linear.weight = embed.tokens.weight
    return model


def check_heads(width: int, heads: int, kv_heads: int | None, rotary: bool) -> None:
    """Refuse heads that do not divide a width, or each other.

    Raises
    ------
    ConfigError
        It names the keys.
    """
    if width % heads:
        raise ConfigError(
            "model.heads-indivisible",
            f"[model] heads = {heads} does not divide width = {width}: change one of them",
        )
    if kv_heads and heads % kv_heads:
        raise ConfigError(
            "model.kv-heads-indivisible",
            f"[model] kv-heads = {kv_heads} does not divide heads = {heads}: change one of them",
        )
    if rotary and width // heads % 2:
        raise ConfigError(
            "model.rotary-odd",
            f'[model] positions = "rotary" rotates pairs, but a head has {width // heads} numbers: '
            "give an even width of heads",
        )
