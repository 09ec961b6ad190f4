"""Networks for images: the papers' counts and functions, names for cuts, refused settings."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dtrain.block.block import Block
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.models.layers import LayerStack
from dtrain.models.shape_inference import LayerProfile, infer_layers
from tests.refusals import refuses

CIFAR, DIGITS = (3, 32, 32), (1, 8, 8)
SMALLEST: dict[str, dict[str, Any]] = {"resnet": {"depth": 8}, "cnn": {}}
"""Fields of a network with one unit at each resolution."""

VGG11 = [[64], [128], [256, 256], [512, 512], [512, 512]]
VGG16 = [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3]


def net(name: str, shape: tuple[int, ...] = CIFAR, **fields: Any) -> LayerStack:
    return load_model(name, fields, Path(), shape, 10)


@cache
def inferred(name: str, **fields: Any) -> tuple[LayerProfile, ...]:
    """Infer the layers of a network for CIFAR once for several tests."""
    return infer_layers(net(name, **fields), CIFAR, torch.float32)


def macs(spec: LayerProfile) -> tuple[int, int, int]:
    return spec.forward_macs, spec.weight_gradient_macs, spec.input_gradient_macs


def parameters(name: str, **fields: Any) -> int:
    layers = net(name, **fields).meta_layers(torch.float32)
    modules = [module for layer in layers if layer is not None for module in layer.values()]
    return sum(p.numel() for module in modules for p in module.parameters())


# Counts and functions of the papers


@pytest.mark.parametrize(
    ("depth", "exact", "table"),
    [(20, 269722, "0.27"), (32, 464154, "0.46"), (56, 853018, "0.85"), (110, 1727962, "1.7")],
)
def test_parameters_of_residual_networks_are_the_papers(depth: int, exact: int, table: str) -> None:
    """He et al. 2015, table 6, in millions; exactly: convolutions, norms and the linear layer."""
    n = (depth - 2) // 6
    pairs = [(3, 16), *[(16, 16)] * 2 * n, (16, 32), *[(32, 32)] * (2 * n - 1)]
    pairs += [(32, 64), *[(64, 64)] * (2 * n - 1)]
    formula = sum(9 * a * b + 2 * b for a, b in pairs) + 64 * 10 + 10
    count = parameters("resnet", depth=depth)
    assert count == formula == exact
    assert f"{count / 1e6:.{len(table) - 2}f}" == table


def test_projections_add_two_small_convolutions() -> None:
    more = parameters("resnet", shortcut="projection") - parameters("resnet")
    assert more == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def test_vgg_has_the_convolutions_of_the_paper() -> None:
    """Simonyan and Zisserman 2014, table 1, column D: 13 convolutions of 14.7 million weights."""
    specs = infer_layers(net("cnn", widths=VGG16, norm="none"), CIFAR, torch.float32)
    assert len(specs) == 13 + 1
    assert sum(spec.parameters for spec in specs[:-1]) == 14714688


@pytest.mark.parametrize("name", ["resnet", "cnn"])
def test_multiply_adds_of_a_convolution_are_the_formula(name: str) -> None:
    """k^2 * inputs * outputs * pixels, in the forward and in both halves of the backward."""
    spec = inferred(name)[0]
    outputs = {"resnet": 16, "cnn": 32}[name]
    assert macs(spec) == (9 * 3 * outputs * 32 * 32,) * 3


def test_multiply_adds_of_a_unit_are_those_of_its_convolutions() -> None:
    """The second convolution's input gradient is counted once, not with the first's weights."""
    spec = inferred("resnet")[1]
    convolution = 9 * 16 * 16 * 32 * 32
    assert macs(spec) == (2 * convolution,) * 3
    assert spec.skippable_macs == convolution


def test_multiply_adds_of_resnet_20() -> None:
    """41 million: 7 convolutions of 16 channels, 6 of 32 and 6 of 64, whose pixels fall by 4."""
    convolution = 9 * 16 * 16 * 1024
    halving = convolution // 2
    stem, head = 9 * 3 * 16 * 1024, 640
    expected = stem + 6 * convolution + 2 * (halving + 5 * convolution) + head
    assert sum(spec.forward_macs for spec in inferred("resnet")) == expected


@pytest.mark.parametrize("fields", [{}, {"shortcut": "projection"}], ids=["A", "B"])
def test_a_unit_is_the_papers_function(fields: dict[str, Any]) -> None:
    """relu(F(x) + shortcut(x)), fig. 2 and section 3.3, against plain functions."""
    model = net("resnet", **fields)
    unit = model.build([4], 0, torch.float64)["unit2-1"]
    x = torch.randn(5, 16, 7, 9, dtype=torch.float64)
    state = unit.state_dict()

    def normalise(y: Tensor, name: str) -> Tensor:
        mean, variance = y.mean((0, 2, 3), True), y.var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = (state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("weight", "bias"))
        return (y - mean) / (variance + 1e-5).sqrt() * scale + shift

    hidden = functional.conv2d(x, state["conv1.weight"], stride=2, padding=1)
    hidden = functional.conv2d(normalise(hidden, "norm1").relu(), state["conv2.weight"], padding=1)
    if fields:
        projected = functional.conv2d(x, state["shortcut.0.weight"], stride=2)
        shortcut = normalise(projected, "shortcut.1")
    else:
        shortcut = torch.zeros(5, 32, 4, 5, dtype=torch.float64)
        shortcut[:, :16] = x[:, :, ::2, ::2]
    torch.testing.assert_close(unit(x), (normalise(hidden, "norm2") + shortcut).relu())


def test_a_convolution_pools_behind_its_resolution() -> None:
    stack = net("cnn", DIGITS, widths=[[4], [6, 8]], norm="none")
    layers = stack.build(range(4), 0, torch.float64)
    x = torch.randn(3, *DIGITS, dtype=torch.float64)
    model = nn.Sequential(OrderedDict(layers))
    state, output = model.state_dict(), model(x)
    for number in (1, 2, 3):
        weight, bias = state[f"conv{number}.conv.weight"], state[f"conv{number}.conv.bias"]
        x = functional.conv2d(x, weight, bias, padding=1).relu()
        x = functional.max_pool2d(x, 2) if number == 1 else x
    expected = x.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", ["resnet", "cnn"])
def test_convolutions_are_drawn_with_variance_two_over_n(name: str) -> None:
    """Eq. 10 of arXiv 1502.01852, by the standard error of a standard deviation."""
    model = net(name, norm="none")
    for layer in model.build(range(len(model.names)), 1, torch.float32).values():
        for module in layer.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                weight = module.weight.detach()
                expected = math.sqrt(2 / weight[0].numel())
                standard_error = expected / math.sqrt(2 * weight.numel())
                assert abs(weight.std().item() - expected) < 5 * standard_error
                assert not module.bias.detach().any()


# Names, shapes and conduct of layers


def test_a_cut_may_stand_between_any_two_units() -> None:
    model = net("resnet", depth=14)
    units = [f"unit{resolution}-{number}" for resolution in (1, 2, 3) for number in (1, 2)]
    assert list(model.names) == ["stem", *units, "head"]
    shapes = [spec.output_shape for spec in infer_layers(model, CIFAR, torch.float32)]
    sizes = [(16, 32, 32)] * 3 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2
    assert shapes == [*sizes, (10,)]


def test_layers_of_a_cnn_end_with_their_pooling() -> None:
    model = net("cnn", widths=VGG11)
    assert list(model.names) == [f"conv{number}" for number in range(1, 9)] + ["head"]
    sizes = [(64, 16), (128, 8), (256, 8), (256, 4), (512, 4), (512, 2), (512, 2), (512, 2)]
    shapes = [spec.output_shape for spec in infer_layers(model, CIFAR, torch.float32)]
    assert shapes == [*((channels, size, size) for channels, size in sizes), (10,)]


@pytest.mark.parametrize("name", ["resnet", "cnn"])
@pytest.mark.parametrize("shape", [DIGITS, (3, 7, 9), CIFAR])
def test_small_and_odd_images_pass(name: str, shape: tuple[int, ...]) -> None:
    model = net(name, shape, **SMALLEST[name])
    specs = infer_layers(model, shape, torch.float32)
    x = torch.randn(2, *shape)
    for layer, spec in zip(model.build(range(len(specs)), 0, x.dtype).values(), specs, strict=True):
        x = layer(x)
        assert x.shape[1:] == spec.output_shape


@pytest.mark.parametrize("name", ["resnet", "cnn"])
def test_gradients_lie_in_memory_as_their_weights_do(name: str) -> None:
    """Images are in channels-last order inside a layer; gradients, which are sent, are not."""
    model = net(name, DIGITS)
    layers = nn.Sequential(*model.build(range(len(model.names)), 0, torch.float32).values())
    x = torch.randn(4, *DIGITS, requires_grad=True)
    layers(x).sum().backward()
    gradients = [parameter.grad for parameter in [x, *layers.parameters()]]
    assert all(gradient is not None and gradient.is_contiguous() for gradient in gradients)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("name", ["resnet", "cnn"])
def test_batch_statistics_alone_couple_samples(name: str, norm: str) -> None:
    model = net(name, DIGITS, norm=norm, **SMALLEST[name])
    specs = infer_layers(model, DIGITS, torch.float64)
    assert {spec.couples_samples for spec in specs[:-1]} == {norm == "batch"}
    module = nn.Sequential(*model.build(range(len(specs)), 0, torch.float64).values())
    x = torch.randn(4, *DIGITS, dtype=torch.float64)
    halves = torch.cat([module(x[:2]), module(x[2:])])
    assert torch.allclose(module(x), halves, rtol=1e-12) == (norm != "batch")


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("name", ["resnet", "cnn"])
def test_layers_neither_draw_nor_write_to_their_input(name: str, norm: str) -> None:
    model = net(name, DIGITS, norm=norm)
    layers = model.build(range(len(model.names)), 0, torch.float32)
    block = Block(0, layers, None, lambda parameters: torch.optim.SGD(parameters, 0.1))
    assert not block.rng_layers
    assert not block.inplace_layers
    state = torch.get_rng_state()
    x = torch.randn(3, *DIGITS)
    torch.set_rng_state(state)
    for layer in layers.values():
        before = x.clone()
        output = layer(x)
        assert torch.equal(x, before)
        x = output
    assert torch.equal(torch.get_rng_state(), state)


# Refused settings


@pytest.mark.parametrize(
    ("name", "shape", "fields", "key"),
    [
        ("resnet", CIFAR, {"depth": 19}, "model.resnet-depth"),
        ("resnet", CIFAR, {"depth": 2}, "model.resnet-depth"),
        ("resnet", CIFAR, {"width": 0}, "model.resnet-width"),
        ("resnet", CIFAR, {"norm": "group", "groups": 6}, "norm.groups-indivisible"),
        ("resnet", CIFAR, {"norm": "group", "groups": 0}, "norm.groups-indivisible"),
        ("resnet", (10,), {}, "model.needs-images"),
        ("cnn", (10,), {}, "model.needs-images"),
        ("cnn", DIGITS, {"widths": VGG11}, "model.cnn-resolutions"),
        ("cnn", CIFAR, {"widths": []}, "model.cnn-widths"),
        ("cnn", CIFAR, {"widths": [[8], []]}, "model.cnn-widths"),
        ("cnn", CIFAR, {"widths": [[0]]}, "model.cnn-widths"),
    ],
)
def test_unsuitable_settings(
    name: str, shape: tuple[int, ...], fields: dict[str, Any], key: str
) -> None:
    with refuses(ConfigError, key):
        infer_layers(net(name, shape, **fields), shape, torch.float32)


@pytest.mark.parametrize(
    ("name", "fields", "key"),
    [
        ("resnet", {"depth": "20"}, "run-file.quoted-number"),
        ("resnet", {"norm": "layer"}, "run-file.wrong-type"),
        ("resnet", {"shortcut": "A"}, "run-file.wrong-type"),
        ("resnet", {"depht": 20}, "run-file.unknown-key"),
        ("cnn", {"widths": [8, 16]}, "run-file.wrong-type"),
    ],
)
def test_settings_of_another_type_or_name(name: str, fields: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        net(name, **fields)
