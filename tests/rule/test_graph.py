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
from tests import graph_nets
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
