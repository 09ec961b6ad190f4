"""Models as graphs: names, values that cross cuts, shapes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.models.flow import block_flows
from dtrain.models.graph import SizeRule
from dtrain.models.integer_inputs import takes_integers
from dtrain.models.layers import as_layers
from dtrain.models.pretrained import PretrainedWeights, check_pretrained, load_pretrained
from dtrain.models.shape_inference import infer_layers
from dtrain.models.ties import Tie, TiedCopy, find_ties
from dtrain.planning.plan import make_plan
from tests import graph_nets, tiny
from tests.refusals import refuses


def test_layers_are_the_calls_of_sub_modules() -> None:
    net = as_layers(lambda: graph_nets.skips(3), "net")
    assert net.names == ("down", "mid", "deep", "up", "out")
    specs = infer_layers(net, (2, 5), torch.float32)
    shapes = [spec.output_shape for spec in specs]
    assert shapes == [(2, 6), (2, 6), (2, 12), (24,), (3,)]
    own = sum(p.numel() for p in graph_nets.skips(3).parameters())
    assert sum(spec.parameters for spec in specs) == own


def test_sizes_that_forward_reads_follow_the_rows() -> None:
    net = as_layers(lambda: graph_nets.skips(3), "net")
    first, *_ = infer_layers(net, (2, 5), torch.float32)
    leaves = [leaf for value in first.writes for leaf in value.leaves]
    assert SizeRule(0, 1) in leaves


class Indices(nn.Module):
    """Two layers without a real output, one after the other."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.pick, self.keep = nn.Linear(10, 8), Largest(), nn.Identity()
        self.embed, self.mid = nn.Embedding(8, 6), nn.Linear(6, 6)
        self.last = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (rows, classes) of x (rows, 2, 5)."""
        x = self.keep(self.pick(self.first(x.flatten(1))))
        return self.last(self.mid(self.embed(x)))


class Largest(nn.Module):
    """Returns the position of the largest number."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows,) integers of x (rows, width)."""
        return x.argmax(1)


def picking(classes: int) -> nn.Sequential:
    """Return the same net as a chain."""
    net = Indices(classes)
    real = net.embed, net.mid, net.last
    return nn.Sequential(nn.Flatten(), net.first, net.pick, net.keep, *real)


@pytest.mark.parametrize(
    ("net", "objective", "blocks", "cuts"),
    [
        (f"{__name__}:Indices", "backprop", 2, {(1,), (4,)}),
        (f"{__name__}:Indices", "backprop", 3, {(1, 4)}),
        (f"{__name__}:Indices", "backprop", 4, {(1, 4, 5)}),
        (f"{__name__}:picking", "backprop", 3, {(1, 2), (1, 5), (2, 5)}),
        ("tests.graph_nets:complex_chain", "mono-forward", 3, {(1, 6), (2, 6), (1, 2)}),
    ],
)
def test_balanced_cuts_stand_where_a_block_can_end(
    net: str, objective: str, blocks: int, cuts: set[tuple[int, ...]]
) -> None:
    for balance in ("layers", "flops", "parameters"):
        changes = {"objective__name": objective, "mesh__stages": 1, "model": {"name": net}}
        run = tiny.run(partition={"blocks": blocks, "balance": balance}, **changes)
        assert make_plan(run, 1).layout.cuts in cuts


def test_more_blocks_than_a_model_can_end_are_refused() -> None:
    changes = {"objective__name": "backprop", "partition": {"blocks": 6}}
    for net, key in (
        ("picking", "partition.cut-not-real"),
        ("Indices", "partition.no-main-output"),
    ):
        with refuses(ConfigError, key):
            make_plan(tiny.run(model={"name": f"{__name__}:{net}"}, **changes), 1)


def test_a_skip_goes_from_its_maker_to_every_reader() -> None:
    net = as_layers(lambda: graph_nets.skips(3), "net")
    specs = infer_layers(net, (2, 5), torch.float32)
    assert net.graph is not None
    flows = block_flows(net.graph, specs, [range(1), range(1, 3), range(3, 5)])
    assert [[(s.tensor.name, s.source) for s in f.skip_inputs] for f in flows] == [
        [],
        [],
        [("down", 0)],
    ]
    assert flows[0].skip_outputs == ("down",)
    assert flows[0].main_output == flows[1].main_input == "down"


@pytest.mark.parametrize(
    ("cuts", "names"),
    [((), ("0", "1")), (("0",), ("0.0", "0.1", "0.2", "0.3", "0.4", "1"))],
)
def test_open_containers_are_layers_of_their_own(
    cuts: tuple[str, ...], names: tuple[str, ...]
) -> None:
    assert as_layers(lambda: graph_nets.nested(3), "net", 1, cuts).names == names


def test_a_module_called_twice() -> None:
    """Without tensors it is two layers; with tensors all between the calls is one layer."""

    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(4, 4), inner, nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.last(self.inner(self.first(x))))

    assert as_layers(lambda: Twice(nn.ReLU()), "net").names == ("first", "inner", "last", "inner@2")
    assert as_layers(lambda: Twice(nn.Linear(4, 4)), "net").names == ("first", "inner")


def test_the_line_that_cannot_be_traced_is_named() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # this line
                return self.layer(x)
            return x

    with refuses(ConfigError, "model.untraceable") as caught:
        as_layers(Branch, "net")
    line = Branch.forward.__code__.co_firstlineno + 1
    assert f"{Path(__file__).name}:{line}" in caught.value.message


@pytest.mark.parametrize(
    ("net", "shape", "expected"),
    [("language_model", (7,), True), ("nested", (2, 5), False)],
)
def test_integers_pass_untouched_where_the_model_takes_them(
    net: str, shape: tuple[int, ...], expected: bool
) -> None:
    function = getattr(graph_nets, net)
    model = as_layers(function if expected else lambda: function(3), "net")
    assert takes_integers(model, shape, torch.uint8) == expected
    assert not takes_integers(model, shape, torch.float32)


def test_ties_across_blocks_are_copies() -> None:
    model = as_layers(lambda: graph_nets.tied(3), "net")
    assert find_ties(model, [range(4)]) == ()
    copies = (TiedCopy(0, "first.weight", "Linear"), TiedCopy(1, "last.weight", "Linear"))
    assert find_ties(model, [range(2), range(2, 4)]) == (Tie(copies, 100 * 4),)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_a_file_replace_the_initial_ones(suffix: str, tmp_path: Path) -> None:
    model, path = as_layers(lambda: graph_nets.skips(3), "net"), tmp_path / f"net{suffix}"
    state = graph_nets.skips(3).state_dict()
    if suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is missing")
        safetensors.save_file(state, path)
    weights = PretrainedWeights(path)
    check_pretrained(weights, model, strict=True)
    layers = model.build([0, 3], 0, torch.float32)
    load_pretrained(weights, layers, model.tied_names)
    assert torch.equal(layers["down"].state_dict()["weight"], state["down.weight"])
    assert torch.equal(layers[""].state_dict()["position"], state["position"])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda state: state.pop("down.weight"), "model.weights-names"),
        (lambda state: state.update(other=torch.zeros(1)), "model.weights-names"),
        (lambda state: state.update({"down.weight": torch.zeros(2)}), "model.weights-shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: object, key: str, tmp_path: Path) -> None:
    assert callable(change)
    model, path = as_layers(lambda: graph_nets.skips(3), "net"), tmp_path / "net.pt"
    state = graph_nets.skips(3).state_dict()
    change(state)
    torch.save(state, path)
    with refuses(ConfigError, key):
        check_pretrained(PretrainedWeights(path), model, strict=True)
    if key == "model.weights-names":
        check_pretrained(PretrainedWeights(path), model, strict=False)
    with refuses(ConfigError, "model.weights-missing"):
        PretrainedWeights(tmp_path / "none.pt")
