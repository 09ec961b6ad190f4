"""A surrogate of the heat equation in two dimensions: fields of temperature, and the same later."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SIZE, STEPS, DIFFUSION = 16, 12, 0.2

Fields = NDArray[np.float32]


def fields(samples: int = 640, test: int = 128) -> tuple[Fields, Fields, Fields, Fields]:
    """Return temperatures (n, 1, 16, 16) at the start, and after `STEPS` explicit Euler steps."""
    random = np.random.default_rng(0)
    grid = np.arange(SIZE)
    start = np.zeros((samples + test, SIZE, SIZE))
    for _ in range(4):  # hot and cold spots
        x, y = random.uniform(0, SIZE, (2, samples + test, 1, 1))
        width, height = random.uniform(1, 3, (2, samples + test, 1, 1))
        distance = (grid[:, None] - x) ** 2 + (grid - y) ** 2
        start += 2 * (height - 2) * np.exp(-distance / (2 * width**2))
    end = start.copy()
    for _ in range(STEPS):
        padded = np.pad(end, ((0, 0), (1, 1), (1, 1)))
        neighbours = padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:]
        neighbours += padded[:, 1:-1, :-2]
        end += DIFFUSION * (neighbours - 4 * end)
    x, y = (array[:, None].astype(np.float32) for array in (start, end))
    return x[:samples], y[:samples], x[samples:], y[samples:]


class UNet(nn.Module):
    """Two resolutions with a skip at the finer one."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 5, padding=2), nn.GELU())
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.GELU())
        self.deep = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GELU())
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.out = nn.Conv2d(2 * width, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return fields (rows, 1, 16, 16) of the same."""
        fine = self.first(x)
        coarse = self.deep(self.down(fine))
        return self.out(torch.cat([fine, self.up(coarse)], 1))
