"""Small models and data after public reports of users of other tools, with neighbours of each kind.

`blobs`, `sequences` and `tokens` are the data of most cases; a row of `MODELS` names the rest.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from dtrain.config.parse import parse_run
from dtrain.config.run import RunConfig
from dtrain.data.array_source import MemorySource
from dtrain.data.dataset import DatasetSplits
from dtrain.data.source_dataset import SourceDataset

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

TABLE: dict[str, Any] = {
    "seed": 1,
    "epochs": 2,
    "batch-size": 32,
    "micro-batches": 2,
    "threads": 1,
    "partition": {"blocks": 2},
    "objective": {"name": "backprop"},
    "optimizer": {"name": "adam", "lr": 1e-3},
    "log": {"every-s": 1000},
}


def run(net: str, data: Any = "blobs", **changes: Any) -> RunConfig:
    """Return the run of a case; `data` is a function here, or the table of a run file; a table in
    `changes` replaces that of the run."""
    table = copy.deepcopy(TABLE)
    table["model"] = {"name": f"{__name__}:{net}"}
    table["data"] = data if isinstance(data, dict) else {"name": f"{__name__}:{data}"}
    table |= {name.replace("_", "-"): value for name, value in changes.items()}
    table = {key: value for key, value in table.items() if value is not None}
    return parse_run(table, Path(__file__).parent / "field.toml")


def write(folder: Path, arrays: Arrays) -> dict[str, Any]:
    """Write two HDF5 files; return the table [data] of a run on them."""
    x, y, x_test, y_test = arrays
    for name, inputs, targets in (("train", x, y), ("test", x_test, y_test)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"], file["y"] = inputs, targets
    files = {name: str(folder / f"{name}.h5") for name in ("train", "test")}
    return {"name": "hdf5"} | files


# Data


def blobs(shape: tuple[int, ...] = (16,), samples: int = 256) -> Arrays:
    """Return samples around four centres; three quarters train."""
    random = np.random.default_rng(0)
    y = random.integers(0, 4, samples)
    x = random.normal(size=(samples, *shape)).astype(np.float32)
    x += y.reshape(-1, *[1] * len(shape)).astype(np.float32)
    return _split(x, y)


def sequences() -> Arrays:
    """Return sequences of 8 steps of 16 numbers."""
    return blobs((8, 16))


def tokens() -> Arrays:
    """Return token ids as bytes; the class is the parity of the first one."""
    random = np.random.default_rng(0)
    x = random.integers(0, 16, (256, 6)).astype(np.uint8)
    return _split(x, (x[:, 0] % 2).astype(np.int64))


def numbers() -> Arrays:
    """Return samples of 16 numbers and a number (1,) that depends on two of them."""
    random = np.random.default_rng(0)
    x = random.normal(size=(512, 16)).astype(np.float32)
    return _split(x, (x[:, :1] ** 2 + 0.5 * x[:, 1:2]).astype(np.float32))


def soft(dtype: str = "float32") -> Arrays:
    """Return the blobs with probabilities of the classes."""
    x, y, x_test, y_test = blobs()
    return x, _soften(y).astype(dtype), x_test, _soften(y_test).astype(dtype)


def soft_steps(last: bool) -> Arrays:
    """Return sequences with probabilities of the classes per step, in the last dimension or in the
    first one."""
    x, y, x_test, y_test = sequences()
    axis = 2 if last else 1
    steps = (np.repeat(np.expand_dims(_soften(v), 3 - axis), 8, 3 - axis) for v in (y, y_test))
    y, y_test = (v.astype(np.float32) for v in steps)
    return x, y, x_test, y_test


def counts(dtype: str = "uint16") -> Arrays:
    """Return the blobs as counts of a detector, up to 65,535."""
    x, y, x_test, y_test = blobs()
    x, x_test = (((v + 5) * 4000).clip(0, 65535) for v in (x, x_test))
    if dtype in ("int16", "float16"):
        x, x_test = x / 4, x_test / 4
    return x.astype(dtype), y, x_test.astype(dtype), y_test


def spoiled(place: str = "train", value: float = np.nan) -> Any:
    """Return the blobs, or the numbers, with one value that is not finite at sample 17."""
    targets = place == "target"
    x, y, x_test, y_test = numbers() if targets else blobs()
    mask, test_mask = np.ones((len(x), 3), np.float32), np.ones((len(x_test), 3), np.float32)
    validation = x_test[:60].copy()
    {"train": x, "test": x_test, "validation": validation, "target": y, "input": mask}[place][
        17, 0 if targets else 1 if place == "input" else 3
    ] = value
    if place == "input":
        return (x, mask), y, (x_test, test_mask), y_test
    if place == "validation":
        return x, y, x_test, y_test, validation, y_test[:60]
    return x, y, x_test, y_test


def stored_labels(kind: str) -> Arrays:
    """Return the blobs with labels as users store them."""
    x, y, x_test, y_test = blobs()
    names = np.array(["ant", "bee", "cat", "dog"])
    forms = {
        "from one": lambda v: v + 1,
        "gaps": lambda v: 10 * v + 3,
        "negative": lambda v: v - 2,
        "texts": lambda v: names[v],
        "bytes": lambda v: names[v].astype("S"),
        "plain": lambda v: v,
    }
    return x, forms[kind](y), x_test, forms[kind](y_test)


def own_splits(classes: int) -> DatasetSplits:
    """Return data sets of a user, with four labels."""
    x, y, x_test, y_test = blobs()
    parts = ((x, y), (x_test, y_test))
    return DatasetSplits(
        *(SourceDataset(MemorySource(x), MemorySource(y), classes) for x, y in parts)
    )


def _soften(y: np.ndarray) -> np.ndarray:
    return 0.9 * np.eye(4)[y] + 0.025


def _split(x: np.ndarray, y: np.ndarray) -> Arrays:
    count = 3 * len(x) // 4
    return x[:count], y[:count], x[count:], y[count:]


# Models


def mlp(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return three linear layers."""
    layers = nn.Linear(shape[0], 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(32, classes))


def per_step(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with outputs per step, the classes last."""
    return nn.Sequential(nn.Linear(shape[1], 32), nn.ReLU(), nn.Linear(32, classes))


def per_step_first(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with outputs (classes, steps); the steps come in as channels."""
    return nn.Sequential(Transposed(), nn.Conv1d(16, 32, 1), nn.ReLU(), nn.Conv1d(32, 4, 1))


class Transposed(nn.Module):
    """Exchanges steps and features."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows, features, steps)."""
        return x.transpose(1, 2)


class Spectral(nn.Module):
    """A filter in frequency space, complex."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width // 2 + 1, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        """Return x filtered."""
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=x.shape[-1])


def complex_filter(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net whose first layer is complex."""
    layers = Spectral(shape[0]), nn.Linear(shape[0], 32), nn.ReLU(), nn.Linear(32, classes)
    return nn.Sequential(*layers)


class ComplexLinear(nn.Linear):
    """A complex linear map of real numbers; returns the squared moduli."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs, dtype=torch.cfloat)

    def forward(self, input: Tensor) -> Tensor:
        """Return real numbers (rows, outputs)."""
        return super().forward(input.to(self.weight.dtype)).abs().square()


def complex_linear(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with a complex matrix."""
    return nn.Sequential(ComplexLinear(shape[0], 24), nn.LayerNorm(24), nn.Linear(24, classes))


class Drop(nn.Module):
    """A residual unit that is skipped at random while training (LayerDrop)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return x, changed or not."""
        if self.training and torch.rand(()) < 0.3:
            return x
        return x + torch.tanh(self.linear(x))


def layer_drop(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net of units that are skipped at random."""
    return nn.Sequential(*[Drop(shape[0]) for _ in range(5)], nn.Linear(shape[0], classes))


def numpy_initialised(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with initial weights of an unseeded generator of numpy."""
    net, random = mlp(shape, classes), np.random.default_rng()
    with torch.no_grad():
        for parameter in net.parameters():
            values = random.normal(scale=0.2, size=tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
    return net


def lazy(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return layers that find their width in the first forward."""
    return nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(classes))


def lazy_convolution(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a convolution, a norm and a linear layer that find their widths."""
    layers = nn.LazyConv1d(8, 3), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.LazyLinear(classes))


class Repeated(nn.Module):
    """One inner layer that is used three times; `tied`: three layers with one weight."""

    def __init__(self, width: int, tied: bool = False) -> None:
        super().__init__()
        inner = nn.Linear(width, width)
        layers = [inner, nn.Linear(width, width), nn.Linear(width, width)] if tied else [inner] * 3
        for layer in layers:
            layer.weight = inner.weight
        self.blocks = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return x after three steps."""
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def shared_inside(shape: tuple[int, ...], classes: int, tied: bool = False) -> nn.Sequential:
    """Return a net whose first layer shares a module, or a weight, inside."""
    width = shape[0]
    layers = Repeated(width, tied), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, classes)
    return nn.Sequential(*layers)


def tied_inside(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net whose first layer shares a weight inside."""
    return shared_inside(shape, classes, tied=True)


def nested(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return two containers; a cut inside the first one is wanted."""
    inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    features = nn.Sequential(
        nn.Linear(shape[0], 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), inner
    )
    return nn.Sequential(features, nn.Sequential(nn.Linear(32, 32), nn.Linear(32, classes)))


def named_containers(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return containers with names."""
    body = OrderedDict(first=nn.Linear(shape[0], 32), act=nn.ReLU(), second=nn.Linear(32, 32))
    return nn.Sequential(
        OrderedDict(body=nn.Sequential(body), act=nn.ReLU(), head=nn.Linear(32, classes))
    )


class Last(nn.Module):
    """Returns the last step of what a recurrent layer returns."""

    def forward(self, output: tuple[Tensor, Any]) -> Tensor:
        """Return (rows, features)."""
        return output[0][:, -1]


def recurrent(shape: tuple[int, ...], classes: int, kind: str = "LSTM") -> nn.Sequential:
    """Return a net whose first layer returns a tuple."""
    layer: nn.Module = getattr(nn, kind)(shape[1], 24, batch_first=True)
    return nn.Sequential(layer, Last(), nn.Linear(24, classes))


def gated(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return the same with a GRU, whose state is one tensor."""
    return recurrent(shape, classes, "GRU")


def embedding(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net over token ids."""
    hidden = nn.Linear(16 * shape[0], 32)
    return nn.Sequential(
        nn.Embedding(16, 16), nn.Flatten(), hidden, nn.ReLU(), nn.Linear(32, classes)
    )


class Masked(nn.Module):
    """A net of two inputs."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, 32), nn.Linear(32, classes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return scores (rows, classes)."""
        return self.last(torch.relu(self.first(x)) * mask.mean(1, keepdim=True))


def masked(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a net of two inputs."""
    return Masked(shape[0], classes)


MODELS: dict[str, dict[str, Any]] = {
    "complex_filter": {},
    "complex_linear": {},
    "layer_drop": {"partition": {"blocks": 3}},
    "lazy": {},
    "lazy_convolution": {"data": "sequences"},
    "shared_inside": {},
    "tied_inside": {},
    "nested": {"partition": {"cuts": ["0.4"]}},
    "nested deeper": {"partition": {"cuts": ["0.4.1", "1.1"]}},
    "named_containers": {"partition": {"cuts": ["body.second", "head"]}},
    "recurrent": {"data": "sequences"},
    "recurrent cut": {"data": "sequences", "partition": {"cuts": [1]}},
    "gated": {"data": "sequences", "partition": {"cuts": [1]}},
    "embedding": {"data": "tokens"},
}
"""Cases of models: changes of their runs; the model is the first word of the name."""
