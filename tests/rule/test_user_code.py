"""Mistakes in the code and names of users that have a fix of their own, and no noise of torch."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.models.shape_inference import infer_layers
from dtrain.user_code import bind_arguments, import_object
from tests import tiny
from tests.refusals import refuses


def renamed(shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Take the number of classes under another name."""
    return nn.Sequential(nn.Linear(shape[0], num_classes))


def deeper(shape: tuple[int, ...], depth: int) -> nn.Sequential:
    """Take an argument that only a run file can set."""
    return nn.Sequential(*[nn.Linear(shape[0], shape[0]) for _ in range(depth)])


@pytest.mark.parametrize(
    ("function", "key"),
    [(renamed, "user-code.argument-name"), (deeper, "user-code.missing-argument")],
)
def test_an_argument_that_is_filled_in_under_another_name(function: object, key: str) -> None:
    context = {"shape": (8,), "classes": 4}
    with refuses(ConfigError, key):
        bind_arguments("[model]", function, {}, context)  # type: ignore[arg-type]


def test_a_renamed_argument_may_be_set_by_the_run_file() -> None:
    arguments = bind_arguments("[model]", renamed, {"num_classes": 3}, {"shape": (8,)})
    assert arguments == {"num_classes": 3, "shape": (8,)}


@pytest.mark.parametrize(
    ("target", "key"),
    [
        ("my-net:net", "user-code.module-name-hyphen"),
        ("pack.my-net:net", "user-code.module-name-hyphen"),
        ("-:net", "user-code.module-name-hyphen"),
        ("my net:net", "user-code.malformed-name"),
    ],
)
def test_a_module_name_that_python_cannot_import(target: str, key: str, tmp_path: Path) -> None:
    with refuses(ConfigError, key):
        import_object(target, tmp_path, "model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", "32"),
        ("epochs", "1e1"),
        ("optimizer__clip", "0.5"),
        ("optimizer__lr", "1e-3"),
    ],
)
def test_a_number_in_quotes(key: str, value: str) -> None:
    with refuses(ConfigError, "run-file.quoted-number"):
        tiny.run(**{key: value})


def test_a_text_that_is_no_number_is_of_another_type() -> None:
    with refuses(ConfigError, "run-file.wrong-type"):
        tiny.run(batch_size="large")


def pretrained(path: str) -> nn.Sequential:
    """Return a net with weights from a file."""
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


def test_weights_that_a_net_loads_raise_no_warnings(tmp_path: Path) -> None:
    """A net is made on the meta device first, where torch warns of every weight."""
    path = str(tmp_path / "net.pt")
    weights = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).state_dict()
    torch.save(weights, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(f"{__name__}:pretrained", {"path": path}, Path(), (8,), 4)
        infer_layers(model, (8,), torch.float32)
        layers = model.build(range(3), 0, torch.float32)
    assert torch.equal(layers["0"].state_dict()["weight"], weights["0.weight"])
