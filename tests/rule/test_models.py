"""Models: weights depend only on (seed, name), shapes and costs only on the model."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtrain.config.parse import parse_run
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.models.layers import Function, NamedFactories, as_layers
from dtrain.models.mlp import Mlp
from dtrain.models.shape_inference import infer_layers, profile_module
from dtrain.planning.plan import make_plan
from tests.refusals import refuses

SHAPE = (1, 8, 8)
PAIRS: NamedFactories = [
    ("first", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20))),
    ("norm", lambda: nn.BatchNorm1d(20)),
    ("last", lambda: nn.Linear(20, 10)),
]


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(inplace=True), nn.Linear(20, 10))


MODELS = {
    "mlp": as_layers(partial(Mlp((32, 16, 8)).layers, SHAPE, 10), "mlp"),
    "factories": as_layers(lambda: PAIRS, "factories"),
    "sequential": as_layers(sequential, "sequential"),
}


def weights(layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run file's folder; restore the import path afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


# Weights


@pytest.mark.parametrize("kind", MODELS)
def test_layout_never_changes_weights(kind: str) -> None:
    net = MODELS[kind]
    together = weights(net.build(range(len(net.names)), 3, torch.float32))
    torch.rand(5)
    one_by_one: dict[str, Tensor] = {}
    for index in reversed(range(len(net.names))):
        one_by_one |= weights(net.build([index], 3, torch.float32))
    assert together.keys() == one_by_one.keys()
    assert all(torch.equal(together[key], one_by_one[key]) for key in together)


@pytest.mark.parametrize("kind", MODELS)
def test_seed_decides_and_generator_is_left_alone(kind: str) -> None:
    net = MODELS[kind]
    state = torch.get_rng_state()
    one, other = (weights(net.build(range(len(net.names)), seed, torch.float64)) for seed in (0, 1))
    infer_layers(net, SHAPE, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    floats = [tensor for tensor in one.values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float64}


def test_equal_layers_of_other_names_differ() -> None:
    net = as_layers(lambda: [(name, lambda: nn.Linear(4, 4)) for name in "ab"], "net")
    a, b = net.build([0, 1], 0, torch.float32).values()
    assert not torch.equal(a.weight, b.weight)


def test_sequential_keeps_its_own_initialisation() -> None:
    torch.manual_seed(7)
    expected = sequential().state_dict()
    built = weights(MODELS["sequential"].build(range(4), 7, torch.float32))
    assert built.keys() == expected.keys()
    assert all(torch.equal(built[key], expected[key]) for key in expected)


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
    net = MODELS["mlp"]
    assert net.names == ("fc1", "fc2", "fc3", "head")
    layers = net.build(range(4), 0, torch.float64)
    assert list(weights(layers)) == [f"{n}.{k}" for n in net.names for k in ("weight", "bias")]
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    expected = x.flatten(1)
    for name in ("fc1", "fc2", "fc3"):
        expected = (expected @ layers[name].weight.T + layers[name].bias).relu()
    expected = expected @ layers["head"].weight.T + layers["head"].bias
    torch.testing.assert_close(nn.Sequential(*layers.values())(x), expected)


def test_mlp_may_be_linear() -> None:
    assert [name for name, _ in Mlp(()).layers(SHAPE, 3)] == ["head"]


@pytest.mark.parametrize("widths", [(0,), (-1,), (1.5,), (True,), "12", 5])
def test_mlp_refuses_widths(widths: object) -> None:
    with refuses(ConfigError, "model.mlp-widths"):
        Mlp(widths)  # type: ignore[arg-type]


def test_mlp_refuses_activation() -> None:
    with refuses(ConfigError, "activation.unknown"):
        Mlp((4,), "relo")


# Shapes and costs


def test_costs_are_those_counted_by_hand() -> None:
    specs = infer_layers(MODELS["mlp"], SHAPE, torch.float32)
    sizes = [64, 32, 16, 8, 10]
    assert [spec.name for spec in specs] == ["fc1", "fc2", "fc3", "head"]
    assert specs[0].input_shape == SHAPE
    assert [spec.output_shape for spec in specs] == [(size,) for size in sizes[1:]]
    for spec, (n, m) in zip(specs, pairwise(sizes), strict=True):
        assert spec.forward_macs == spec.weight_gradient_macs == spec.input_gradient_macs == n * m
        assert spec.parameters == n * m + m


def test_cost_of_a_convolution() -> None:
    with torch.device("meta"):
        layer = nn.Conv2d(3, 8, 3)
    spec = profile_module(layer, (3, 10, 12), torch.float32, "conv")
    assert spec.output_shape == (8, 8, 10)
    assert spec.forward_macs == spec.weight_gradient_macs == 8 * 8 * 10 * 3 * 9


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inferred_shapes_are_those_of_a_run(kind: str, dtype: torch.dtype) -> None:
    net = MODELS[kind]
    x = torch.zeros(3, *SHAPE, dtype=dtype)
    layers = net.build(range(len(net.names)), 0, dtype)
    for spec, layer in zip(infer_layers(net, SHAPE, dtype), layers.values(), strict=True):
        assert spec.input_shape == x.shape[1:]
        x = layer(x)
        assert (spec.output_shape, spec.dtype) == (x.shape[1:], x.dtype)


def test_inference_takes_no_memory() -> None:
    huge = 2**20
    net = as_layers(partial(Mlp((huge, huge)).layers, (huge,), 10), "huge")
    specs = infer_layers(net, (huge,), torch.float32)
    assert [spec.forward_macs for spec in specs[:2]] == [huge**2] * 2


class ReadsValues(nn.Module):
    """A layer that reads values, which meta tensors do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = float(torch.ones(()).item())
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) * (2.0 if x.sum().item() > 0 else self.scale)


@pytest.mark.parametrize(
    "function",
    [
        lambda: [("awkward", ReadsValues), ("fc", lambda: nn.Linear(5, 3))],
        lambda: nn.Sequential(ReadsValues(), nn.Linear(5, 3)),
    ],
)
def test_layers_that_cannot_run_on_meta_are_run_on_the_cpu(function: Function) -> None:
    specs = infer_layers(as_layers(function, "net"), SHAPE, torch.float32)
    assert [spec.output_shape for spec in specs] == [(5,), (3,)]
    assert [spec.forward_macs for spec in specs] == [320, 15]


def test_the_error_names_the_layer_that_does_not_fit() -> None:
    pairs = [("a", lambda: nn.Linear(64, 5)), ("b", lambda: nn.Linear(6, 2))]
    net = as_layers(lambda: pairs, "net")
    with refuses(ConfigError, "model.layer-input") as caught:
        infer_layers(net, (64,), torch.float32)
    assert "'b'" in caught.value.message


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


@pytest.mark.parametrize("function", [lambda x: x.sum(), lambda x: x[:1]])
def test_outputs_other_than_one_batch_are_refused(function: Callable[[Tensor], object]) -> None:
    net = as_layers(lambda: [("odd", lambda: Lambda(function))], "net")
    with refuses(ConfigError, "model.layer-output"):
        infer_layers(net, SHAPE, torch.float32)


def test_an_error_raised_in_user_code_stays() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("my own")

    net = as_layers(lambda: [("odd", lambda: Lambda(broken))], "net")
    with pytest.raises(RuntimeError, match="my own"):
        infer_layers(net, SHAPE, torch.float32)


def test_a_factory_that_raises_keeps_its_error() -> None:
    def broken() -> nn.Module:
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        infer_layers(as_layers(lambda: [("a", broken)], "net"), SHAPE, torch.float32)


# Illegal models


class CallsNothing(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Branching(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) if x.sum() > 0 else x


class ReadsTraining(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) if self.training else x


class TwoArguments(nn.Sequential):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self[0](x + y)


ONE = nn.Sequential(nn.Linear(4, 4))
LINEAR = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("function", "key"),
    [
        (lambda: [], "model.no-layers"),
        (lambda: nn.Sequential(), "model.no-layers"),
        (lambda: nn.Linear(2, 2), "model.no-layers"),
        (lambda: None, "model.function-result"),
        (lambda: CallsNothing(nn.ReLU()), "model.no-layers"),
        (lambda: Branching(nn.ReLU()), "model.untraceable"),
        (lambda: ReadsTraining(nn.ReLU()), "model.forward-reads-training"),
        (lambda: TwoArguments(nn.ReLU()), "model.forward-arguments"),
        (lambda: ONE, "model.module-reused"),
        (lambda: [("a", nn.ReLU), ("a", nn.ReLU)], "model.layer-name-repeated"),
        (lambda: [("a.b", nn.ReLU)], "model.layer-name-invalid"),
        (lambda: [("", nn.ReLU)], "model.layer-name-invalid"),
        (lambda: [("heads", nn.ReLU)], "model.layer-name-reserved"),
        (lambda: [("a", nn.ReLU())], "model.layer-not-a-factory"),
        (lambda: [("a", nn.ReLU), nn.ReLU], "model.pair-invalid"),
    ],
)
def test_illegal_models_are_refused(function: Function, key: str) -> None:
    with refuses(ConfigError, key):
        as_layers(function, "net")


def test_factories_must_make_modules_of_their_own() -> None:
    def closed() -> NamedFactories:
        layer = nn.Linear(4, 4)
        return [("a", lambda: layer)]

    with refuses(ConfigError, "model.factory-reuses-tensors"):
        as_layers(closed, "net").build([0], 0, torch.float32)
    with refuses(ConfigError, "model.factory-result"):
        as_layers(lambda: [("a", lambda: 3)], "net").build([0], 0, torch.float32)
    twice = as_layers(lambda: [("a", lambda: LINEAR), ("b", lambda: LINEAR)], "net")
    with refuses(ConfigError, "model.shared"):
        infer_layers(twice, (4,), torch.float32)


# By name


def test_the_example_of_the_docs(folder: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    docs = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    code, *_ = re.findall(r"^```python\n(.*?)^```", docs, re.M | re.S)
    toml, *_ = re.findall(r"^```toml\n(.*?)^```", docs, re.M | re.S)
    (folder / "mynet.py").write_text(code)
    layout = make_plan(parse_run(tomllib.loads(toml), folder / "run.toml"), 2).layout
    assert [block.layers for block in layout.block_layouts] == [range(2), range(2, 4)]


def test_load_by_name(tmp_path: Path) -> None:
    net = load_model("mlp", {"widths": [4, 3], "activation": "tanh"}, tmp_path, SHAPE, 10)
    specs = infer_layers(net, SHAPE, torch.float32)
    assert [spec.output_shape for spec in specs] == [(4,), (3,), (10,)]
    with refuses(ConfigError, "model.unknown"):
        load_model("mpl", {}, tmp_path, SHAPE, 10)
    with refuses(ConfigError, "user-code.missing-argument"):
        load_model("mlp", {}, tmp_path, SHAPE, 10)
    with refuses(ConfigError, "run-file.unknown-key"):
        load_model("mlp", {"width": 3}, tmp_path, SHAPE, 10)


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
    (folder / "usernet.py").write_text(CODE)
    net = load_model("usernet:net", {"hidden_units": 6, "depth": 2}, folder, SHAPE, 10)
    specs = infer_layers(net, SHAPE, torch.float32)
    assert [spec.output_shape for spec in specs] == [(64,), (6,), (6,), (10,)]
    assert load_model("usernet:plain", {}, folder, SHAPE, 10).names == ("only",)


def test_the_run_files_folder_comes_first(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    sys.path.insert(0, str(other))
    (other / "firstnet.py").write_text("def plain(): raise RuntimeError('the wrong one')")
    (folder / "firstnet.py").write_text(CODE)
    assert load_model("firstnet:plain", {}, folder, SHAPE, 10).names == ("only",)


@pytest.mark.parametrize(
    ("name", "fields", "key"),
    [
        ("badnet:net", {}, "user-code.missing-argument"),
        ("badnet:net", {"hidden_unit": 3}, "run-file.unknown-key"),
        ("badnet:net", {"hidden_units": 3, "classes": 4}, "run-file.unknown-key"),
        ("badnet:nets", {}, "user-code.no-function"),
        ("badnet:number", {}, "user-code.no-function"),
        ("nonet:net", {}, "user-code.no-module"),
        ("badnet.deep:net", {}, "user-code.no-module"),
        ("bad net:net", {}, "user-code.malformed-name"),
    ],
)
def test_wrong_users_functions(
    folder: Path, name: str, fields: dict[str, object], key: str
) -> None:
    (folder / "badnet.py").write_text(CODE)
    with refuses(ConfigError, key):
        load_model(name, fields, folder, SHAPE, 10)


def test_a_users_module_that_lacks_an_import_keeps_its_error(folder: Path) -> None:
    (folder / "needs.py").write_text("import a_module_that_is_missing")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        load_model("needs:net", {}, folder, SHAPE, 10)
