"""Models that are no chain of single tensors: skips, tuples, tied weights, free parameters."""

from __future__ import annotations

from collections import OrderedDict

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


def thrice(classes: int) -> nn.Sequential:
    """Return a chain in which three layers share a weight."""
    layers = [nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(4)]
    for number in (1, 3):
        layers[number][0].weight = layers[0][0].weight
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), *layers[0]), *layers[1:], nn.Linear(10, classes)
    )


def nested(classes: int) -> nn.Sequential:
    """Return a chain of two containers."""
    features = nn.Sequential(nn.Flatten(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    return nn.Sequential(features, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, classes)))


class SharedInside(nn.Module):
    """One inner layer that is used three times, under three names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = nn.Linear(width, width)
        self.parts = nn.ModuleList([inner, inner, inner])

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows, width) of the same."""
        for part in self.parts:
            x = torch.tanh(part(x))
        return x


def shared_inside(classes: int) -> nn.Sequential:
    """Return a chain with a module that is shared inside one layer."""
    return nn.Sequential(nn.Flatten(), SharedInside(10), nn.Linear(10, 8), nn.Linear(8, classes))


class Named(nn.Module):
    """Returns a dict of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.size = nn.Linear(10, 6), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return two tensors (rows, 6) by name."""
        return {"mean": self.mean(x), "size": self.size(x).exp()}


class Ratio(nn.Module):
    """Takes a dict of tensors."""

    def forward(self, parts: dict[str, Tensor]) -> Tensor:
        """Return (rows, 6)."""
        return parts["mean"] / (1 + parts["size"])


def dictionary(classes: int) -> nn.Sequential:
    """Return a chain in which a dict of tensors crosses a cut."""
    return nn.Sequential(nn.Flatten(), Named(), Ratio(), nn.Linear(6, classes))


class BothEnds(nn.Module):
    """Takes the whole result of a bidirectional GRU."""

    def forward(self, result: tuple[Tensor, Tensor]) -> Tensor:
        """Return the last output, and the states of both directions."""
        output, states = result
        return torch.cat([output[:, -1], *states], 1)


def bidirectional(classes: int) -> nn.Sequential:
    """Return a chain with a bidirectional GRU of two layers."""
    gru = nn.GRU(5, 4, num_layers=2, batch_first=True, bidirectional=True)
    return nn.Sequential(gru, BothEnds(), nn.Linear(24, classes))


def weight_norm(classes: int) -> nn.Sequential:
    """Return a chain of parametrised layers."""
    normed = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        nn.Flatten(), normed(nn.Linear(10, 8)), nn.Tanh(), normed(nn.Linear(8, classes))
    )


def deeply_nested(classes: int) -> nn.Sequential:
    """Return a chain of named containers in containers."""
    inner = nn.Sequential(nn.Linear(10, 8), nn.Tanh())
    body = nn.Sequential(OrderedDict(start=inner, end=nn.Sequential(nn.Linear(8, 8), nn.Tanh())))
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), body=body, head=nn.Linear(8, classes)))


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


def masked_tokens() -> tuple[
    tuple[np.ndarray, ...], np.ndarray, tuple[np.ndarray, ...], np.ndarray
]:
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


class Spectrum(nn.Module):
    """Returns the Fourier transform of its input, or the inverse."""

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows, size // 2 + 1) complex of (rows, size) real; with a size the inverse."""
        return torch.fft.irfft(x, n=self.size) if self.size else torch.fft.rfft(x)


class Mix(nn.Module):
    """A linear map of complex numbers; the result is the conjugate of its memory."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size, dtype=torch.cfloat) / size)

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows, size) of the same."""
        return (x @ self.weight).conj()


def complex_chain(classes: int) -> nn.Sequential:
    """Return a chain in which complex numbers cross two cuts."""
    ends = nn.Linear(10, 10), nn.Linear(10, classes)
    return nn.Sequential(nn.Flatten(), ends[0], Spectrum(), Mix(6), Mix(6), Spectrum(10), ends[1])


class ComplexSkips(nn.Module):
    """A spectrum, and its product, that two later layers read."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.mix, self.more = nn.Linear(10, 10), Mix(6), Mix(6)
        self.out = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (rows, classes) of x (rows, 2, 5)."""
        real = self.first(x.flatten(1))
        spectrum = torch.fft.rfft(real)
        low = self.mix(spectrum)
        high = self.more(spectrum + low)
        return self.out(torch.fft.irfft(high * spectrum, n=10) + real + low.imag.sum(1)[:, None])


def complex_skips(classes: int) -> nn.Module:
    """Return a net with complex skips."""
    return ComplexSkips(classes)


class OverwritesSkip(nn.Module):
    """The second layer overwrites the output of the first one, which the fourth reads, too."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.relu = nn.Linear(10, 10), nn.ReLU(inplace=True)
        self.middle, self.last = nn.Linear(10, 10), nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (rows, classes) of x (rows, 2, 5)."""
        a = self.first(x.flatten(1))
        return self.last(a + self.middle(self.relu(a)))


def overwrites_skip(classes: int) -> nn.Module:
    """Return a net that works in place on a skip."""
    return OverwritesSkip(classes)


class SmallUNet(nn.Module):
    """Two resolutions with a skip at the finer one, for fields (1, 8, 8)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.Tanh())
        self.down = nn.Conv2d(width, width, 2, stride=2)
        self.deep = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Tanh())
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.out = nn.Conv2d(2 * width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return fields (rows, 1, 8, 8) of the same."""
        fine = self.first(x)
        return self.out(torch.cat([fine, self.up(self.deep(self.down(fine)))], 1))


def unet() -> nn.Module:
    """Return a net that regresses a field."""
    return SmallUNet()


def fields() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 67 fields (1, 8, 8), and each of them smoothed."""
    x = np.random.default_rng(0).normal(size=(67, 1, 8, 8))
    y = (x + np.roll(x, 1, 2) + np.roll(x, 1, 3)) / 3
    return x[:50], y[:50], x[50:], y[50:]


class PatchTransformer(nn.Module):
    """A vision transformer with a class token and positions, for images (1, 8, 8)."""

    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        make = nn.TransformerEncoderLayer
        self.encoder = nn.ModuleList(
            [make(width, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)]
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (rows, classes)."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1)
        tokens = tokens + self.positions
        for layer in self.encoder:
            tokens = layer(tokens)
        return self.head(tokens[:, 0])


def vision_transformer(classes: int) -> nn.Module:
    """Return a vision transformer."""
    return PatchTransformer(classes)


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 67 images (1, 8, 8) with a class of three."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 67)
    x = random.normal(size=(67, 1, 8, 8)) + y[:, None, None, None]
    return x[:50], y[:50], x[50:], y[50:]


def forecaster() -> nn.Sequential:
    """Return an LSTM that forecasts two numbers of a series (6, 3)."""
    return nn.Sequential(
        nn.LSTM(3, 6, batch_first=True), LastStep(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)
    )


def series() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 67 windows (6, 3) of a series, and two numbers of the step after each."""
    walk = np.random.default_rng(0).normal(size=(74, 3)).cumsum(0)
    x = np.stack([walk[i : i + 6] for i in range(67)])
    y = walk[6:73, :2]
    return x[:50], y[:50], x[50:], y[50:]


def several_labels() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 67 samples (2, 5) with three yes-or-no labels each."""
    x = np.random.default_rng(0).normal(size=(67, 2, 5))
    y = (x[:, 0, :3] > 0).astype(np.int64)
    return x[:50], y[:50], x[50:], y[50:]
