"""The objective `scalable-ff`: goodness of channels, a loss per class, blocks that are apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.scalable_ff import ChannelGoodness, ScalableFf
from tests.rule.updated import ROWS, Updated, autograd, predicted, same, updated

D = torch.float64
C = 3


def first(**told: Any) -> Updated:
    fields = {key: told.pop(key) for key in list(told) if "__" not in key}
    return updated(objective={"name": "scalable-ff", **fields}, **told)


def passed(done: Updated) -> list[tuple[Tensor, Tensor]]:
    """Return (what has goodness, y) of every block, layers normed and detached by hand."""
    x, found = done.x, []
    for index, block in done.blocks.items():
        made = [x]
        for layer in block.layers.values():
            made.append(layer(made[-1]))
        found.append((made[-2 if index == max(done.blocks) else -1], made[-1]))
        y = made[-1].detach().flatten(1)
        centred = y - y.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return found


def good(done: Updated, index: int, h: Tensor) -> Tensor:
    """Return the goodness (rows, C) from the weights of the block's channels."""
    weight, bias = done.blocks[index].head.parameters()  # type: ignore[union-attr]
    return (h.flatten(1) @ weight.T + bias).square()


def test_goodness_is_the_mean_of_the_squares_of_a_channel() -> None:
    for shape in ((12,), (3, 4), (6, 5, 4)):
        made, h = ChannelGoodness(shape, C).to(D), torch.randn(7, *shape, dtype=D)
        weight, bias = made.parameters()
        if len(shape) == 3:
            flat = torch.einsum("ncij,oc->noij", h, weight[:, :, 0, 0]) + bias.view(1, -1, 1, 1)
            wanted = flat.square().mean((2, 3))
        else:
            wanted = (h.flatten(1) @ weight.T + bias).square()
        torch.testing.assert_close(made(h), wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_each_block_learns_its_own_goodness_and_the_head_is_a_probe(blocks: int) -> None:
    """Written out: softplus(theta - g_y) + mean over the others of softplus(g_c - theta)."""
    done = first(theta=0.7, partition__blocks=blocks)
    made, rows = passed(done), torch.arange(ROWS)
    total = torch.zeros((), dtype=D)
    for k, (h, _) in enumerate(made):
        g = good(done, k, h)
        others = sum(softplus(g[rows, (done.y + s) % C] - 0.7) for s in (1, 2)) / 2
        total = total + (softplus(0.7 - g[rows, done.y]) + others).mean()
    head = [*done.blocks[blocks - 1].layers.values()][-1]
    total = total + cross_entropy(head(made[-1][0].detach()), done.y)
    same(done.gradients, autograd(done, total))


@pytest.mark.parametrize("prediction", ["mean", "last", "probe"])
def test_prediction(prediction: str) -> None:
    done = first(prediction=prediction)
    objective, tasks, made = done.job.engine.objective, done.job.engine.block_specs, passed(done)
    scores = predicted(done, done.x, done.y)
    wanted = [good(done, k, h) for k, (h, _) in enumerate(made)]
    if prediction == "probe":
        wanted[-1] = made[-1][1]
    for ours, theirs in zip(scores, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    votes = sum(objective.vote(task, each) for task, each in zip(tasks, scores, strict=True))
    torch.testing.assert_close(votes, torch.stack(wanted).mean(0))
    assert objective.predicts_by_vote == (prediction == "mean")


def test_a_block_of_images_has_c_channels() -> None:
    """c C weights and C biases, the last block's on what enters the head."""
    task = BlockSpec(0, 2, (3, 8, 8), (16, 4, 4), D, 10)
    last = BlockSpec(1, 2, (16, 4, 4), (10,), D, 10, feature_shape=(20, 2, 2))
    for each, channels in ((task, 16), (last, 20)):
        built = ScalableFf().build_head(each)
        assert [tuple(p.shape) for p in built.parameters()] == [(10, channels, 1, 1), (10,)]
    assert [ScalableFf().head_input_shape(each) for each in (task, last)] == [
        (16, 4, 4),
        (20, 2, 2),
    ]


def test_defaults() -> None:
    made = OBJECTIVES["scalable-ff"]()
    assert made == ScalableFf(1.0, "mean")
    assert made.default_schedule == "stream"
    assert [str(route) for route in made.routes(2, "train")] == ["activation F0 -> F1"]
