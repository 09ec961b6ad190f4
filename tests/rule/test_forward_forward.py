"""The objective `forward-forward`: its identities, negatives, peer normalisation, predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, softplus

from dtrain.block.micro_batch import Given, RowRandom
from dtrain.build import RankJob
from dtrain.errors import DtrainError
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import goodness, negatives
from dtrain.objectives.forward_forward import MOMENTUM, ForwardForward, PeerNormalisation
from tests import tiny
from tests.rule.updated import ROWS, Updated, autograd, predicted, same, updated

D = torch.float64
C = 3


def first(**fields: Any) -> Updated:
    """Return the first update under forward-forward with these fields."""
    apart = {key: fields.pop(key) for key in list(fields) if "__" in key or key == "begin"}
    return updated(objective={"name": "forward-forward", **fields}, **apart)


def marked(x: Tensor, labels: Tensor) -> Tensor:
    """Return samples whose first numbers are a one-hot label, or C numbers that are given."""
    code = one_hot(labels, C) if labels.dim() == 1 else labels
    return torch.cat([code.to(D), x.flatten(1)[:, C:]], 1).view_as(x)


def mean(h: Tensor) -> Tensor:
    return h.flatten(1).square().mean(1)


def ends(made: list[list[Tensor]]) -> list[Tensor]:
    """Return what has goodness in each block; a last block that is the head alone has nothing."""
    last = [made[-1][-2]] if len(made[-1]) > 1 else []
    return [*(outs[-1] for outs in made[:-1]), *last]


def features(made: list[list[Tensor]]) -> Tensor:
    """Return what enters the head."""
    if len(made[-1]) > 1:
        return made[-1][-2].detach()
    h = made[-2][-1].detach()
    return h / (h.square().mean(1, keepdim=True).sqrt() + 1e-8)


def probe(done: Updated, made: list[list[Tensor]]) -> Tensor:
    """Return the loss of the head on features that teach nobody."""
    *_, head = done.blocks[max(done.blocks)].layers.values()
    return cross_entropy(head(features(made)), done.y)


def loss(positives: Tensor, negatives: Tensor, theta: float = 1.0) -> Tensor:
    return (softplus(theta - mean(positives)) + softplus(mean(negatives) - theta)).mean()


def three(done: Updated) -> tuple[Tensor, Tensor, Tensor]:
    """Return positives, negatives and neutral samples of an update."""
    wrong = negatives.random_labels(done.given(), C)
    neutral = torch.full((ROWS, C), 1 / C, dtype=D)
    return marked(done.x, done.y), marked(done.x, wrong), marked(done.x, neutral)


# The gradient


def test_the_gradient_is_the_closed_form() -> None:
    """dW = sum_n (sigma(g - theta) - t) 2/d (h phi') x^T / n, layer by layer, without autograd."""
    done = first(peer=0.0, partition__blocks=5)
    with torch.no_grad():
        good, bad, _ = (done.passed(part) for part in three(done))
        for k in range(4):
            name, total = f"fc{k + 1}", torch.zeros(())
            for outs, real in ((good, 1.0), (bad, 0.0)):
                h = outs[k][0]
                x = three(done)[0 if real else 1].flatten(1) if k == 0 else outs[k - 1][0]
                x = x if k == 0 else x / (x.square().mean(1, keepdim=True).sqrt() + 1e-8)
                slope = torch.sigmoid(mean(h) - 1.0) - real
                step = slope[:, None] * 2 / h.shape[1] * h * (h > 0)
                total = total + step.T @ x / ROWS
            found = done.gradients[f"{name}.weight"]
            torch.testing.assert_close(found, total, rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
@pytest.mark.parametrize("square", ["mean", "sum"])
def test_blocks_learn_goodness_and_the_head_is_a_probe(blocks: int, square: str) -> None:
    """Autograd of one loss with nothing between blocks; features of the probe are detached."""
    done = first(peer=0.0, goodness=square, theta=0.8, partition__blocks=blocks)
    good, bad, neutral = (done.passed(part) for part in three(done))
    total = probe(done, neutral)
    for positives, wrong in zip(ends(good), ends(bad), strict=True):
        width = positives.shape[1] if square == "sum" else 1
        above = [width * (mean(each) - 0.8) for each in (positives, wrong)]
        total = total + (softplus(-above[0]) + softplus(above[1])).mean()
    same(done.gradients, autograd(done, total))


def test_the_next_goodness_does_not_see_the_length() -> None:
    """h / rms(h) is the same for c h."""
    h = 1e9 * torch.randn(5, 3, 4, dtype=D)
    normed = goodness.rms_norm(h)
    for scale in (1e3, 7.3, 1e-3):
        torch.testing.assert_close(goodness.rms_norm(scale * h), normed, rtol=1e-13, atol=0)
    torch.testing.assert_close(mean(normed), torch.ones(5, dtype=D))


def test_sums_of_squares_do_not_overflow_float16() -> None:
    objective = ForwardForward(goodness="sum")
    assert (
        objective.compute_goodness(torch.full((2, 2048), 8.0, dtype=torch.float16)).tolist()
        == [131072] * 2
    )
    assert objective.threshold(torch.zeros(2, 3, 4, 4)) == 48
    assert goodness.rms_norm(torch.full((2, 64), 4e4, dtype=torch.float16)).eq(1).all()


def test_what_a_user_sees() -> None:
    done = first()
    positives, wrong, _ = (done.passed(part) for part in three(done))
    tally = done.job.engine.metric_sums
    wanted = loss(positives[0][-1], wrong[0][-1]).item()
    assert abs(tally.loss[0] / ROWS - wanted) < 1e-12
    figures = {name: each / ROWS for name, each in tally.metrics[2].items()}
    assert figures.keys() == {"goodness_positive", "goodness_negative", "probe_loss"}
    assert abs(figures["goodness_positive"] - mean(positives[2][-2]).mean().item()) < 1e-12


# Labels and negatives


def test_a_label_stands_in_the_input_or_beside_it() -> None:
    code, flat = torch.tensor([[0.0, 1, 0]]), torch.arange(8.0).view(1, 2, 4) + 5
    image = torch.arange(12.0).view(1, 2, 2, 3) + 5
    inside, beside = ForwardForward(), ForwardForward(label="beside")
    assert inside.embed_label(flat, code).tolist() == [[[0, 1, 0, 8], [9, 10, 11, 12]]]
    assert inside.embed_label(image, code)[0, 0].tolist() == [[0, 1, 0], [8, 9, 10]]
    assert beside.embed_label(flat, code).tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 0, 1, 0]]
    found = beside.embed_label(image, code)
    assert torch.equal(found[:, :2], image)
    assert found[0, 2].tolist() == [[0, 1, 0], [0, 0, 0]]
    for objective, sample in ((inside, flat), (inside, image), (beside, flat), (beside, image)):
        shape = tuple(objective.embed_label(sample, code).shape[1:])
        assert objective.model_input_shape(tuple(sample.shape[1:]), 3) == shape


@pytest.mark.parametrize(("label", "shape"), [("input", (9,)), ("beside", (4, 3, 3))])
def test_labels_that_do_not_fit_are_refused(label: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(DtrainError, match=rf'label = "{label}": 10 labels do not fit into the 9 '):
        ForwardForward(label=label).model_input_shape(shape, 10)
    assert ForwardForward("beside").model_input_shape((9,), 10) == (19,)


def given(y: Tensor, rows: int) -> Given:
    return Given(y, row_random=RowRandom(1, 0, 0, rows, 0, rows))


def test_random_negatives_are_wrong_and_alike() -> None:
    y = torch.arange(4).repeat(1000)
    wrong = negatives.random_labels(given(y, 4000), 4)
    assert (wrong != y).all()
    shares = torch.bincount(wrong[y == 1], minlength=4) / 1000
    assert shares[1] == 0
    assert (shares[[0, 2, 3]] - 1 / 3).abs().max() < 0.05


def test_hard_negatives_are_drawn_by_the_probe() -> None:
    """In proportion to its probabilities, the true one left out; also where it is sure."""
    y = torch.tensor([1, 3]).repeat_interleave(4000)
    scores = torch.tensor([0.1, 0.6, 0.1, 0.2]).log().expand(8000, 4)
    wrong = negatives.hard_labels(given(y, 8000), scores)
    assert (wrong != y).all()
    for label, wanted in ((1, [1 / 4, 0, 1 / 4, 1 / 2]), (3, [1 / 8, 6 / 8, 1 / 8, 0])):
        shares = torch.bincount(wrong[y == label], minlength=4) / 4000
        assert (shares - torch.tensor(wanted)).abs().max() < 0.04
    sure = negatives.hard_labels(given(y, 8000), 1e4 * one_hot(y, 4).double())
    assert (sure != y).all()
    assert len(sure[y == 3].unique()) == 3


def test_hard_negatives_come_from_the_present_probe() -> None:
    """Two passes: the scores on neutral samples choose the negatives; the probe learns on them."""
    done = first(negatives="hard", peer=0.0, schedule__name="drained")
    _, _, clean = three(done)
    neutral = done.passed(clean)
    wrong = negatives.hard_labels(done.given(), neutral[-1][-1].detach())
    assert not torch.equal(wrong, negatives.random_labels(done.given(), C))
    good, bad = done.passed(marked(done.x, done.y)), done.passed(marked(done.x, wrong))
    goodness = sum(map(loss, ends(good), ends(bad)))
    same(done.gradients, autograd(done, goodness + probe(done, neutral)))


@pytest.mark.parametrize("shape", [(40,), (2, 16, 16)])
def test_hybrids_are_patches_of_two_samples(shape: tuple[int, ...]) -> None:
    x = torch.randn(6, *shape, dtype=D)
    made = negatives.mixed_samples(given(torch.zeros(6, dtype=torch.int64), 6), x)
    mine, other = made == x, made == x.roll(-1, 0)
    assert (mine ^ other).all()
    assert 0.2 < mine.double().mean() < 0.8
    assert (mine[..., 1:] != mine[..., :-1]).double().mean() < 0.25  # of random bits it is 1/2
    if len(shape) == 3:
        assert torch.equal(mine[:, 0], mine[:, 1])


def test_masks_are_smoothed_by_quarters() -> None:
    spike = torch.zeros(1, 5, dtype=D)
    spike[0, 2] = 1
    assert negatives.blur(spike, 1).tolist() == [[0, 0.25, 0.5, 0.25, 0]]


def test_hybrid_negatives_learn_without_labels() -> None:
    done = first(negatives="hybrid", prediction="probe", peer=0.0)
    good, bad = done.passed(done.x), done.passed(negatives.mixed_samples(done.given(), done.x))
    goodness = sum(map(loss, ends(good), ends(bad)))
    same(done.gradients, autograd(done, goodness + probe(done, good)))
    objective = ForwardForward(negatives="hybrid", prediction="probe")
    assert [objective.couples_samples(task) for task in done.job.engine.block_specs] == [
        True,
        False,
        False,
    ]
    with pytest.raises(DtrainError, match='set prediction = "probe"'):
        ForwardForward(negatives="hybrid")


# Peer normalisation


@pytest.mark.parametrize("shape", [(6,), (4, 3, 2)])
def test_the_force_of_peers_is_the_codes(shape: tuple[int, ...]) -> None:
    """Autograd of mean_i (mean(r) - r_i)^2 where the running mean is at rest: a = r."""
    peers = PeerNormalisation(shape).to(D)
    out = torch.rand(5, *shape, dtype=D, requires_grad=True)
    units = out.view(5, shape[0], -1).mean(2).mean(0)
    peers.mean.copy_(units.detach())
    running = MOMENTUM * peers.mean + (1 - MOMENTUM) * units
    (running.mean() - running).square().mean().backward()
    torch.testing.assert_close(peers.cotangent(out.detach()), out.grad, rtol=1e-12, atol=1e-17)


def test_the_running_mean_is_the_codes() -> None:
    """Over updates that were cut into micro-batches, and over segments."""
    peers, wanted = PeerNormalisation((4,)).to(D), torch.full((4,), 0.5, dtype=D)
    for _ in range(2):
        for rows in ([3, 5], [8], [2, 2]):
            parts = [torch.rand(n, 4, dtype=D) for n in rows]
            for part in parts:
                peers.accumulate(part, sum(rows))
            peers.apply_decay()
            wanted = MOMENTUM * wanted + (1 - MOMENTUM) * torch.cat(parts).mean(0)
        peers.finish_segment()
        torch.testing.assert_close(peers.mean, wanted, rtol=1e-13, atol=0)


def test_peers_pull_on_positives_alone() -> None:
    """The gradient of the penalty comes on top, for every block that has goodness."""
    means = [torch.rand(width, dtype=D) for width in (13, 11, 6)]

    def begin(job: RankJob) -> None:
        for block, mean in zip(job.engine.blocks.values(), means, strict=True):
            assert isinstance(block.head, PeerNormalisation)
            block.head.mean.copy_(mean)

    plain, pulled = first(peer=0.0), first(peer=0.5, begin=begin)
    total = torch.zeros((), dtype=D)
    for h, r in zip(ends(pulled.passed(marked(pulled.x, pulled.y))), means, strict=True):
        total = total + 0.5 * 2 * 0.1 / len(r) * ((r - r.mean()) * h.mean(0)).sum()
    theirs = autograd(pulled, total)
    for name, tensor in pulled.gradients.items():
        wanted = plain.gradients[name] + theirs[name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-10, atol=1e-16)
        assert name.startswith("head.") or not torch.equal(tensor, plain.gradients[name])


# Prediction


@pytest.mark.parametrize("counts", [False, True])
def test_classes_are_predicted_by_the_sum_of_goodness(counts: bool) -> None:
    done = first(first=counts)
    objective, tasks = done.job.engine.objective, done.job.engine.block_specs
    scores = predicted(done, done.x, done.y)
    votes = torch.zeros(ROWS, C, dtype=D)
    for c in range(C):
        made = done.passed(marked(done.x, torch.full((ROWS,), c)))
        for k in range(3):
            wanted = mean(ends(made)[k])
            torch.testing.assert_close(scores[k][:, c], wanted)
            votes[:, c] += wanted if k or counts else 0
    found = sum(objective.vote(task, each) for task, each in zip(tasks, scores, strict=True))
    torch.testing.assert_close(found, votes)
    assert objective.predicts_by_vote


def test_the_first_block_counts_where_no_other_has_goodness() -> None:
    """`head` alone is the second block: nothing else could vote."""
    scores = torch.ones(2, C)
    for cut, counts in ((4, True), (3, False)):
        done = first(partition__blocks=None, partition__cuts=[cut])
        engine = done.job.engine
        assert bool(engine.objective.vote(engine.block_specs[0], scores).any()) == counts
        assert (predicted(done, done.x, done.y)[1] is None) == counts


def test_the_probe_predicts_on_neutral_samples() -> None:
    done = first(prediction="probe")
    scores = predicted(done, done.x, done.y)
    torch.testing.assert_close(scores[2], done.passed(three(done)[2])[-1][-1])
    assert scores[:2] == [None, None]
    assert not done.job.engine.objective.predicts_by_vote


# What it says of itself


def test_defaults() -> None:
    made = OBJECTIVES["forward-forward"]()
    assert made == ForwardForward("input", 1.0, "mean", "classes", False, "random", 0.03)
    assert made.default_schedule == "stream"
    assert ForwardForward(negatives="hard").default_schedule == "pipelined"
    task = BlockSpec(0, 2, (4,), (5,), D, C)
    parts = [ForwardForward(prediction="probe", negatives=n) for n in ("random", "hard", "hybrid")]
    assert [each.forward_passes(task) for each in parts] == [3, 3, 2]


def test_convolutions_are_cautioned() -> None:
    image = [BlockSpec(0, 2, (3, 8, 8), (4, 8, 8), D, 10), BlockSpec(1, 2, (4, 8, 8), (10,), D, 10)]
    flat = [BlockSpec(0, 2, (64,), (5,), D, 10), BlockSpec(1, 2, (5,), (10,), D, 10)]
    [caution] = ForwardForward().warnings(image, 8)
    assert "10 of the 192 numbers" in caution
    assert "scalable-ff" in caution
    assert ForwardForward().warnings(flat, 8) == []
    assert ForwardForward(negatives="hybrid", prediction="probe").warnings(image, 8) == []


def test_wrong_names_are_refused() -> None:
    with pytest.raises(DtrainError, match="label"):
        tiny.run(objective={"name": "forward-forward", "label": "above"})
