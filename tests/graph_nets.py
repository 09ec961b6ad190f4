"""Models that are no chain of single tensors: skips, tuples, tied weights, free parameters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class SkipNet(nn.Module):
    """Two skips, a parameter and a buffer outside sub-modules, and a size that `forward` reads."""

    def __init__(self, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 2, 5))
        self.register_buffer("scale", torch.full((1,), 0.5))
        self.down = nn.Linear(5, 6)
        self.mid = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout))
        self.deep = nn.Linear(6, 6)
        self.up = nn.Linear(12, 6)
        self.out = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (rows, classes) of x (rows, 2, 5)."""
        rows = x.shape[0]
        a = self.down(x + self.position.expand(rows, -1, -1) * self.scale)
        b = self.mid(a)
        c = torch.tanh(self.deep(b))
        d = self.up(torch.cat([a, c + b], 2))
        return self.out(torch.cat([a, d], 2).reshape(rows, -1))


def skips(classes: int) -> nn.Module:
    """Return a net with skips over one block and over two."""
    return SkipNet(classes)


def noisy_skips(classes: int) -> nn.Module:
    """Return the same net with dropout."""
    return SkipNet(classes, 0.3)


class LastStep(nn.Module):
    """Takes the whole result of an LSTM."""

    def forward(self, result: tuple[Tensor, tuple[Tensor, Tensor]]) -> Tensor:
        """Return the last output plus the last cell state."""
        sequence, (_, cell) = result
        return sequence[:, -1] + cell[0]


def recurrent(classes: int) -> nn.Sequential:
    """Return a chain in which a tuple of tensors crosses a cut."""
    return nn.Sequential(
        nn.Linear(5, 6),
        nn.LSTM(6, 7, batch_first=True),
        LastStep(),
        nn.Linear(7, 6),
        nn.Linear(6, classes),
    )


class TiedNet(nn.Module):
    """The first and the last but one layer share a weight."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(10, 10)
        self.middle = nn.Linear(10, 10)
        self.last = nn.Linear(10, 10)
        self.last.weight = self.first.weight
        self.head = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (rows, classes) of x (rows, 2, 5)."""
        h = torch.tanh(self.first(x.flatten(1)))
        return self.head(torch.tanh(self.last(torch.tanh(self.middle(h)))))


def tied(classes: int) -> nn.Module:
    """Return a net with a tied weight."""
    return TiedNet(classes)


def repeated(classes: int) -> nn.Sequential:
    """Return a chain in which one activation object, and one layer with weights, occur twice."""
    relu, layer = nn.Tanh(), nn.Linear(10, 10)
    return nn.Sequential(nn.Flatten(), layer, relu, layer, relu, nn.Linear(10, classes))


def nested(classes: int) -> nn.Sequential:
    """Return a chain of two containers."""
    features = nn.Sequential(nn.Flatten(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    return nn.Sequential(features, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, classes)))


def lazy(classes: int) -> nn.Sequential:
    """Return a chain of layers that learn their input's size from the first input."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(classes))


VOCABULARY, LENGTH = 11, 7
"""Of the sequences of `tokens`."""


class CausalBlock(nn.Module):
    """A transformer layer in which a step attends to itself and to earlier steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows, steps, width) of the same."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
        x = x + self.project(scores.softmax(-1) @ v)
        return x + self.down(self.mlp(x))


class LanguageModel(nn.Module):
    """A causal transformer over tokens; the head is the embedding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList([CausalBlock(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores (rows, steps, vocabulary) of tokens (rows, steps)."""
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def language_model() -> nn.Module:
    """Return a causal transformer."""
    return LanguageModel()


def tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 67 sequences of bytes, and the next token of each step."""
    random = np.random.default_rng(0)
    steps = random.integers(1, 3, (67, LENGTH + 1)).cumsum(1) % VOCABULARY
    x, y = steps[:, :-1].astype(np.uint8), steps[:, 1:].astype(np.int64)
    return x[:50], y[:50], x[50:], y[50:]


class MaskedMean(nn.Module):
    """Averages embeddings where a mask says so; two blocks read the mask."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, classes)

    def forward(self, tokens: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        """Return scores (rows, classes) of tokens and mask (rows, steps)."""
        x = self.embedding(tokens) * mask[..., None]
        x = torch.tanh(self.mix(x)) * mask[..., None] * scale
        return self.out(x.sum(1) / mask.sum(1, keepdim=True))


def masked_mean(classes: int) -> nn.Module:
    """Return a net of two inputs."""
    return MaskedMean(classes)


def masked_tokens() -> tuple[tuple[np.ndarray, ...], np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
    """Return tokens with a mask, and a class of three."""
    random = np.random.default_rng(1)
    x = random.integers(0, VOCABULARY, (67, LENGTH))
    mask = np.arange(LENGTH) < random.integers(2, LENGTH + 1, (67, 1))
    y = (x * mask).sum(1) % 3
    weights = mask.astype(np.float64)
    return (x[:50], weights[:50]), y[:50], (x[50:], weights[50:]), y[50:]


class Filter(nn.Module):
    """A filter in frequency space, with complex weights."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size // 2 + 1, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (rows, size), filtered."""
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=x.shape[-1])


class OverwritesSkip(nn.Module):
    """The second layer overwrites the output of the first one, which the third reads, too."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.relu = nn.Linear(10, 10), nn.ReLU(inplace=True)
        self.last = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (rows, classes) of x (rows, 2, 5)."""
        a = self.first(x.flatten(1))
        b = self.relu(a)
        return self.last(a + b)


def overwrites_skip(classes: int) -> nn.Module:
    """Return a net that works in place on a skip."""
    return OverwritesSkip(classes)
