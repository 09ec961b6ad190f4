"""The objective `layer-collaboration`: one loss of all goodness, and forward-forward without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, softplus

from dtrain.objectives import OBJECTIVES
from dtrain.objectives.common import negatives
from dtrain.objectives.layer_collaboration import LayerCollaboration
from dtrain.schedules import SCHEDULES
from tests.rule.first_update import ROWS, Updated, assert_same, autograd, first_update

C = 3


def collaboration_update(**changes: Any) -> Updated:
    fields = {key: changes.pop(key) for key in list(changes) if "__" not in key}
    return first_update(objective={"name": "layer-collaboration", **fields}, **changes)


def row_groups(update: Updated) -> list[Tensor]:
    """Return positives, negatives and neutral samples."""
    wrong = negatives.random_labels(update.micro_batch(), C)
    codes = [
        one_hot(update.y, C),
        one_hot(wrong, C),
        torch.full((ROWS, C), 1 / C, dtype=torch.float64),
    ]
    x = update.x
    return [torch.cat([c.to(x), x.flatten(1)[:, C:]], 1).view_as(x) for c in codes]


def expected_gradients(update: Updated) -> dict[str, Tensor]:
    """Return the gradients of ONE loss of G = sum_j g_j, with blocks detached from each other."""
    outputs = update.layer_outputs(torch.cat(row_groups(update)))
    last, total = len(outputs) - 1, torch.zeros(2 * ROWS, dtype=torch.float64)
    for k, layer_outputs in enumerate(outputs):
        if k < last or len(layer_outputs) > 1:
            h = layer_outputs[-1 if k < last else -2]
            total = total + h[: 2 * ROWS].flatten(1).square().mean(1)
    loss = (softplus(1.0 - total[:ROWS]) + softplus(total[ROWS:] - 1.0)).mean()
    x = outputs[-1][-2] if len(outputs[-1]) > 1 else outputs[-2][-1]
    if len(outputs[-1]) == 1:
        x = x / (x.square().mean(1, keepdim=True).sqrt() + 1e-8)
    head = [*update.blocks[last].layers.values()][-1]
    return autograd(update, loss + cross_entropy(head(x[2 * ROWS :].detach()), update.y))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("schedule", ["pipelined", "drained", "1f1b"])
def test_the_gradient_is_that_of_one_global_loss(blocks: int, schedule: str) -> None:
    """With difference 0.0: in the first update nothing is stale yet, whatever the schedule."""
    update = collaboration_update(partition__blocks=blocks, schedule__name=schedule)
    expected = expected_gradients(update)
    assert_same(update.gradients, expected)
    assert all(torch.equal(update.gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_without_the_others_it_is_forward_forward(blocks: int) -> None:
    without = collaboration_update(gamma=0.0, partition__blocks=blocks).gradients
    forward_forward = first_update(
        objective={"name": "forward-forward", "peer": 0.0}, partition__blocks=blocks
    ).gradients
    assert all(torch.equal(without[name], forward_forward[name]) for name in forward_forward)
    with_others = collaboration_update(partition__blocks=blocks).gradients
    same = [torch.equal(with_others[name], forward_forward[name]) for name in forward_forward]
    assert all(same) == (blocks == 1)


def test_gamma_scales_the_goodness_of_the_others() -> None:
    """sigma(g_k + gamma sum_{j != k} sg(g_j) - theta), block by block."""
    update = collaboration_update(gamma=0.5, theta=0.7)
    outputs = update.layer_outputs(torch.cat(row_groups(update)[:2]))
    goodness = [
        layer_outputs[-1 - (k == 2)].square().mean(1) for k, layer_outputs in enumerate(outputs)
    ]
    total = torch.zeros((), dtype=torch.float64)
    for k, own_goodness in enumerate(goodness):
        others = sum(other.detach() for j, other in enumerate(goodness) if j != k)
        margin = own_goodness + 0.5 * others - 0.7
        total = total + (softplus(-margin[:ROWS]) + softplus(margin[ROWS:])).mean()
    expected = autograd(update, total)
    gradients = {n: g for n, g in update.gradients.items() if not n.startswith("head.")}
    assert_same(gradients, {name: expected[name] for name in gradients})


def test_all_blocks_record_the_same_loss_and_their_own_goodness() -> None:
    sums = collaboration_update().job.engine.metric_sums
    assert len(set(sums.loss.values())) == 1
    assert len({metrics["goodness_positive"] for metrics in sums.metrics.values()}) == 3


def test_the_messages() -> None:
    """A number per positive and negative forward, the total back; in prediction neither."""
    objective = LayerCollaboration()
    routes = [str(route) for route in objective.routes(3, "train")]
    assert routes == [
        *("pairs F0 -> F1", "pairs F1 -> F2", "sum F0 -> F1", "sum F1 -> F2"),
        *("total B2 -> B1", "total B2 -> B0"),
    ]
    assert {route.name for route in objective.routes(3, "predict")} == {"candidates", "votes"}
    schedules = {
        n for n, s in SCHEDULES.items() if all(map(s().supports, objective.routes(3, "train")))
    }
    assert {"pipelined", "drained", "1f1b"} <= schedules
    assert "stream" not in schedules


def test_defaults() -> None:
    objective = OBJECTIVES["layer-collaboration"]()
    assert objective == LayerCollaboration("input", 1.0, "mean", "classes", True, 1.0)
    assert objective.default_schedule == "pipelined"
