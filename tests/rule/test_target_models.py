"""Models that follow their targets: the functions of the papers, counts, refused settings."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dtrain.block.block import Block
from dtrain.block.module_traits import may_use_rng
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.models.layers import LayerStack
from dtrain.models.output_spec import OutputSpec
from dtrain.models.shape_inference import infer_layers
from dtrain.models.unet import UNet
from tests.refusals import refuses

D = torch.float64
STEPS, TOKENS = 7, 11
NEXT_TOKEN = OutputSpec((TOKENS, STEPS), 0)
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "gpt-2": {},
    "llama": {"norm": "rms", "positions": "rotary", "kv_heads": 2},
    "encoder": {"causal": False},
}


def net(
    name: str, shape: tuple[int, ...] = (STEPS,), output: OutputSpec = NEXT_TOKEN, **fields: Any
) -> LayerStack:
    sizes = {"depth": 2, "width": 16, "heads": 4} if name == "transformer" else {}
    return load_model(name, sizes | fields, Path(), shape, output.classes, output=output)


def module(model: LayerStack) -> nn.Sequential:
    return nn.Sequential(OrderedDict(model.build(range(len(model.names)), 0, D)))


def plain_transformer(tokens: Tensor, state: dict[str, Tensor], fields: dict[str, Any]) -> Tensor:
    """Return the scores (n, steps, tokens) of two layers, in plain operations, head by head."""
    kv_heads, is_rms, causal = fields.get("kv_heads", 4), "norm" in fields, "causal" not in fields

    def norm(x: Tensor, name: str) -> Tensor:
        x = x if is_rms else x - x.mean(-1, keepdim=True)
        y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]
        return y if is_rms else y + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def turn(x: Tensor) -> Tensor:
        """Rotate complex numbers x_i + i x_(i + 2) of step t by t / 10000^(2 i / 4)."""
        if "positions" not in fields:
            return x
        numbers = torch.complex(x[..., :2], x[..., 2:])
        angles = torch.arange(STEPS)[:, None] / 10000 ** (torch.arange(2, dtype=D) / 2)
        numbers = numbers * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([numbers.real, numbers.imag], -1)

    def attention(x: Tensor, name: str) -> Tensor:
        parts = linear(x, f"{name}.qkv").split(4, -1)
        q, k, v = parts[:4], parts[4 : 4 + kv_heads], parts[4 + kv_heads :]
        mixed = []
        for head in range(4):
            group = head * kv_heads // 4
            scores = turn(q[head]) @ turn(k[group]).transpose(1, 2) / math.sqrt(4)
            if causal:
                scores = scores + torch.full((STEPS, STEPS), -math.inf).triu(1)
            mixed.append(scores.softmax(-1) @ v[group])
        return linear(torch.cat(mixed, -1), f"{name}.project")

    x = state["embed.tokens.weight"][tokens]
    if "positions" not in fields:
        x = x + state["embed.positions"]
    for layer in ("layer1", "layer2"):
        x = x + attention(norm(x, f"{layer}.norm1"), f"{layer}.attention")
        hidden = functional.gelu(linear(norm(x, f"{layer}.norm2"), f"{layer}.up"))
        x = x + linear(hidden, f"{layer}.down")
    return linear(norm(x, "head.norm"), "head.linear")


@pytest.mark.parametrize("fields", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_a_transformer_is_the_papers_function(fields: dict[str, Any]) -> None:
    """Per position, and pooled for one output per sample: the last step, or the mean."""
    tokens = torch.randint(0, TOKENS, (3, STEPS), generator=torch.Generator().manual_seed(0))
    model = module(net("transformer", **fields))
    expected = plain_transformer(tokens, model.state_dict(), fields)
    torch.testing.assert_close(model(tokens), expected.transpose(1, 2))

    classes_last = module(net("transformer", output=OutputSpec((STEPS, TOKENS), -1), **fields))
    torch.testing.assert_close(classes_last(tokens), expected)

    pooled = module(net("transformer", output=OutputSpec((2, 3)), vocabulary=TOKENS, **fields))
    x = pooled[:-1](tokens)
    x = x[:, -1] if fields.get("causal", True) else x.mean(1)
    y = pooled.head.linear(pooled.head.norm(x))
    torch.testing.assert_close(pooled(tokens), y.view(3, 2, 3))


def test_a_step_depends_on_earlier_steps_alone() -> None:
    tokens = torch.zeros(1, STEPS, dtype=torch.int64)
    other = tokens.clone()
    other[0, 4] = 1
    for fields in TRANSFORMERS.values():
        model = module(net("transformer", **fields))
        changed = (model(tokens) != model(other)).any(1)[0].tolist()
        assert changed == [step >= 4 or not fields.get("causal", True) for step in range(STEPS)]


def test_multiply_adds_and_parameters_of_a_layer_are_the_formulas() -> None:
    """Weights: qkv, projection, two of the perceptron; attention: two products per head."""
    for kv_heads in (4, 2):
        spec = infer_layers(net("transformer", kv_heads=kv_heads), (STEPS,), D, torch.int64)[1]
        weights = 16 * (16 + 2 * 4 * kv_heads) + 16 * 16 + 2 * 16 * 64
        attention = 2 * STEPS * STEPS * 16
        assert spec.forward_macs == STEPS * weights + attention
        assert spec.weight_gradient_macs == STEPS * weights
        assert spec.input_gradient_macs == STEPS * weights + 2 * attention
        biases, norms = 16 + 8 * kv_heads + 16 + 64 + 16, 4 * 16
        assert spec.parameters == weights + biases + norms


def test_residual_layers_start_smaller_in_deeper_models() -> None:
    """Divided by sqrt(2 depth), as in GPT-2."""
    one, eight = (net("transformer", depth=depth).build([1], 0, D)["layer1"] for depth in (1, 8))
    for name, weight in one.state_dict().items():
        factor = math.sqrt(8) if name in ("down.weight", "attention.project.weight") else 1
        torch.testing.assert_close(weight, eight.state_dict()[name] * factor)


def test_a_tied_head_is_the_embedding() -> None:
    model = net("transformer", tied_head=True)
    layers = module(model)
    assert layers.head.linear.weight is layers.embed.tokens.weight
    assert layers.head.linear.bias is None
    assert model.names == net("transformer").names
    assert dict(model.tied_names) == {"head.linear.weight": "embed.tokens.weight"}


def test_an_lstm_is_the_recurrence() -> None:
    """Gates i, f, g, o; c = f c + i g; h = o tanh(c), layer after layer."""
    tokens = torch.randint(0, TOKENS, (3, STEPS), generator=torch.Generator().manual_seed(0))
    model = module(net("lstm", widths=[5, 6], embedding=4))
    assert next(iter(model.state_dict())) == "embed.tokens.weight"
    state = model.state_dict()
    x = state["embed.tokens.weight"][tokens]
    for name, width in (("lstm1.lstm", 5), ("lstm2.lstm", 6)):
        h = c = x.new_zeros(3, width)
        states = []
        for step in range(STEPS):
            sums = state[f"{name}.bias_ih_l0"] + state[f"{name}.bias_hh_l0"]
            sums = sums + x[:, step] @ state[f"{name}.weight_ih_l0"].T
            i, f, g, o = (sums + h @ state[f"{name}.weight_hh_l0"].T).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        x = torch.stack(states, 1)
    expected = x @ state["head.linear.weight"].T + state["head.linear.bias"]
    torch.testing.assert_close(model(tokens), expected.transpose(1, 2))

    series = module(net("lstm", (STEPS, 3), OutputSpec((4, 2)), widths=[5]))
    x = torch.randn(3, STEPS, 3, dtype=D)
    last = series.lstm1(x)[:, -1]
    torch.testing.assert_close(series(x), series.head.linear(last).view(3, 4, 2))


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_a_vision_transformer_reads_patches(pool: str) -> None:
    fields = {"patch": 2, "depth": 1, "width": 16, "pool": pool}
    model = module(net("vit", (3, 4, 6), OutputSpec((5,)), **fields))
    images = torch.randn(2, 3, 4, 6, dtype=D)
    rows = [images[:, :, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2, 4)]
    weight = model.patches.project.weight.flatten(1)
    x = torch.stack([row.flatten(1) @ weight.T for row in rows], 1) + model.patches.project.bias
    if pool == "token":
        x = torch.cat([model.patches.token.expand(2, 1, 16), x], 1)
    x = model.layer1(x + model.patches.positions)
    x = x[:, 0] if pool == "token" else x.mean(1)
    expected = model.head.linear(model.head.norm(x))
    torch.testing.assert_close(model(images), expected)
    assert not model.layer1.attention.causal


@pytest.mark.parametrize("axis", [0, -1])
def test_a_unet_is_the_papers_function(axis: int) -> None:
    shape = (5, 8, 4) if axis == 0 else (8, 4, 5)
    model = net("unet", (3, 8, 4), OutputSpec(shape, axis), widths=[4, 6, 8], norm="none")
    assert model.names == ("down1", "down2", "middle", "up2", "up1", "head")
    layers = model.build(range(6), 0, D)

    def twice(name: str, x: Tensor) -> Tensor:
        for number in (1, 2):
            layer = layers[name].get_submodule(f"conv{number}")
            x = functional.conv2d(x, layer.weight, layer.bias, padding=1).relu()
        return x

    def grow(name: str, x: Tensor, skip: Tensor) -> Tensor:
        layer = layers[name].grow
        x = functional.conv_transpose2d(x, layer.weight, layer.bias, stride=2)
        return twice(name, torch.cat([skip, x], 1))

    x = torch.randn(2, 3, 8, 4, dtype=D)
    first = twice("down1", x)
    second = twice("down2", functional.max_pool2d(first, 2))
    y = grow("up2", twice("middle", functional.max_pool2d(second, 2)), second)
    scores = functional.conv2d(grow("up1", y, first), *layers["head"].linear.parameters())
    kind = UNet((4, 6, 8), "none").layers((3, 8, 4), OutputSpec(shape, axis)).double()
    kind.load_state_dict(
        {f"{n}.{k}": v for n, m in layers.items() for k, v in m.state_dict().items()}
    )
    torch.testing.assert_close(kind(x), scores if axis == 0 else scores.movedim(1, -1))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_only_dropout_draws_random_numbers(rate: float) -> None:
    lstm = net("lstm", widths=[4], dropout=rate).build(range(3), 0, torch.float32)
    assert [may_use_rng(layer) for layer in lstm.values()] == [rate > 0, rate > 0, False]
    layers = net("transformer", dropout=rate).build(range(4), 0, torch.float32)
    block = Block(0, layers, None, lambda parameters: torch.optim.SGD(parameters, 0.1))
    assert set(block.rng_layers) == ({"embed", "layer1", "layer2"} if rate else set())


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"heads": 3}, "model.heads-indivisible"),
        ({"kv_heads": 3}, "model.kv-heads-indivisible"),
        ({"heads": 16, "positions": "rotary"}, "model.rotary-odd"),
        ({"depth": 0}, "model.size"),
        ({"kv_heads": 0}, "model.size"),
        ({"dropout": 1.0}, "model.dropout"),
        ({"shape": (3, 4, 4)}, "model.needs-sequences"),
        ({"output": OutputSpec((5,))}, "model.no-vocabulary"),
        ({"output": OutputSpec((TOKENS, 4), 0)}, "model.positions-differ"),
        ({"vocabulary": 20, "tied_head": True}, "model.tied-head"),
        ({"shape": (STEPS, 3), "tied_head": True}, "model.tied-head"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        net("transformer", **fields)


IMAGE, CLASS = (3, 8, 8), OutputSpec((5,))


@pytest.mark.parametrize(
    ("name", "shape", "output", "fields", "key"),
    [
        ("lstm", (STEPS,), NEXT_TOKEN, {"widths": []}, "model.lstm-widths"),
        ("lstm", (STEPS,), NEXT_TOKEN, {"widths": [0]}, "model.lstm-widths"),
        ("lstm", (STEPS,), CLASS, {}, "model.no-vocabulary"),
        ("vit", IMAGE, CLASS, {"patch": 3}, "model.patch-indivisible"),
        ("vit", IMAGE, OutputSpec((5, 8, 8), 0), {}, "model.vit-positions"),
        ("vit", (STEPS,), CLASS, {}, "model.needs-images"),
        ("unet", IMAGE, OutputSpec((5, 8, 8), 0), {"widths": [4]}, "model.unet-widths"),
        ("unet", (3, 6, 8), OutputSpec((5, 6, 8), 0), {}, "model.unet-size"),
        ("unet", IMAGE, CLASS, {}, "model.unet-output"),
        ("unet", IMAGE, OutputSpec((1, 4, 4)), {}, "model.unet-output"),
    ],
)
def test_other_settings_that_cannot_work_are_refused(
    name: str, shape: tuple[int, ...], output: OutputSpec, fields: dict[str, Any], key: str
) -> None:
    with refuses(ConfigError, key):
        net(name, shape, output, **fields)
