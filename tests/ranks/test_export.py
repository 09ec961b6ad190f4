"""`dtrain export`: plain weights that load into the user's own module and compute the same."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtrain.checkpoint import store as checkpoint
from dtrain.checkpoint.export import export
from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.cli import main
from dtrain.errors import DtrainError
from tests import tiny
from tests.outcome import model, summary
from tests.ranks.test_evaluate import trained


def own() -> nn.Sequential:
    """The net of the tiny run, as its user would write it."""
    sizes = [10, 13, 11, 7, 6, 3]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def net() -> nn.Sequential:
    """A model of the run file's: layers that a cut may stand between."""
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(10, 8)), nn.Sequential(nn.ReLU(), nn.Linear(8, 3))
    )


def accuracy(module: nn.Module) -> float:
    """Return what a module scores on the tiny run's test samples, normalised as the run does."""
    x, _, test, labels = tiny.samples()
    mean, deviation = x.mean(axis=(0, 2), keepdims=True), x.std(axis=(0, 2), keepdims=True)
    with torch.no_grad():
        found = module(torch.from_numpy((test - mean) / deviation)).argmax(1)
    return float(np.mean(found.numpy() == labels))


def test_it_loads_into_the_users_module_and_scores_the_same(tmp_path: Path) -> None:
    """A user's function: names are those of its own modules."""
    changes: dict[str, Any] = {"model": {"name": f"{__name__}:net"}, "partition__blocks": 2}
    told = trained(
        tiny.run(**changes, data__normalise=False, mesh__stages=2), tmp_path / "run", 2, 2
    )
    export(tmp_path / "run", tmp_path / "net.pt")
    module = net().double()
    module.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    _, _, x, y = tiny.samples()
    with torch.no_grad():
        found = module(torch.from_numpy(x)).argmax(1).numpy()
    assert float(np.mean(found == y)) == pytest.approx(told["test_accuracy"])


def test_names_and_bits_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    trained(tiny.run(), tmp_path / "run", 3)
    wanted = model(tmp_path / "run")
    plain = export(tmp_path / "run", tmp_path / "a.pt")
    whole = export(tmp_path / "run", tmp_path / "b.pt", heads=True)
    assert whole.keys() == wanted.keys()
    assert plain.keys() == {name for name in wanted if not name.startswith("heads.")}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in whole.items())
    module = own()
    linear = [each for each in module if isinstance(each, nn.Linear)]
    layers = dict.fromkeys(name.rpartition(".")[0] for name in sorted(plain, key=depth))
    for each, name in zip(linear, layers, strict=True):
        each.load_state_dict({key: plain[f"{name}.{key}"] for key in ("weight", "bias")})
    assert summary(tmp_path / "run")["test_accuracy"] == pytest.approx(accuracy(module))


def depth(name: str) -> tuple[bool, str]:
    """Sort `fc1` ... before `head`."""
    return name.startswith("head"), name


def test_safetensors_hold_the_same(tmp_path: Path) -> None:
    torch_ = pytest.importorskip("safetensors.torch")
    trained(tiny.run(epochs=1), tmp_path / "run", 1)
    state = export(tmp_path / "run", tmp_path / "net.safetensors")
    found: dict[str, Tensor] = torch_.load_file(tmp_path / "net.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(each, state[name]) for name, each in found.items())


def test_without_the_package_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DtrainError, match=r"'safetensors' is not installed: pip install it"):
        export(tmp_path, tmp_path / "net.safetensors")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match=r"net\.h5: its suffix must be \.pt or \.safetensors"):
        export(tmp_path, tmp_path / "net.h5")
    with pytest.raises(DtrainError, match="there is no run folder"):
        export(tmp_path / "none", tmp_path / "net.pt")
    trained(tiny.run(epochs=1), tmp_path / "run", 1)
    with pytest.raises(DtrainError, match=r"cannot write .*No such file or directory"):
        export(tmp_path / "run", tmp_path / "none" / "net.pt")
    manifest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert manifest is not None
    [shard] = manifest.folder.glob("*.h5")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DtrainError, match="is damaged") as refusal:
        export(tmp_path / "run", tmp_path / "net.pt")
    assert refusal.value.code == 3
    assert not (tmp_path / "net.pt").exists()


def test_a_run_that_goes_on_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint is replaced while it is read."""
    trained(tiny.run(), tmp_path / "run", 1)
    under, gone = checkpoint.Manifest.load_prefix, []

    def late(self: checkpoint.Manifest, prefix: str) -> dict[str, Tensor]:
        if not gone:
            gone.append(self.folder.rename(self.folder.with_name("away")))
            raise FileNotFoundError
        return under(self, prefix)

    monkeypatch.setattr(checkpoint.Manifest, "load_prefix", late)
    assert export(tmp_path / "run", tmp_path / "net.pt")
    assert gone


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tiny.run(epochs=1), tmp_path / "run", 1)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "net.pt")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'net.pt'}: 10 tensors, 450 numbers\n"
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "net.bin")]) == 2


def test_factors_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their products are the weights, and there are fewer numbers."""
    sync = {"name": "oialr", "delay-updates": 1, "every": 1, "cutoff": 0.9, "share": 1.0}
    told = trained(tiny.run(sync=sync, model__widths=[40, 30, 20]), tmp_path / "run", 2)
    plain = export(tmp_path / "run", tmp_path / "net.pt", heads=True)
    thin = export(tmp_path / "run", tmp_path / "thin.pt", heads=True, factors=True)
    assert set(told["low_rank"]) == {"fc2.weight", "fc3.weight"} == plain.keys() - thin.keys()
    for name, row in told["low_rank"].items():
        left, right = thin[f"{name}.left"], thin[f"{name}.right"]
        assert left.shape[1] == len(right) == row["rank"]
        torch.testing.assert_close(left @ right, plain[name], rtol=1e-10, atol=1e-12)
    sizes = [sum(each.numel() for each in state.values()) for state in (plain, thin)]
    assert sizes[0] / sizes[1] == pytest.approx(told["compression"])
    capsys.readouterr()
    where = str(tmp_path / "thin.pt")
    assert main(["export", str(tmp_path / "run"), where, "--heads", "--factors"]) == 0
    assert f"{len(thin)} tensors, {sizes[1]:,} numbers" in capsys.readouterr().out


def test_factors_of_a_run_without_are_refused(tmp_path: Path) -> None:
    trained(tiny.run(epochs=1), tmp_path / "run", 1)
    with pytest.raises(DtrainError, match="no weight of this run was trained in low rank: leave"):
        export(tmp_path / "run", tmp_path / "net.pt", factors=True)
