"""Vision transformer: `patches`, `layer1` ... `layerN`, `head`.

Source: Dosovitskiy et al., "An image is worth 16x16 words", arXiv 2010.11929; without the class
token as in Beyer et al., arXiv 2205.01580.

Invariant: the network can be cut between any two layers, and one tensor (n, T, width) crosses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.models.image_layers import image_shape
from dtrain.models.layers import NamedFactories
from dtrain.models.output_spec import OutputModel, OutputSpec
from dtrain.models.sequence_layers import (
    EMBEDDING_STD,
    Norm,
    Pool,
    SequenceHead,
    check_dropout,
    check_sizes,
    dropout,
)
from dtrain.models.transformer import check_heads
from dtrain.models.transformer_layers import LayerOptions, TransformerLayer


@final
@dataclass(frozen=True)
class Vit(OutputModel):
    """A pre-norm transformer over the patches of an image.

    Parameters
    ----------
    patch : int
        Height and width of a patch in pixels; it divides those of the image.
    depth : int
        Layers between patches and head.
    width : int
        Width of the residual stream.
    heads : int
        Attention heads; they divide `width`.
    mlp_width : int, optional
        Hidden units of the perceptrons, by default 4 `width`.
    norm : str
        "layer" (LayerNorm) or "rms" (RMSNorm).
    pool : str
        The head reads the mean over all patches, "mean", or a class token, "token".
    dropout : float
        Rate of dropout behind patches, attention and perceptrons.

    Raises
    ------
    ConfigError
        A size below 1, or heads that do not divide the width.
    """

    patch: int = 4
    depth: int = 4
    width: int = 128
    heads: int = 4
    mlp_width: int | None = None
    norm: Norm = "layer"
    pool: Literal["mean", "token"] = "mean"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        names = ("patch", "depth", "width", "heads", "mlp_width")
        check_sizes(**{name: getattr(self, name) for name in names})
        check_dropout(self.dropout)
        check_heads(self.width, self.heads, None, rotary=False)

    def layers(self, shape: tuple[int, ...], output: OutputSpec) -> NamedFactories:
        """Return the layers for images of `shape`, as (name, factory) pairs.

        ::

            (C, H, W) -> patches -> layer1 ... layerN -> (T, width) -> head -> the output's shape

            T = H W / patch^2, and one more with a class token

        Raises
        ------
        ConfigError
            The samples are no images, patches do not fit, or each pixel has a class.
        """
        channels, height, width = image_shape("vit", shape)
        if height % self.patch or width % self.patch:
            raise ConfigError(
                "model.patch-indivisible",
                f"[model] patch = {self.patch} does not divide images of {height}x{width} pixels: "
                "give another patch",
            )
        if output.class_axis is not None:
            raise ConfigError(
                "model.vit-positions",
                f"model 'vit' returns one output per image, but the targets have the positions "
                f"{output.positions}: use model 'unet'",
            )
        options = LayerOptions(
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            mlp_width=self.mlp_width or 4 * self.width,
            norm=self.norm,
            causal=False,
            dropout=self.dropout,
            depth=self.depth,
        )
        count = (height // self.patch) * (width // self.patch)
        has_token = self.pool == "token"
        patches = channels, self.patch, count, self.width, has_token, self.dropout
        pool: Pool = "first" if has_token else "mean"
        return [
            ("patches", partial(PatchEmbedding, *patches)),
            *(
                (f"layer{number}", partial(TransformerLayer, options))
                for number in range(1, self.depth + 1)
            ),
            ("head", partial(SequenceHead, self.width, output, self.norm, pool)),
        ]


@final
class PatchEmbedding(nn.Module):
    """Patches (n, C, H, W) to (n, T, width), with learned positions and a class token or none."""

    uses_rng = False

    def __init__(
        self, channels: int, patch: int, count: int, width: int, has_token: bool, rate: float
    ) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(count + has_token, width))
        nn.init.normal_(self.positions, std=EMBEDDING_STD)
        self.token = nn.Parameter(torch.zeros(width)) if has_token else None
        self.dropout = dropout(rate)

    def forward(self, input: Tensor) -> Tensor:
        """Return (n, T, width), the class token first."""
        x = self.project(input).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), 1, -1), x], 1)
        y: Tensor = self.dropout(x + self.positions)
        return y
