"""Mistakes in the code and names of users that have a fix of their own, and no noise of torch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.checkpoint.same_run import check_same_run
from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.fingerprint import fingerprint
from dtrain.models import load_model
from dtrain.models.shape_inference import infer_layers
from dtrain.object_names import is_importable, object_name
from dtrain.objectives import MonoForward, Objective
from dtrain.user_code import bind_arguments, import_object
from tests import tiny
from tests.conftest import ROOT
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


# ---- names and fingerprints of objects


class Outer:
    """A class at the top of its module, with a class inside."""

    class Inner:
        """Found as `Outer.Inner`."""

        factor: float = 1.0


def make_class(factor: float, base: type = object) -> type:
    """Return a class that no import finds; its source does not tell the factor."""

    class Local(base):  # type: ignore[misc]
        def loss(self) -> float:
            return factor

    return Local


def other_class() -> type:
    """Return a class of the same name and another source."""

    class Local:
        def loss(self) -> float:
            return 2.0

    return Local


def from_prompt(text: str) -> object:
    """Return the object `f` of a program that has no file."""
    names: dict[str, object] = {"__name__": "prompt"}
    exec(text, names)
    return names["f"]


def make_net(width: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


class Net(nn.Module):
    """A module of a user."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.one, self.scale = nn.Linear(4, 2), scale

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


@pytest.mark.parametrize("item", [make_net, Outer, Outer.Inner, Path, math.sqrt, nn.Linear])
def test_an_importable_object_is_found_under_its_name(item: object, tmp_path: Path) -> None:
    assert is_importable(item)
    assert import_object(object_name(item), tmp_path, "model") is item


def test_other_objects_are_named_by_their_definition() -> None:
    named = {
        make_class(1.0): f"{__name__}:make_class.<locals>.Local",
        partial(make_net, 3): f"{__name__}:make_net",
        Net(1.0): f"{__name__}:Net",
        make_class: f"{__name__}:make_class",
    }
    assert {item: object_name(item) for item in named} == named
    assert object_name(np.zeros(2)) == "numpy:ndarray"
    assert [is_importable(item) for item in named] == [False, False, False, True]
    assert not is_importable(lambda x: x)


def test_an_object_of_the_script_is_named_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    exec("class Focal: ...", vars(script))
    focal = vars(script)["Focal"]
    assert not is_importable(focal)  # a notebook or a prompt
    assert object_name(focal) == "__main__:Focal"
    script.__file__ = str(tmp_path / "mine.py")
    assert is_importable(focal)
    assert object_name(focal) == "mine:Focal"


def test_a_name_inside_a_function_is_refused(tmp_path: Path) -> None:
    with refuses(ConfigError, "user-code.local-object"):
        import_object(object_name(make_class(1.0)), tmp_path, "objective")


TRAINS = """
import dtrain
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

run = dtrain.Run(model=net, data="digits", optimizer=dtrain.Optimizer("sgd", lr=0.1), epochs=1)
dtrain.train(run)
"""


def test_a_module_that_trains_while_it_is_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation of its run would train on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "trains.py").write_text(TRAINS)
    with refuses(ConfigError, "user-code.trains-on-import"):
        import_object("trains:net", tmp_path, "model")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "guarded.py").write_text(TRAINS.replace("dtrain.train(run)", ""))
    assert callable(import_object("guarded:net", tmp_path, "model"))


PAIR = (1, 2)
SAME: list[tuple[Callable[[], object], Callable[[], object]]] = [
    (lambda: make_class(1.0), lambda: make_class(1.0)),
    (lambda: make_class(1.0)(), lambda: make_class(1.0)()),
    (lambda: from_prompt("def f(x): return x + 1"), lambda: from_prompt("def f(x): return x + 1")),
    (lambda: make_net(seed=0), lambda: make_net(seed=1)),  # weights may be drawn anew
    (lambda: {"x": np.zeros(3)}, lambda: {"x": np.zeros(3)}),
    (lambda: [PAIR, PAIR], lambda: [PAIR, PAIR[:1] + PAIR[1:]]),  # one object, or two equal ones
    (lambda: {"c", "a", "b"}, lambda: {"b", "c", "a"}),
]
DIFFERENT: list[tuple[Callable[[], object], Callable[[], object]]] = [
    (lambda: make_class(1.0), lambda: make_class(2.0)),
    (lambda: make_class(1.0), other_class),
    (lambda: make_class(1.0), lambda: make_class(1.0, Outer)),
    (lambda: make_class(1.0, make_class(3.0)), lambda: make_class(1.0, make_class(4.0))),
    (lambda: from_prompt("def f(x): return x + 1"), lambda: from_prompt("def f(x): return x + 2")),
    (lambda: from_prompt("f = lambda x: x.a"), lambda: from_prompt("f = lambda x: x.b")),
    (
        lambda: from_prompt("class f:\n def g(self): return 1"),
        lambda: from_prompt("class f:\n def g(self): return 2"),
    ),
    (lambda: partial(make_net, 3), lambda: partial(make_net, 4)),
    (lambda: make_net(4), lambda: make_net(5)),
    (lambda: Net(1.0), lambda: Net(2.0)),
    (lambda: np.zeros(3), lambda: np.array([0.0, 0.0, 1e-300])),
    (lambda: np.zeros(4), lambda: np.zeros((2, 2))),
    (lambda: torch.zeros(3), lambda: torch.zeros(3, dtype=torch.float64)),
    (lambda: torch.zeros(3, dtype=torch.bfloat16), lambda: torch.ones(3, dtype=torch.bfloat16)),
    (lambda: torch.relu, lambda: torch.tanh),
    (lambda: torch.float32, lambda: torch.float64),
    (lambda: {"x": 1}, lambda: {"x": True}),
    (lambda: ["ab", "c"], lambda: ["a", "bc"]),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_equal_objects_have_equal_fingerprints(
    one: Callable[[], object], other: Callable[[], object]
) -> None:
    assert fingerprint(one()) == fingerprint(other())


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_objects_have_different_fingerprints(
    one: Callable[[], object], other: Callable[[], object]
) -> None:
    assert fingerprint(one()) != fingerprint(other())


def test_an_object_that_contains_itself_has_a_fingerprint() -> None:
    loops = [["loop"], ["loop"], ["other"]]
    for loop in loops:
        loop.append(loop)  # type: ignore[arg-type]
    one, same, other = map(fingerprint, loops)
    assert one == same != other


PROGRAM = """
from dtrain.fingerprint import fingerprint

class Net:
    words = {"b", "a"}
    def f(self, x): return x in {"c", "d", "e"}

print(fingerprint([Net, Net(), {"b", "a", "f"}, Net.f]))
"""


def test_a_fingerprint_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Hashes of texts, and addresses, differ from process to process; with source and without."""
    (tmp_path / "program.py").write_text(PROGRAM)
    for argv in (["-c", PROGRAM], [str(tmp_path / "program.py")]):
        texts = {
            subprocess.run(
                [sys.executable, *argv],
                capture_output=True,
                check=True,
                env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            ).stdout
            for seed in ("1", "2")
        }
        assert len(texts) == 1


def test_a_class_inside_a_function_is_recorded_with_a_fingerprint(tmp_path: Path) -> None:
    """Another one of the same name does not resume its run."""

    def make(scale: float) -> Objective:
        class Scaled(MonoForward):
            gamma: float = 2.0

            def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
                return scale * nn.functional.cross_entropy(output, target)

        return Scaled(gamma=1.0)

    def run(scale: float) -> RunConfig:
        return replace(tiny.run(epochs=1), objective=make(scale))  # type: ignore[arg-type]

    table = run(1.0).to_table()["objective"]
    assert table["name"] == object_name(type(make(1.0)))
    assert (table["gamma"], table["fingerprint"]) == (1.0, fingerprint(type(make(1.0))))
    check_same_run(tmp_path, run(1.0).to_table(), run(1.0))
    with refuses(ConfigError, "resume.settings-changed") as caught:
        check_same_run(tmp_path, run(1.0).to_table(), run(2.0))
    assert "objective.fingerprint" in caught.value.message
    assert "fingerprint" not in tiny.run().to_table()["objective"]
