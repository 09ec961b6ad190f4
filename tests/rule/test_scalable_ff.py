"""The objective `scalable-ff`: goodness of channels, a loss per class, isolated blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.scalable_ff import ChannelGoodness, ScalableFf
from tests.rule.first_update import ROWS, Updated, assert_same, autograd, first_update, predictions

D = torch.float64
C = 3


def scalable_ff_update(**changes: Any) -> Updated:
    fields = {key: changes.pop(key) for key in list(changes) if "__" not in key}
    return first_update(objective={"name": "scalable-ff", **fields}, **changes)


def block_outputs(update: Updated) -> list[tuple[Tensor, Tensor]]:
    """Return (tensor with goodness, y) of every block, normalised and detached by hand."""
    x, results = update.x, []
    for index, block in update.blocks.items():
        outputs = [x]
        for layer in block.layers.values():
            outputs.append(layer(outputs[-1]))
        results.append((outputs[-2 if index == max(update.blocks) else -1], outputs[-1]))
        y = outputs[-1].detach().flatten(1)
        centred = y - y.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return results


def goodness(update: Updated, index: int, h: Tensor) -> Tensor:
    """Return the goodness (rows, C) from the weights of the block's channels."""
    weight, bias = update.blocks[index].head.parameters()  # type: ignore[union-attr]
    return (h.flatten(1) @ weight.T + bias).square()


def test_goodness_is_the_mean_of_the_squares_of_a_channel() -> None:
    for shape in ((12,), (3, 4), (6, 5, 4)):
        channels, h = ChannelGoodness(shape, C).to(D), torch.randn(7, *shape, dtype=D)
        weight, bias = channels.parameters()
        if len(shape) == 3:
            flat = torch.einsum("ncij,oc->noij", h, weight[:, :, 0, 0]) + bias.view(1, -1, 1, 1)
            expected = flat.square().mean((2, 3))
        else:
            expected = (h.flatten(1) @ weight.T + bias).square()
        torch.testing.assert_close(channels(h), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_each_block_learns_its_own_goodness_and_the_head_is_a_probe(blocks: int) -> None:
    """By formula: softplus(theta - g_y) + mean over the others of softplus(g_c - theta)."""
    update = scalable_ff_update(theta=0.7, partition__blocks=blocks)
    outputs, rows = block_outputs(update), torch.arange(ROWS)
    total = torch.zeros((), dtype=D)
    for k, (h, _) in enumerate(outputs):
        g = goodness(update, k, h)
        others = sum(softplus(g[rows, (update.y + s) % C] - 0.7) for s in (1, 2)) / 2
        total = total + (softplus(0.7 - g[rows, update.y]) + others).mean()
    head = [*update.blocks[blocks - 1].layers.values()][-1]
    total = total + cross_entropy(head(outputs[-1][0].detach()), update.y)
    assert_same(update.gradients, autograd(update, total))


@pytest.mark.parametrize("prediction", ["mean", "last", "probe"])
def test_prediction(prediction: str) -> None:
    update = scalable_ff_update(prediction=prediction)
    engine, outputs = update.job.engine, block_outputs(update)
    objective, specs = engine.objective, engine.block_specs
    scores = predictions(update, update.x, update.y)
    expected = [goodness(update, k, h) for k, (h, _) in enumerate(outputs)]
    if prediction == "probe":
        expected[-1] = outputs[-1][1]
    for ours, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    votes = sum(objective.vote(spec, s) for spec, s in zip(specs, scores, strict=True))
    torch.testing.assert_close(votes, torch.stack(expected).mean(0))
    assert objective.predicts_by_vote == (prediction == "mean")


def test_a_block_of_images_has_c_channels() -> None:
    """c C weights and C biases; those of the last block on the input of the head."""
    first = BlockSpec(0, 2, (3, 8, 8), (16, 4, 4), D, 10)
    last = BlockSpec(1, 2, (16, 4, 4), (10,), D, 10, feature_shape=(20, 2, 2))
    for spec, shape in ((first, (16, 4, 4)), (last, (20, 2, 2))):
        head = ScalableFf().build_head(spec)
        assert [tuple(p.shape) for p in head.parameters()] == [(10, shape[0], 1, 1), (10,)]
        assert ScalableFf().head_input_shape(spec) == shape


def test_defaults() -> None:
    objective = OBJECTIVES["scalable-ff"]()
    assert objective == ScalableFf(1.0, "mean")
    assert objective.default_schedule == "stream"
    assert [str(route) for route in objective.routes(2, "train")] == ["activation F0 -> F1"]
