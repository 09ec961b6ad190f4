"""Laws of models that are no chain: skips, tuples, tied weights, nested containers."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from dtrain.checkpoint.export import export
from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError
from dtrain.models.layers import cast_module
from tests import graph_nets, tiny
from tests.harness import assert_close_model, assert_same_model, some, train_in_threads
from tests.outcome import break_off, model
from tests.refusals import refuses
from tests.single import one_thread  # noqa: F401

NETS: dict[str, tuple[str, ...]] = {
    "skips": ("mid", "up"),
    "noisy_skips": ("deep", "out"),
    "recurrent": ("2", "3"),
    "nested": ("0.3", "1.1"),
    "repeated": ("3", "5"),
    "tied": ("middle", "last"),
    "language_model": ("blocks.0", "norm"),
    "masked_mean": ("mix", "out"),
    "lazy": ("2", "3"),
    "unet": ("deep", "up"),
    "vision_transformer": ("encoder.0", "head"),
    "forecaster": ("1", "2"),
    "labels": ("mid", "up"),
    "complex_chain": ("3", "5"),
    "complex_skips": ("mix", "out"),
}
"""Nets of `graph_nets`, and cuts through their skips, tuples, containers and ties."""


SIMILAR: dict[str, tuple[str, ...]] = {
    "shared_inside": ("2", "3"),
    "dictionary": ("2", "3"),
    "bidirectional": ("1", "2"),
    "weight_norm": ("2", "3"),
    "deeply_nested": ("body.start.1", "body.end.1"),
}
"""Nets of the same kinds, for one law."""


SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
"""For attention: Adam would divide the rounding of a gradient that is zero, that of the keys' bias,
by its own size."""


SETTINGS: dict[str, dict[str, Any]] = {
    "language_model": {
        "data": {"name": "tests.graph_nets:tokens"},
        "task": {"loss": "cross-entropy", "classes-last": True, "metrics": ["perplexity"]},
        "optimizer": SGD,
    },
    "masked_mean": {"data": {"name": "tests.graph_nets:masked_tokens"}},
    "unet": {"data": {"name": "tests.graph_nets:fields"}, "task": {"loss": "mse"}},
    "vision_transformer": {"data": {"name": "tests.graph_nets:images"}, "optimizer": SGD},
    "forecaster": {"data": {"name": "tests.graph_nets:series"}, "task": {"loss": "huber"}},
    "labels": {
        "data": {"name": "tests.graph_nets:several_labels"},
        "model": {"name": "tests.graph_nets:skips"},
        "task": {"loss": "bce-with-logits"},
    },
}
"""Data and tasks of the nets that do not learn the tiny data."""


COMPLEX = ("complex_chain",)
"""Nets whose blocks end with complex numbers; elsewhere these are skips."""


TIED = ("tied", "repeated", "language_model")
OTHER_WEIGHTS = ("noisy_skips", "lazy")
"""Nets that a plain loop does not reproduce: dropout, and weights that the first input draws."""


SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {"objective__name": "backprop", "schedule__name": "1f1b"},
    "pipelined": {"objective__name": "backprop", "schedule__name": "pipelined"},
    "pipedream": {"objective__name": "backprop", "schedule__name": "pipedream"},
    "stream": {"objective__name": "local-head", "schedule__name": "stream"},
    "mono": {"objective__name": "mono-forward"},
}


def run(net: str, schedule: str = "1f1b", **changes: Any) -> Any:
    """Return a tiny run of a net, cut in three."""
    micros = 1 if schedule in ("pipelined", "pipedream") else 3
    named = {
        "model": {"name": f"tests.graph_nets:{net}"},
        "partition": {"cuts": list((NETS | SIMILAR)[net])},
        "micro_batches": micros,
    }
    return tiny.run(**named | SETTINGS.get(net, {}) | SCHEDULES[schedule] | changes)


CASES = [
    (net, schedule)
    for number, net in enumerate(NETS)
    for schedule in some([*SCHEDULES], number, 2)
    if (net not in TIED or schedule in ("1f1b", "pipelined", "pipedream"))
    and (net not in COMPLEX or SCHEDULES[schedule]["objective__name"] == "backprop")
]


@pytest.mark.parametrize(("net", "schedule"), CASES)
def test_any_number_of_stages_trains_the_same_bits(net: str, schedule: str, tmp_path: Path) -> None:
    number = [*NETS].index(net) // 2
    digests = {
        train_in_threads(run(net, schedule), tmp_path / str(stages), stages=stages)["digest"]
        for stages in (1, *some((2, 3), number, 2))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("net", [net for net in NETS if net != "noisy_skips"])
def test_micro_batches_and_replicas_change_nothing(net: str, tmp_path: Path) -> None:
    train_in_threads(run(net, micro_batches=1, mesh__stages=3), tmp_path / "whole")
    train_in_threads(run(net, micro_batches=2, mesh__stages=2), tmp_path / "parts", replicas=2)
    assert_close_model(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("net", some([*NETS], 0, 2))
def test_a_resumed_run_equals_an_uninterrupted_one(net: str, tmp_path: Path) -> None:
    train_in_threads(run(net), tmp_path / "whole", stages=3)
    train_in_threads(run(net), tmp_path / "broken", stages=2)
    break_off(tmp_path / "broken", 4)
    train_in_threads(run(net), tmp_path / "broken", stages=3)
    assert_same_model(tmp_path / "whole", tmp_path / "broken")


def plain_data(net: str) -> tuple[list[Tensor], Tensor]:
    """Return the training inputs of a net as dtrain gives them, and the targets."""
    name = SETTINGS.get(net, {}).get("data", {"name": "tests.tiny:samples"})["name"]
    module = tiny if name.startswith("tests.tiny") else graph_nets
    x, y, *_ = getattr(module, name.partition(":")[2])()
    if isinstance(x, tuple):
        return [torch.from_numpy(array) for array in x], torch.from_numpy(y)
    if x.dtype.kind in "iu":
        return [torch.from_numpy(x).long()], torch.from_numpy(y)
    axes = (0, *range(2, x.ndim))
    mean, deviation = x.mean(axes, keepdims=True), x.std(axes, keepdims=True)
    return [torch.from_numpy((x - mean) / deviation)], torch.from_numpy(y)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "language_model": lambda output, y: cross_entropy(output.flatten(0, 1), y.flatten()),
    "unet": functional.mse_loss,
    "forecaster": functional.huber_loss,
    "labels": lambda output, y: functional.binary_cross_entropy_with_logits(output, y.double()),
}


def plain_loop(net: str, epochs: int) -> dict[str, Tensor]:
    """Train a net as plain PyTorch does, in the order of dtrain, and return its state dict."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = cast_module(make(net), torch.float64)
    inputs, targets = plain_data(net)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if "optimizer" in SETTINGS.get(net, {}):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        for batch in torch.from_numpy(epoch_order(50, 3, epoch)).split(16):
            optimizer.zero_grad()
            output = model(*(x[batch] for x in inputs))
            LOSSES.get(net, cross_entropy)(output, targets[batch]).backward()
            optimizer.step()
    return model.state_dict()


def make(net: str) -> nn.Module:
    """Return a net of `graph_nets`, for three classes where it has classes."""
    name = SETTINGS.get(net, {}).get("model", {"name": f":{net}"})["name"].partition(":")[2]
    function = getattr(graph_nets, name)
    made: nn.Module = function(3) if signature(function).parameters else function()
    return made


@pytest.mark.parametrize("net", [n for n in (*NETS, *SIMILAR) if n not in OTHER_WEIGHTS])
def test_backprop_equals_a_plain_loop(net: str, tmp_path: Path) -> None:
    """Also the names: those of the user's module, a tied weight under both."""
    train_in_threads(run(net), tmp_path / "run", stages=3)
    expected = plain_loop(net, 2)
    exported = export(tmp_path / "run", tmp_path / "net.pt")
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-12, atol=1e-12)
    make(net).load_state_dict(exported)


@pytest.mark.parametrize("objective", ["local-head", "deep-supervision"])
def test_a_head_refuses_complex_outputs(objective: str, tmp_path: Path) -> None:
    with refuses(ConfigError, "partition.cut-not-real"):
        train_in_threads(run("complex_chain", objective__name=objective), tmp_path)


def test_copies_of_a_tied_weight_stay_equal(tmp_path: Path) -> None:
    clip = {"optimizer__clip": 0.1, "optimizer__clip_over": "model"}
    train_in_threads(run("tied", **clip), tmp_path, stages=3)
    tensors = model(tmp_path)
    assert torch.equal(tensors["first.weight"], tensors["last.weight"])


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model.tied-schedule", {"objective__name": "local-head", "schedule__name": "stream"}),
        ("model.tied-clip", {"optimizer__clip": 1.0}),
        ("model.tied-sync", {"sync": {"name": "terngrad"}}),
        ("model.tied-frozen", {"partition__frozen": [0]}),
    ],
)
def test_what_cannot_keep_copies_equal_is_refused(
    key: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with refuses(ConfigError, key):
        train_in_threads(run("tied", **changes), tmp_path, stages=3)


def test_containers_that_the_run_file_opens(tmp_path: Path) -> None:
    opened = {"name": "tests.graph_nets:nested", "open": ["0"]}
    train_in_threads(run("nested", model=opened), tmp_path / "a", stages=3)
    train_in_threads(run("nested"), tmp_path / "b", stages=3)
    assert_close_model(tmp_path / "a", tmp_path / "b")
    for name in ("features", "0.1"):
        with refuses(ConfigError, "model.open-unknown"):
            train_in_threads(run("nested", model=opened | {"open": [name]}), tmp_path / "c")


def test_overwriting_a_skip_is_refused_where_a_cut_makes_it_a_copy(tmp_path: Path) -> None:
    model = {"name": "tests.graph_nets:overwrites_skip"}
    changes: dict[str, Any] = {"model": model, "objective__name": "backprop"}
    cut_off = tiny.run(**changes, partition={"cuts": ["relu", "middle"]})
    with refuses(ConfigError, "model.in-place-skip"):
        train_in_threads(cut_off, tmp_path / "a")
    together = tiny.run(**changes, partition={"cuts": ["middle"]})
    train_in_threads(together, tmp_path / "b", stages=2)
