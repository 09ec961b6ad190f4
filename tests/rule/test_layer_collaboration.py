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
from tests.rule.updated import ROWS, Updated, autograd, same, updated

C = 3


def first(**told: Any) -> Updated:
    fields = {key: told.pop(key) for key in list(told) if "__" not in key}
    return updated(objective={"name": "layer-collaboration", **fields}, **told)


def three(done: Updated) -> list[Tensor]:
    """Return positives, negatives and neutral samples."""
    wrong = negatives.random_labels(done.given(), C)
    codes = [
        one_hot(done.y, C),
        one_hot(wrong, C),
        torch.full((ROWS, C), 1 / C, dtype=torch.float64),
    ]
    x = done.x
    return [torch.cat([c.to(x), x.flatten(1)[:, C:]], 1).view_as(x) for c in codes]


def wanted(done: Updated) -> dict[str, Tensor]:
    """Return the gradients of ONE loss of G = sum_j g_j, stop-gradients between the blocks."""
    made = done.passed(torch.cat(three(done)))
    last, total = len(made) - 1, torch.zeros(2 * ROWS, dtype=torch.float64)
    for k, outs in enumerate(made):
        if k < last or len(outs) > 1:
            h = outs[-1 if k < last else -2]
            total = total + h[: 2 * ROWS].flatten(1).square().mean(1)
    loss = (softplus(1.0 - total[:ROWS]) + softplus(total[ROWS:] - 1.0)).mean()
    x = made[-1][-2] if len(made[-1]) > 1 else made[-2][-1]
    if len(made[-1]) == 1:
        x = x / (x.square().mean(1, keepdim=True).sqrt() + 1e-8)
    head = [*done.blocks[last].layers.values()][-1]
    return autograd(done, loss + cross_entropy(head(x[2 * ROWS :].detach()), done.y))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("schedule", ["pipelined", "drained", "1f1b"])
def test_the_gradient_is_that_of_one_global_loss(blocks: int, schedule: str) -> None:
    """Difference 0.0: in an update nothing is stale yet, whatever the schedule."""
    done = first(partition__blocks=blocks, schedule__name=schedule)
    theirs = wanted(done)
    same(done.gradients, theirs)
    assert all(torch.equal(done.gradients[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_without_the_others_it_is_forward_forward(blocks: int) -> None:
    alone = first(gamma=0.0, partition__blocks=blocks).gradients
    plain = updated(
        objective={"name": "forward-forward", "peer": 0.0}, partition__blocks=blocks
    ).gradients
    assert all(torch.equal(alone[name], plain[name]) for name in plain)
    joint = first(partition__blocks=blocks).gradients
    assert any(not torch.equal(joint[name], plain[name]) for name in plain) == (blocks > 1)


def test_half_of_the_others_counts_half() -> None:
    """sigma(g_k + gamma sum_{j != k} sg(g_j) - theta), block by block."""
    done = first(gamma=0.5, theta=0.7)
    made = done.passed(torch.cat(three(done)[:2]))
    good = [outs[-1 - (k == 2)].square().mean(1) for k, outs in enumerate(made)]
    total = torch.zeros((), dtype=torch.float64)
    for k, own in enumerate(good):
        others = sum(each.detach() for j, each in enumerate(good) if j != k)
        above = own + 0.5 * others - 0.7
        total = total + (softplus(-above[:ROWS]) + softplus(above[ROWS:])).mean()
    theirs = autograd(done, total)
    ours = {n: g for n, g in done.gradients.items() if not n.startswith("head.")}
    same(ours, {name: theirs[name] for name in ours})


def test_all_blocks_see_the_same_loss_and_their_own_goodness() -> None:
    tally = first().job.engine.metric_sums
    assert len(set(tally.loss.values())) == 1
    assert len({each["goodness_positive"] for each in tally.metrics.values()}) == 3


def test_what_travels() -> None:
    """A number per positive and negative on, the total back; in prediction neither."""
    objective = LayerCollaboration()
    found = [str(route) for route in objective.routes(3, "train")]
    assert found == [
        *("pairs F0 -> F1", "pairs F1 -> F2", "sum F0 -> F1", "sum F1 -> F2"),
        *("total B2 -> B1", "total B2 -> B0"),
    ]
    assert {route.name for route in objective.routes(3, "predict")} == {"candidates", "votes"}
    runs = {n for n, s in SCHEDULES.items() if all(map(s().supports, objective.routes(3, "train")))}
    assert {"pipelined", "drained", "1f1b"} <= runs
    assert "stream" not in runs


def test_defaults() -> None:
    made = OBJECTIVES["layer-collaboration"]()
    assert made == LayerCollaboration("input", 1.0, "mean", "classes", True, 1.0)
    assert made.default_schedule == "pipelined"
