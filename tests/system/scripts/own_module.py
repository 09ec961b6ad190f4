"""Section 2 of the contract: any module, any task; layers listed before the training."""

import torch
from torch import nn

import dtrain


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x))


class Mid(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, stride=2)

    def forward(self, x):
        return torch.relu(self.conv(x))


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, x):
        return torch.relu(self.conv(x))


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.down, self.mid, self.up = Down(width), Mid(width), Up(width)
        self.out = nn.Conv2d(2 * width, 1, 1)

    def forward(self, x):
        a = self.down(x)
        b = self.mid(a)
        return self.out(torch.cat([a, self.up(b)], 1))


generator = torch.Generator().manual_seed(0)
x = torch.randn(128, 1, 8, 8, generator=generator)
x_test = torch.randn(32, 1, 8, 8, generator=generator)
y, y_test = x**2, x_test**2

run = dtrain.Run(
    model=Net,
    data=(x, y, x_test, y_test),
    task=dtrain.Task(loss="mse", metrics=["mae", "r2"]),
    partition=dtrain.Partition(cuts=["mid", "up"]),
    objective="backprop",
    mesh=dtrain.Mesh(stages=3),
    optimizer=dtrain.Optimizer("adamw", lr=1e-3),
    epochs=5,
    batch_size=16,
)

if __name__ == "__main__":
    result = dtrain.train(run, out="runs/module")
    assert dtrain.evaluate("runs/module")["r2"] == result.summary["metrics"]["r2"]
    if result.rank == 0:
        Net().load_state_dict(result.state_dict())
