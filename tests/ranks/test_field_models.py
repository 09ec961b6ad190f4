"""Models and tasks that users of other tools have reported, small: each trains, or is explained."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from tests import tiny
from tests.harness import assert_close_model, train_in_threads
from tests.refusals import refuses
from tests.single import one_thread  # noqa: F401

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def sequences() -> Arrays:
    """Return 96 training and 32 test sequences of 8 steps of 6 features around four centres."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 4, 128)
    x = generator.normal(size=(128, 8, 6)) + y[:, None, None]
    return x[:96], y[:96], x[96:], y[96:]


def token_bytes() -> Arrays:
    """Return token ids as bytes; the class is the parity of the first one."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, 16, (600, 6)).astype(np.uint8)
    y = (x[:, 0] % 2).astype(np.int64)
    return x[:450], y[:450], x[450:], y[450:]


def wide_tokens(width: str) -> Arrays:
    """Return the same ids as integers of another width."""
    x, y, x_test, y_test = token_bytes()
    return x[:96].astype(width), y[:96], x_test[:32].astype(width), y_test[:32]


def wide_counts() -> Arrays:
    """Return counts of a detector up to 65,535, around four centres."""
    x, y, x_test, y_test = sequences()

    def scale(values: np.ndarray) -> np.ndarray:
        return ((values + 5) * 4000).clip(0, 65535).astype(np.uint16)

    return scale(x), y, scale(x_test), y_test


def several_labels() -> Arrays:
    """Return samples with three yes-or-no labels each."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(512, 10))
    y = (x[:, :3] + 0.3 * x[:, 3:6] > 0).astype(np.int64)
    return x[:384], y[:384], x[384:], y[384:]


def attention(classes: int, batch_first: bool = False) -> nn.Sequential:
    """Return a net whose attention is over the batch, unless `batch_first`."""
    layer = nn.TransformerEncoderLayer(6, 2, 16, dropout=0.0, batch_first=batch_first)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(48, classes))


class Carry(nn.Module):
    """Adds the mean of the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x, changed by the call before."""
        y = x if self.last is None else x + 0.1 * self.last
        self.last = x.detach().mean(0)
        return y


def carrying(classes: int) -> nn.Sequential:
    """Return a net with a layer that keeps a tensor between calls."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), Carry(), nn.Linear(8, classes))


def embedding(classes: int, shape: tuple[int, ...]) -> nn.Sequential:
    """Return a net over token ids."""
    return nn.Sequential(
        nn.Embedding(16, 16),
        nn.Flatten(),
        nn.Linear(16 * shape[0], 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


def run(net: str, data: str, **changes: Any) -> RunConfig:
    """Return a run of two blocks with backpropagation."""
    named = {
        "epochs": 2,
        "batch_size": 32,
        "micro_batches": 2,
        "data__name": f"tests.ranks.test_field_models:{data}",
        "model": {"name": f"tests.ranks.test_field_models:{net}"},
        "partition": {"blocks": 2},
        "objective__name": "backprop",
    }
    return tiny.run(**named | changes)


def notes(out: Path) -> list[str]:
    """Return the notes on layers of a run folder."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    [record] = [row for row in map(json.loads, lines) if row["kind"] == "run"]
    listed: list[str] = record["layer_notes"]
    return listed


def test_attention_over_the_batch_is_named(tmp_path: Path) -> None:
    train_in_threads(run("attention", "sequences"), tmp_path, stages=2)
    [note] = notes(tmp_path)
    assert "'0'" in note


class BatchMean(nn.Module):
    """Subtracts the mean over the samples."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x without its mean."""
        return x - x.mean(0)


class RowSoftmax(nn.Module):
    """A softmax over the samples."""

    def forward(self, x: Tensor) -> Tensor:
        """Return weights that sum to one over the samples."""
        return x.softmax(0)


class StepsFirst(nn.LSTM):
    """An LSTM that takes the samples for steps."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the outputs."""
        output: Tensor = super().forward(x)[0]
        return output


COUPLING: dict[str, Callable[[], nn.Module]] = {
    "mean": BatchMean,
    "softmax": RowSoftmax,
    "steps": lambda: StepsFirst(6, 6),
}


def coupling(classes: int, kind: str) -> nn.Sequential:
    """Return a net whose second layer makes samples depend on each other."""
    layers = nn.Linear(6, 6), COUPLING[kind](), nn.Flatten(), nn.Linear(48, classes)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("kind", COUPLING)
def test_a_layer_that_couples_samples_is_named(kind: str, tmp_path: Path) -> None:
    model = {"name": "tests.ranks.test_field_models:coupling", "kind": kind}
    train_in_threads(run("coupling", "sequences", model=model, epochs=1), tmp_path)
    [note] = notes(tmp_path)
    assert "'1'" in note


def test_attention_over_the_steps_has_no_note_and_no_coupling(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model": {"name": "tests.ranks.test_field_models:attention", "batch-first": True},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    for micros in (1, 4):
        changed = run("attention", "sequences", **changes, micro_batches=micros)
        train_in_threads(changed, tmp_path / str(micros), stages=2)
        assert notes(tmp_path / str(micros)) == []
    assert_close_model(tmp_path / "1", tmp_path / "4")


def test_a_layer_that_keeps_a_tensor_is_named(tmp_path: Path) -> None:
    train_in_threads(run("carrying", "sequences"), tmp_path, stages=2)
    [note] = notes(tmp_path)
    assert "'2'" in note


class Drawing(nn.Module):
    """Draws random numbers in a sub-module, or between the calls of sub-modules."""

    def __init__(self, classes: int, kind: str) -> None:
        super().__init__()
        self.kind, self.flat = kind, nn.Flatten()
        self.first = PythonNoise(48, 8) if kind == "python" else nn.Linear(48, 8)
        self.mid, self.last = nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (rows, classes)."""
        h = self.mid(self.first(self.flat(x)))
        if self.kind == "dropout":
            h = functional.dropout(h, 0.2)
        if self.kind == "rand":
            h = h * torch.rand(8, dtype=x.dtype)
        if self.kind == "method":
            h = h + torch.zeros_like(h).uniform_(-0.1, 0.1)
        return self.last(h)


class PythonNoise(nn.Linear):
    """Draws from Python's generator."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear map, scaled at random in training."""
        return super().forward(x) * (random.random() if self.training else 1.0)


def drawing(classes: int, kind: str) -> nn.Module:
    """Return a net that draws random numbers."""
    return Drawing(classes, kind)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("dropout", "mid"), ("rand", "mid"), ("method", "mid"), ("python", "first"), ("none", "")],
)
def test_a_layer_that_draws_random_numbers_is_named(kind: str, layer: str, tmp_path: Path) -> None:
    """Where there is one micro-batch and one replica, nothing needs to be said."""
    model = {"name": "tests.ranks.test_field_models:drawing", "kind": kind}
    train_in_threads(run("drawing", "sequences", model=model, epochs=1), tmp_path / "two", stages=2)
    named = [note for note in notes(tmp_path / "two") if f"'{layer}'" in note]
    assert notes(tmp_path / "two") == named
    assert len(named) == (1 if layer else 0)
    train_in_threads(
        run("drawing", "sequences", model=model, epochs=1, micro_batches=1), tmp_path / "one"
    )
    assert notes(tmp_path / "one") == []


def test_token_ids_pass_untouched(tmp_path: Path) -> None:
    summary = train_in_threads(
        run("embedding", "token_bytes", epochs=20, dtype="float32"), tmp_path, stages=2
    )
    assert summary["test_accuracy"] >= 0.9


WIDTHS = ("uint8", "int8", "uint16", "int16", "int32", "uint32", "int64")


def test_token_ids_of_any_width_are_the_same_ids(tmp_path: Path) -> None:
    """Neither sign nor width of the integers changes a bit of what is learnt."""
    digests = set()
    for width in WIDTHS:
        changed = run("embedding", "wide_tokens", data__width=width, epochs=1)
        digests.add(train_in_threads(changed, tmp_path / width)["digest"])
    assert len(digests) == 1


MUON = {"name": "muon", "lr": 0.02}
ADAMW = {"name": "adamw", "lr": 0.01}


@pytest.mark.parametrize("net", ["mlp", "embedding"])
def test_muon_trains_nets_with_biases_beside_a_second_optimizer(net: str, tmp_path: Path) -> None:
    """An embedding is no matrix of a linear map; without a second optimizer the cause is named."""
    model = {"name": "mlp", "widths": [32, 16]}
    changes: dict[str, Any] = {"model": model} if net == "mlp" else {}
    data = "sequences" if net == "mlp" else "token_bytes"
    changed = run(net, data, optimizer=MUON | {"rest": ADAMW}, epochs=6, **changes)
    runs = [train_in_threads(changed, tmp_path / str(n), stages=n) for n in (1, 2)]
    assert runs[0]["digest"] == runs[1]["digest"]
    assert runs[0]["test_accuracy"] >= 0.6
    with refuses(ConfigError, "optimizer.needs-matrices"):
        train_in_threads(run(net, data, optimizer=MUON, **changes), tmp_path / "alone")


def test_counts_of_sixteen_bits_train(tmp_path: Path) -> None:
    summary = train_in_threads(
        run("embedding", "wide_counts", epochs=8, model={"name": "mlp", "widths": [32]}), tmp_path
    )
    assert summary["test_accuracy"] >= 0.6


def test_several_labels_train(tmp_path: Path) -> None:
    """The same bits on any number of stages; a share of right decisions far above a guess."""
    changes: dict[str, Any] = {
        "epochs": 8,
        "model": {"name": "mlp", "widths": [32, 16]},
        "task": {"loss": "bce-with-logits", "metrics": ["accuracy", "macro-f1"]},
    }
    runs = [
        train_in_threads(run("", "several_labels", **changes), tmp_path / str(n), stages=n)
        for n in (1, 2)
    ]
    assert runs[0]["digest"] == runs[1]["digest"]
    assert runs[0]["metrics"]["accuracy"] >= 0.9


@pytest.mark.parametrize("rows", [1, 3])
def test_the_rows_of_attention_over_steps_are_independent(rows: int) -> None:
    """The reference for the note: the net itself, row by row."""
    torch.manual_seed(0)
    net, x = attention(4, batch_first=True).double().eval(), torch.randn(5, 8, 6).double()
    torch.testing.assert_close(net(x)[:rows], net(x[:rows]))
