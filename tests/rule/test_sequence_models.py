"""Models of sequences: the papers' functions in plain operations, counts, refused settings."""

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
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.models.layers import LayerStack
from dtrain.models.output_spec import OutputSpec
from dtrain.models.shape_inference import infer_layers
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


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_only_dropout_draws_random_numbers(rate: float) -> None:
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
