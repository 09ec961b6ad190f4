"""Regression with a U-Net: remove the noise of images; skips travel between the blocks.

dtrain run examples/unet_regression.py --ranks 4
"""

import sys

import torch
from torch import nn

import dtrain


def convolution(channels, outputs):
    return nn.Sequential(nn.Conv2d(channels, outputs, 3, padding=1), nn.GELU())


class UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.down1, self.down2 = convolution(1, width), convolution(width, 2 * width)
        self.middle = convolution(2 * width, 2 * width)
        self.up2, self.up1 = convolution(4 * width, width), convolution(2 * width, width)
        self.pool, self.grow = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        b = self.down2(self.pool(a := self.down1(x)))
        c = self.grow(self.middle(self.pool(b)))
        d = self.grow(self.up2(torch.cat([b, c], 1)))  # b and a travel past the blocks between
        return self.out(self.up1(torch.cat([a, d], 1)))


def images():  # a function, not arrays: `dtrain evaluate` calls it again
    """Return noisy and clean images of plane waves, (samples, 1, 16, 16)."""
    generator, pixels = torch.Generator().manual_seed(0), torch.arange(16.0)
    kx, ky, phase = 2 * torch.rand(3, 640, 1, 1, 1, generator=generator) - 1
    clean = torch.sin(kx * pixels[:, None] + ky * pixels + 3 * phase)
    noisy = clean + 0.5 * torch.randn(clean.shape, generator=generator)
    return noisy[:512], clean[:512], noisy[512:], clean[512:]


run = dtrain.Run(
    model=UNet,
    data=images,
    task=dtrain.Task(loss="mse", metrics=["mae", "r2"]),
    partition=dtrain.Partition(cuts=["middle", "up2"]),
    mesh=dtrain.Mesh(stages=2),
    objective="backprop",
    micro_batches=2,
    optimizer=dtrain.Optimizer("adam", lr=3e-3),
    epochs=2 if "--quick" in sys.argv else 10,
    batch_size=32,
)

if __name__ == "__main__":
    result = dtrain.train(run)
    if result.rank == 0:
        print({name: round(value, 3) for name, value in result.summary["metrics"].items()})
