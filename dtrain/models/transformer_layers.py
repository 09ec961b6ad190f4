"""The layer of a transformer: pre-norm self-attention and a perceptron, both with residuals.

Source: Vaswani et al., "Attention is all you need", arXiv 1706.03762; pre-norm: Xiong et al.,
arXiv 2002.04745; grouped queries: Ainslie et al., arXiv 2305.13245; RMSNorm: Zhang and Sennrich,
arXiv 1910.07467; rotary positions: Su et al., arXiv 2104.09864.

Initialisation is torch's for `nn.Linear`, whose standard deviation at a width of 768 is GPT-2's
0.02. The two layers that write to the residual stream are divided by sqrt(2 depth), as in GPT-2.

Invariant: a forward without dropout uses no random numbers and writes to no input.
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from dtrain.models.sequence_layers import Norm, dropout, sequence_norm

ROTARY_BASE = 10000.0
"""Period of the slowest rotation, over 2 pi."""


class LayerOptions(NamedTuple):
    """Sizes and kinds of a transformer layer.

    Attributes
    ----------
    width : int
        Width of the residual stream.
    heads : int
        Heads of the queries; they divide `width`.
    kv_heads : int
        Heads of keys and values; they divide `heads`.
    mlp_width : int
        Hidden units of the perceptron.
    norm : str
        "layer" or "rms".
    rotary : bool
        Whether queries and keys are rotated by their positions.
    causal : bool
        Whether a step attends to itself and to earlier steps only.
    dropout : float
        Rate of dropout behind attention and perceptron.
    depth : int
        Layers of the model, for the initial weights.
    """

    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    norm: Norm = "layer"
    rotary: bool = False
    causal: bool = True
    dropout: float = 0.0
    depth: int = 1


@final
class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (n, T, width) of the same."""

    uses_rng = False

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.norm1 = sequence_norm(options.norm, options.width)
        self.attention = SelfAttention(options)
        self.norm2 = sequence_norm(options.norm, options.width)
        self.up = nn.Linear(options.width, options.mlp_width)
        self.down = nn.Linear(options.mlp_width, options.width)
        self.dropout = dropout(options.dropout)
        scale_residual(self.down, options.depth)

    def forward(self, input: Tensor) -> Tensor:
        """Return the sequences (n, T, width)."""
        x = input + self.dropout(self.attention(self.norm1(input)))
        y: Tensor = x + self.dropout(self.down(gelu(self.up(self.norm2(x)))))
        return y


@final
class SelfAttention(nn.Module):
    """Attention of the steps of a sequence, in several heads: (n, T, width) of the same."""

    uses_rng = False

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.heads, self.kv_heads = options.heads, options.kv_heads
        self.causal, self.rotary = options.causal, options.rotary
        self.head_width = options.width // options.heads
        outputs = (self.heads + 2 * self.kv_heads) * self.head_width
        self.qkv = nn.Linear(options.width, outputs)
        self.project = nn.Linear(options.width, options.width)
        scale_residual(self.project, options.depth)

    def forward(self, input: Tensor) -> Tensor:
        """Return the sequences (n, T, width)."""
        rows, steps, width = input.shape
        heads = self.qkv(input).view(rows, steps, -1, self.head_width).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        mixed = _attend(q, k, v, self.causal)
        y: Tensor = self.project(mixed.transpose(1, 2).reshape(rows, steps, width))
        return y


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for q (n, heads, T, d), k and v (n, kv-heads, T, d)."""
    if q.is_meta:
        # Costs and shapes of the CPU's kernel, which keeps no T x T matrix; torch's own choice on
        # the meta device is another one.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor = kernel(q, k, v, 0.0, causal)[0]
        return output
    groups = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=groups)


def rotate(x: Tensor) -> Tensor:
    """Return heads (n, heads, T, d), with the pairs (i, i + d/2) of step t rotated by
    t / base^(2 i / d)."""
    steps, width = x.shape[-2:]
    half = torch.arange(width // 2, dtype=torch.float64, device=x.device)
    step = torch.arange(steps, dtype=torch.float64, device=x.device)
    angles = step[:, None] * ROTARY_BASE ** (-2 * half / width)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def scale_residual(linear: nn.Linear, depth: int) -> None:
    """Divide the initial weights of a layer that writes to the residual stream by
    sqrt(2 depth)."""
    with torch.no_grad():
        linear.weight /= math.sqrt(2 * depth)
