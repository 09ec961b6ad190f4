"""Models that are no chain of single tensors: skips, tuples, tied weights, free parameters."""

from __future__ import annotations

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
