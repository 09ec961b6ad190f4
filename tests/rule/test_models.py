"""Models: weights are pure in (seed, name), shapes and costs pure in the model."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError, DtrainError
from dtrain.models import load_model
from dtrain.models.layers import Function, LayerStack, NamedFactories, as_layers
from dtrain.models.mlp import Mlp
from dtrain.models.shape_inference import infer_layers, profile_module

SHAPE = (1, 8, 8)
PAIRS = [
    ("first", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20))),
    ("norm", lambda: nn.BatchNorm1d(20)),
    ("last", lambda: nn.Linear(20, 10)),
]


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(inplace=True), nn.Linear(20, 10))


KINDS = {
    "mlp": as_layers(partial(Mlp((32, 16, 8)).layers, SHAPE, 10), "mlp"),
    "listed": as_layers(lambda: PAIRS, "listed"),
    "whole": as_layers(sequential, "whole"),
}


def weights(layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file's folder; the import path is restored afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def refused(call: object, *words: str) -> None:
    """Check that a call is refused with code 2 and every word in its message."""
    assert callable(call)
    with pytest.raises(DtrainError) as caught:
        call()
    assert caught.value.code == ConfigError.code
    for word in words:
        assert word in caught.value.message


# Weights


@pytest.mark.parametrize("kind", KINDS)
def test_layout_never_changes_weights(kind: str) -> None:
    net = KINDS[kind]
    whole = weights(net.build(range(len(net.names)), 3, torch.float32))
    torch.rand(5)
    apart: dict[str, Tensor] = {}
    for index in reversed(range(len(net.names))):
        apart |= weights(net.build([index], 3, torch.float32))
    assert whole.keys() == apart.keys()
    assert all(torch.equal(whole[key], apart[key]) for key in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_decides_and_generator_is_left_alone(kind: str) -> None:
    net = KINDS[kind]
    state = torch.get_rng_state()
    one, other = (weights(net.build(range(len(net.names)), s, torch.float64)) for s in (0, 1))
    infer_layers(net, SHAPE, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert all(t.dtype == torch.float64 for t in one.values() if t.is_floating_point())


def test_equal_layers_of_other_names_differ() -> None:
    net = as_layers(lambda: [(n, lambda: nn.Linear(4, 4)) for n in "ab"], "net")
    a, b = net.build([0, 1], 0, torch.float32).values()
    assert not torch.equal(a.weight, b.weight)


def test_sequential_keeps_its_own_initialisation() -> None:
    torch.manual_seed(7)
    mine = sequential().state_dict()
    ours = weights(KINDS["whole"].build(range(4), 7, torch.float32))
    assert ours.keys() == mine.keys()
    assert all(torch.equal(ours[key], mine[key]) for key in mine)


def test_a_rank_calls_only_its_own_factories() -> None:
    called: list[str] = []

    def factory(name: str) -> nn.Module:
        called.append(name)
        return nn.Linear(2, 2)

    net = as_layers(lambda: [(name, partial(factory, name)) for name in "abc"], "net")
    assert called == []
    net.build([1], 0, torch.float32)
    assert called == ["b"]


# The perceptron


def test_mlp_names_and_function() -> None:
    net = KINDS["mlp"]
    assert net.names == ("fc1", "fc2", "fc3", "head")
    layers = net.build(range(4), 0, torch.float64)
    assert list(weights(layers)) == [f"{n}.{k}" for n in net.names for k in ("weight", "bias")]
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    expected = x.flatten(1)
    for name in ("fc1", "fc2", "fc3"):
        expected = (expected @ layers[name].weight.T + layers[name].bias).relu()
    expected = expected @ layers["head"].weight.T + layers["head"].bias
    got = x
    for layer in layers.values():
        got = layer(got)
    torch.testing.assert_close(got, expected)


def test_mlp_may_be_linear() -> None:
    assert [name for name, _ in Mlp(()).layers(SHAPE, 3)] == ["head"]


@pytest.mark.parametrize("widths", [(0,), (-1,), (1.5,), (True,), "12", 5])
def test_mlp_refuses_widths(widths: object) -> None:
    refused(lambda: Mlp(widths), "widths", "whole numbers")  # type: ignore[arg-type]


def test_mlp_refuses_activation() -> None:
    refused(lambda: Mlp((4,), "relo"), "'relo'", "did you mean 'relu'", "tanh")


# Walk


def test_walk_counts_by_hand() -> None:
    specs = infer_layers(KINDS["mlp"], SHAPE, torch.float32)
    sizes = [64, 32, 16, 8, 10]
    assert [spec.name for spec in specs] == ["fc1", "fc2", "fc3", "head"]
    assert specs[0].input_shape == SHAPE
    assert [spec.output_shape for spec in specs] == [(n,) for n in sizes[1:]]
    for spec, n, m in zip(specs, sizes, sizes[1:], strict=False):
        assert spec.forward_macs == spec.weight_gradient_macs == spec.input_gradient_macs == n * m
        assert spec.parameters == n * m + m


def test_count_of_a_convolution() -> None:
    with torch.device("meta"):
        layer = nn.Conv2d(3, 8, 3)
    spec = profile_module(layer, (3, 10, 12), torch.float32, "conv")
    assert spec.output_shape == (8, 8, 10)
    assert spec.forward_macs == spec.weight_gradient_macs == 8 * 8 * 10 * 3 * 9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_walk_tells_what_running_gives(kind: str, dtype: torch.dtype) -> None:
    net = KINDS[kind]
    x = torch.zeros(3, *SHAPE, dtype=dtype)
    layers = net.build(range(len(net.names)), 0, dtype)
    for spec, layer in zip(infer_layers(net, SHAPE, dtype), layers.values(), strict=True):
        assert spec.input_shape == x.shape[1:]
        x = layer(x)
        assert (spec.output_shape, spec.dtype) == (x.shape[1:], x.dtype)


def test_walk_takes_no_memory() -> None:
    huge = 2**20
    net = as_layers(partial(Mlp((huge, huge)).layers, (huge,), 10), "huge")
    assert [spec.forward_macs for spec in infer_layers(net, (huge,), torch.float32)][:2] == [
        huge**2
    ] * 2


class Awkward(nn.Module):
    """A layer that looks at its values, which meta tensors do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = float(torch.ones(()).item())
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) * (2.0 if x.sum().item() > 0 else self.scale)


@pytest.mark.parametrize(
    "function",
    [
        lambda: [("awkward", Awkward), ("fc", lambda: nn.Linear(5, 3))],
        lambda: nn.Sequential(Awkward(), nn.Linear(5, 3)),
    ],
)
def test_walk_runs_for_real_what_meta_cannot(function: Function) -> None:
    specs = infer_layers(as_layers(function, "net"), SHAPE, torch.float32)
    assert [spec.output_shape for spec in specs] == [(5,), (3,)]
    assert [spec.forward_macs for spec in specs] == [320, 15]


def test_walk_names_the_layer_that_does_not_fit() -> None:
    net = as_layers(
        lambda: [("a", lambda: nn.Linear(64, 5)), ("b", lambda: nn.Linear(6, 2))], "net"
    )
    refused(lambda: infer_layers(net, (64,), torch.float32), "layer 'b'", "(5,)", "shapes")


class Odd(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: (x, x), "tuple"),
        (lambda x: x.sum(), "shape ()"),
        (lambda x: x[:1], "(1, 1, 8, 8)"),
    ],
)
def test_walk_refuses_what_is_not_one_batch(function: object, word: str) -> None:
    net = as_layers(lambda: [("odd", lambda: Odd(function))], "net")
    refused(lambda: infer_layers(net, SHAPE, torch.float32), "layer 'odd'", word, "samples first")


def test_an_error_raised_in_user_code_stays() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("my own")

    net = as_layers(lambda: [("odd", lambda: Odd(broken))], "net")
    with pytest.raises(RuntimeError, match="my own"):
        infer_layers(net, SHAPE, torch.float32)


def test_a_factory_that_raises_keeps_its_error() -> None:
    def broken() -> nn.Module:
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        infer_layers(as_layers(lambda: [("a", broken)], "net"), SHAPE, torch.float32)


# What cannot be a model


class Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x


def shared_module() -> nn.Sequential:
    act = nn.ReLU()
    return nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)


def shared_weight() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


ONE = nn.Sequential(nn.Linear(4, 4))
LINEAR = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: [], ["no layers"]),
        (lambda: nn.Sequential(), ["no layers"]),
        (lambda: nn.Linear(2, 2), ["Linear", "nn.Sequential"]),
        (lambda: None, ["NoneType"]),
        (lambda: Own(nn.ReLU()), ["forward()"]),
        (lambda: ONE, ["same Sequential twice"]),
        (lambda: [("a", nn.ReLU), ("a", nn.ReLU)], ["2 layers called 'a'"]),
        (lambda: [("a.b", nn.ReLU)], ["'a.b'", "dot"]),
        (lambda: [("", nn.ReLU)], ["empty"]),
        (lambda: [("a", nn.ReLU())], ["'a'", "not a factory"]),
        (lambda: [("a", nn.ReLU), nn.ReLU], ["item 1"]),
        (shared_module, ["'3'", "same module as '1'"]),
        (shared_weight, ["'1.weight'", "same parameter as '0.weight'"]),
    ],
)
def test_wrong_models(function: object, words: list[str]) -> None:
    refused(lambda: as_layers(function, "net"), *words)  # type: ignore[arg-type]


def test_factories_must_make_modules_of_their_own() -> None:
    def closed() -> NamedFactories:
        layer = nn.Linear(4, 4)
        return [("a", lambda: layer)]

    def build(net: LayerStack) -> object:
        return lambda: net.build([0], 0, torch.float32)

    refused(build(as_layers(closed, "net")), "layer 'a'", "before its factory")
    refused(build(as_layers(lambda: [("a", lambda: 3)], "net")), "layer 'a'", "int")
    twice = as_layers(lambda: [("a", lambda: LINEAR), ("b", lambda: LINEAR)], "net")
    refused(lambda: infer_layers(twice, (4,), torch.float32), "'b'", "same module as 'a'")


# By name


def test_load_by_name(tmp_path: Path) -> None:
    net = load_model("mlp", {"widths": [4, 3], "activation": "tanh"}, tmp_path, SHAPE, 10)
    assert [spec.output_shape for spec in infer_layers(net, SHAPE, torch.float32)] == [
        (4,),
        (3,),
        (10,),
    ]
    refused(
        lambda: load_model("mpl", {}, tmp_path, SHAPE, 10), "did you mean 'mlp'", "module:function"
    )
    refused(lambda: load_model("mlp", {}, tmp_path, SHAPE, 10), "widths", "run file")
    refused(lambda: load_model("mlp", {"width": 3}, tmp_path, SHAPE, 10), "did you mean 'widths'")


CODE = """
import math
from torch import nn

def net(shape, classes, hidden_units, depth=1):
    sizes = [math.prod(shape)] + [hidden_units] * depth
    hidden = [nn.Linear(n, m) for n, m in zip(sizes, sizes[1:])]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))

def plain():
    return [("only", lambda: nn.Linear(64, 10))]

number = 3
"""


def test_load_a_users_function(folder: Path) -> None:
    (folder / "mynet.py").write_text(CODE)
    net = load_model("mynet:net", {"hidden_units": 6, "depth": 2}, folder, SHAPE, 10)
    specs = infer_layers(net, SHAPE, torch.float32)
    assert [spec.output_shape for spec in specs] == [(64,), (6,), (6,), (10,)]
    assert load_model("mynet:plain", {}, folder, SHAPE, 10).names == ("only",)


def test_the_run_files_folder_comes_first(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    sys.path.insert(0, str(other))
    (other / "firstnet.py").write_text("def plain(): raise RuntimeError('the wrong one')")
    (folder / "firstnet.py").write_text(CODE)
    assert load_model("firstnet:plain", {}, folder, SHAPE, 10).names == ("only",)


def test_wrong_users_functions(folder: Path) -> None:
    (folder / "badnet.py").write_text(CODE)
    (folder / "needs.py").write_text("import a_module_that_is_missing")

    def asked(name: str, **fields: object) -> object:
        return lambda: load_model(name, fields, folder, SHAPE, 10)

    refused(asked("badnet:net"), "hidden-units")
    refused(asked("badnet:net", hidden_unit=3), "'hidden-unit'", "did you mean 'hidden-units'")
    refused(asked("badnet:net", hidden_units=3, classes=4), "'classes'", "depth")
    refused(asked("badnet:nets"), str(folder / "badnet.py"), "no function called 'nets'")
    refused(asked("badnet:number"), "number")
    refused(asked("nonet:net"), "'nonet'", str(folder))
    refused(asked("badnet.deep:net"), "badnet.deep")
    refused(asked("bad net:net"), "package.module:function")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        load_model("needs:net", {}, folder, SHAPE, 10)
