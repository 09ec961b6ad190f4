"""`dtrain export`: plain weights that load into the user's own module and compute the same."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtrain.checkpoint.export import export, statistics_path
from dtrain.checkpoint.manifest import Manifest, latest_checkpoint
from dtrain.cli import main
from dtrain.errors import CheckpointError, ConfigError
from tests import tiny
from tests.harness import train_in_threads
from tests.manifests import renumber
from tests.outcome import model, summary
from tests.refusals import refuses


def plain_net() -> nn.Sequential:
    """Return the net of the tiny run in plain torch."""
    sizes = [10, 13, 11, 7, 6, 3]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def net() -> nn.Sequential:
    """Return a user's model of two layers, between which it may be cut."""
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(10, 8)), nn.Sequential(nn.ReLU(), nn.Linear(8, 3))
    )


def accuracy(module: nn.Module) -> float:
    """Return the accuracy of a module on the tiny run's test samples, normalised as in the run."""
    x, _, test, labels = tiny.samples()
    mean, deviation = x.mean(axis=(0, 2), keepdims=True), x.std(axis=(0, 2), keepdims=True)
    with torch.no_grad():
        predicted = module(torch.from_numpy((test - mean) / deviation)).argmax(1)
    return float(np.mean(predicted.numpy() == labels))


def test_it_loads_into_the_users_module_and_scores_the_same(tmp_path: Path) -> None:
    """Names are those of the user's own modules."""
    changes: dict[str, Any] = {"model": {"name": f"{__name__}:net"}, "partition__blocks": 2}
    training = train_in_threads(
        tiny.run(**changes, data__normalise=False, mesh__stages=2), tmp_path / "run", 2, 2
    )
    export(tmp_path / "run", tmp_path / "net.pt")
    module = net().double()
    module.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    _, _, x, y = tiny.samples()
    with torch.no_grad():
        predicted = module(torch.from_numpy(x)).argmax(1).numpy()
    assert float(np.mean(predicted == y)) == pytest.approx(training["test_accuracy"])


def test_names_and_bits_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    train_in_threads(tiny.run(), tmp_path / "run", 3)
    saved = model(tmp_path / "run")
    plain = export(tmp_path / "run", tmp_path / "a.pt")
    with_heads = export(tmp_path / "run", tmp_path / "b.pt", heads=True)
    assert with_heads.keys() == saved.keys()
    assert plain.keys() == {name for name in saved if not name.startswith("heads.")}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in with_heads.items())
    module = plain_net()
    linear = [layer for layer in module if isinstance(layer, nn.Linear)]
    names = dict.fromkeys(name.rpartition(".")[0] for name in sorted(plain, key=depth))
    for layer, name in zip(linear, names, strict=True):
        layer.load_state_dict({key: plain[f"{name}.{key}"] for key in ("weight", "bias")})
    assert summary(tmp_path / "run")["test_accuracy"] == pytest.approx(accuracy(module))


def depth(name: str) -> tuple[bool, str]:
    """Sort `fc1` ... before `head`."""
    return name.startswith("head"), name


def test_safetensors_hold_the_same(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    train_in_threads(tiny.run(epochs=1), tmp_path / "run", 1)
    state = export(tmp_path / "run", tmp_path / "net.safetensors")
    loaded: dict[str, Tensor] = safetensors.load_file(tmp_path / "net.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_a_missing_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refuses(ConfigError, "export.safetensors-missing"):
        export(tmp_path, tmp_path / "net.safetensors")


def test_a_run_or_a_path_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with refuses(ConfigError, "export.suffix"):
        export(tmp_path, tmp_path / "net.h5")
    with refuses(ConfigError, "run-folder.missing"):
        export(tmp_path / "none", tmp_path / "net.pt")
    train_in_threads(tiny.run(epochs=1), tmp_path / "run", 1)
    with refuses(ConfigError, "export.unwritable"):
        export(tmp_path / "run", tmp_path / "none" / "net.pt")
    manifest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert manifest is not None
    [shard] = manifest.folder.glob("*.h5")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with refuses(CheckpointError, "checkpoint.shard-damaged"):
        export(tmp_path / "run", tmp_path / "net.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_left_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_threads(tiny.run(), tmp_path / "run", 1)
    load_prefix, moved = Manifest.load_prefix, []

    def load_late(self: Manifest, prefix: str) -> dict[str, Tensor]:
        if not moved:
            moved.append(self.folder.rename(self.folder.with_name("moved")))
            raise FileNotFoundError
        return load_prefix(self, prefix)

    monkeypatch.setattr(Manifest, "load_prefix", load_late)
    assert export(tmp_path / "run", tmp_path / "net.pt")
    assert moved


def test_checkpoints_that_are_deleted_forever_end_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_threads(tiny.run(), tmp_path / "run", 1)

    def rename(self: Manifest, prefix: str) -> dict[str, Tensor]:
        number = int(self.folder.name.removeprefix("update-"))
        renumber(self.folder, number + 1)
        raise FileNotFoundError

    monkeypatch.setattr(Manifest, "load_prefix", rename)
    with refuses(CheckpointError, "checkpoint.replaced-while-read"):
        export(tmp_path / "run", tmp_path / "net.pt")


def test_the_command_prints_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_threads(tiny.run(epochs=1), tmp_path / "run", 1)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "net.pt")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'net.pt'}: 10 tensors, 450 numbers"
    assert str(tmp_path / "net.pt.statistics.json") in second
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "net.bin")]) == 2


class Normalise(nn.Module):
    """The module of the documentation that exported statistics load into."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def test_weights_with_their_statistics_score_the_same_on_raw_inputs(tmp_path: Path) -> None:
    run = tiny.run(model={"name": f"{__name__}:net"}, partition__blocks=2)
    training = train_in_threads(run, tmp_path / "run", 1, 2)
    export(tmp_path / "run", tmp_path / "net.pt", with_normalisation=True)
    layers = OrderedDict(normalise=Normalise(2, 1), **dict(net().named_children()))
    module = nn.Sequential(layers).double()
    module.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    _, _, x, y = tiny.samples()
    with torch.no_grad():
        predicted = module(torch.from_numpy(x)).argmax(1).numpy()
    assert float(np.mean(predicted == y)) == pytest.approx(training["test_accuracy"])
    assert not statistics_path(tmp_path / "net.pt").exists()


def test_statistics_lie_beside_the_weights(tmp_path: Path) -> None:
    train_in_threads(tiny.run(epochs=1), tmp_path / "run", 1)
    export(tmp_path / "run", tmp_path / "net.pt")
    statistics = json.loads((tmp_path / "net.pt.statistics.json").read_text())
    x = tiny.samples()[0]
    assert statistics["mean"] == pytest.approx(x.mean(axis=(0, 2)))
    assert statistics["std"] == pytest.approx(x.std(axis=(0, 2)))
    train_in_threads(tiny.run(epochs=1, data__normalise=False), tmp_path / "raw", 1)
    with refuses(ConfigError, "export.no-statistics"):
        export(tmp_path / "raw", tmp_path / "net.pt", with_normalisation=True)
    export(tmp_path / "raw", tmp_path / "net.pt")
    assert not (tmp_path / "net.pt.statistics.json").exists(), "those of the other run"


def test_a_layer_with_the_name_of_the_statistics_is_refused(tmp_path: Path) -> None:
    train_in_threads(
        tiny.run(epochs=1, model={"name": f"{__name__}:named_normalise"}), tmp_path / "run", 1
    )
    with refuses(ConfigError, "export.name-taken"):
        export(tmp_path / "run", tmp_path / "net.pt", with_normalisation=True)


def named_normalise() -> nn.Sequential:
    """Return a net with a layer called "normalise"."""
    layers = {"flat": nn.Flatten(), "normalise": nn.BatchNorm1d(10), "last": nn.Linear(10, 3)}
    return nn.Sequential(OrderedDict(layers))


def test_factors_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their products are the weights, and there are fewer numbers."""
    sync = {"name": "oialr", "delay-updates": 1, "every": 1, "cutoff": 0.9, "share": 1.0}
    training = train_in_threads(
        tiny.run(sync=sync, model__widths=[40, 30, 20]), tmp_path / "run", 2
    )
    plain = export(tmp_path / "run", tmp_path / "net.pt", heads=True)
    factored = export(tmp_path / "run", tmp_path / "factored.pt", heads=True, factors=True)
    low_rank = training["low_rank"]
    assert set(low_rank) == {"fc2.weight", "fc3.weight"} == plain.keys() - factored.keys()
    for name, stats in low_rank.items():
        left, right = factored[f"{name}.left"], factored[f"{name}.right"]
        assert left.shape[1] == len(right) == stats["rank"]
        torch.testing.assert_close(left @ right, plain[name], rtol=1e-10, atol=1e-12)
    sizes = [sum(tensor.numel() for tensor in state.values()) for state in (plain, factored)]
    assert sizes[0] / sizes[1] == pytest.approx(training["compression"])
    capsys.readouterr()
    out = str(tmp_path / "factored.pt")
    assert main(["export", str(tmp_path / "run"), out, "--heads", "--factors"]) == 0
    assert f"{len(factored)} tensors, {sizes[1]:,} numbers" in capsys.readouterr().out


def test_factors_of_a_run_without_are_refused(tmp_path: Path) -> None:
    train_in_threads(tiny.run(epochs=1), tmp_path / "run", 1)
    with refuses(ConfigError, "export.no-factors"):
        export(tmp_path / "run", tmp_path / "net.pt", factors=True)
