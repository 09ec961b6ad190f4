"""The objective `forward-forward`: its identities, negatives, peer normalisation, predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, softplus

from dtrain.block.micro_batch import MicroBatch, RowRandom
from dtrain.build import RankJob
from dtrain.errors import ConfigError
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import goodness, negatives
from dtrain.objectives.forward_forward import MOMENTUM, ForwardForward, PeerNormalisation
from tests import tiny
from tests.refusals import refuses
from tests.rule.first_update import ROWS, Updated, assert_same, autograd, first_update, predictions
from tests.rule.warning_numbers import numbers_in

D = torch.float64
C = 3


def ff_update(**fields: Any) -> Updated:
    """Return the first update under forward-forward with these fields."""
    run_fields = {key: fields.pop(key) for key in list(fields) if "__" in key or key == "before"}
    return first_update(objective={"name": "forward-forward", **fields}, **run_fields)


def with_labels(x: Tensor, labels: Tensor) -> Tensor:
    """Return samples whose first C numbers are the one-hot labels (rows,), or codes (rows, C)."""
    code = one_hot(labels, C) if labels.dim() == 1 else labels
    return torch.cat([code.to(D), x.flatten(1)[:, C:]], 1).view_as(x)


def goodness_of(h: Tensor) -> Tensor:
    return h.flatten(1).square().mean(1)


def goodness_outputs(outputs: list[list[Tensor]]) -> list[Tensor]:
    """Return the tensor with goodness of each block; none of a last block that is only the head."""
    last_features = [outputs[-1][-2]] if len(outputs[-1]) > 1 else []
    return [*(layer_outputs[-1] for layer_outputs in outputs[:-1]), *last_features]


def probe_features(outputs: list[list[Tensor]]) -> Tensor:
    """Return the input of the head."""
    if len(outputs[-1]) > 1:
        return outputs[-1][-2].detach()
    h = outputs[-2][-1].detach()
    return h / (h.square().mean(1, keepdim=True).sqrt() + 1e-8)


def probe_loss(update: Updated, outputs: list[list[Tensor]]) -> Tensor:
    """Return the loss of the head on detached features."""
    *_, head = update.blocks[max(update.blocks)].layers.values()
    return cross_entropy(head(probe_features(outputs)), update.y)


def loss(positives: Tensor, negatives: Tensor, theta: float = 1.0) -> Tensor:
    positive, negative = goodness_of(positives), goodness_of(negatives)
    return (softplus(theta - positive) + softplus(negative - theta)).mean()


def row_groups(update: Updated) -> tuple[Tensor, Tensor, Tensor]:
    """Return positives, negatives and neutral samples of an update."""
    x, y = update.x, update.y
    wrong = negatives.random_labels(update.micro_batch(), C)
    neutral = torch.full((ROWS, C), 1 / C, dtype=D)
    return with_labels(x, y), with_labels(x, wrong), with_labels(x, neutral)


def outputs_by_group(update: Updated) -> list[list[list[Tensor]]]:
    """Return the layer outputs of positives, negatives and neutral samples."""
    return [update.layer_outputs(samples) for samples in row_groups(update)]


# The gradient


def test_the_gradient_is_the_closed_form() -> None:
    """dW = sum_n (sigma(g - theta) - t) 2/d (h phi') x^T / n, layer by layer, without autograd."""
    update = ff_update(peer=0.0, partition__blocks=5)
    with torch.no_grad():
        positive_outputs, negative_outputs, _ = outputs_by_group(update)
        for k in range(4):
            name, total = f"fc{k + 1}", torch.zeros(())
            for outputs, is_positive in ((positive_outputs, 1.0), (negative_outputs, 0.0)):
                h = outputs[k][0]
                samples = row_groups(update)[0 if is_positive else 1]
                x = samples.flatten(1) if k == 0 else outputs[k - 1][0]
                x = x if k == 0 else x / (x.square().mean(1, keepdim=True).sqrt() + 1e-8)
                slope = torch.sigmoid(goodness_of(h) - 1.0) - is_positive
                cotangent = slope[:, None] * 2 / h.shape[1] * h * (h > 0)
                total = total + cotangent.T @ x / ROWS
            gradient = update.gradients[f"{name}.weight"]
            torch.testing.assert_close(gradient, total, rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
@pytest.mark.parametrize("square", ["mean", "sum"])
def test_blocks_learn_goodness_and_the_head_is_a_probe(blocks: int, square: str) -> None:
    """Autograd of one loss with nothing between blocks; features of the probe are detached."""
    update = ff_update(peer=0.0, goodness=square, theta=0.8, partition__blocks=blocks)
    positive_outputs, negative_outputs, neutral_outputs = outputs_by_group(update)
    total = probe_loss(update, neutral_outputs)
    pairs = map(goodness_outputs, (positive_outputs, negative_outputs))
    for pair in zip(*pairs, strict=True):
        width = pair[0].shape[1] if square == "sum" else 1
        margins = [width * (goodness_of(h) - 0.8) for h in pair]
        total = total + (softplus(-margins[0]) + softplus(margins[1])).mean()
    assert_same(update.gradients, autograd(update, total))


def test_the_next_block_does_not_get_the_length() -> None:
    """h / rms(h) is the same for c h."""
    h = 1e9 * torch.randn(5, 3, 4, dtype=D)
    normalised = goodness.rms_norm(h)
    for scale in (1e3, 7.3, 1e-3):
        torch.testing.assert_close(goodness.rms_norm(scale * h), normalised, rtol=1e-13, atol=0)
    torch.testing.assert_close(goodness_of(normalised), torch.ones(5, dtype=D))


def test_sums_of_squares_do_not_overflow_float16() -> None:
    objective = ForwardForward(goodness="sum")
    output = torch.full((2, 2048), 8.0, dtype=torch.float16)
    assert objective.compute_goodness(output).tolist() == [131072] * 2
    assert objective.threshold(torch.zeros(2, 3, 4, 4)) == 48
    assert goodness.rms_norm(torch.full((2, 64), 4e4, dtype=torch.float16)).eq(1).all()


def test_the_recorded_metrics() -> None:
    update = ff_update()
    positives, wrong, _ = outputs_by_group(update)
    sums = update.job.engine.metric_sums
    expected = loss(positives[0][-1], wrong[0][-1]).item()
    assert abs(sums.loss[0] / ROWS - expected) < 1e-12
    metrics = {name: total / ROWS for name, total in sums.metrics[2].items()}
    assert metrics.keys() == {"goodness_positive", "goodness_negative", "probe_loss"}
    assert abs(metrics["goodness_positive"] - goodness_of(positives[2][-2]).mean().item()) < 1e-12


# Labels and negatives


def test_labels_are_embedded_in_the_input_or_beside_it() -> None:
    code, flat = torch.tensor([[0.0, 1, 0]]), torch.arange(8.0).view(1, 2, 4) + 5
    image = torch.arange(12.0).view(1, 2, 2, 3) + 5
    in_input, beside = ForwardForward(), ForwardForward(label="beside")
    assert in_input.embed_label(flat, code).tolist() == [[[0, 1, 0, 8], [9, 10, 11, 12]]]
    assert in_input.embed_label(image, code)[0, 0].tolist() == [[0, 1, 0], [8, 9, 10]]
    assert beside.embed_label(flat, code).tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 0, 1, 0]]
    with_channel = beside.embed_label(image, code)
    assert torch.equal(with_channel[:, :2], image)
    assert with_channel[0, 2].tolist() == [[0, 1, 0], [0, 0, 0]]
    for objective, sample in ((in_input, flat), (in_input, image), (beside, flat), (beside, image)):
        shape = tuple(objective.embed_label(sample, code).shape[1:])
        assert objective.model_input_shape(tuple(sample.shape[1:]), 3) == shape


@pytest.mark.parametrize(("label", "shape"), [("input", (9,)), ("beside", (4, 3, 3))])
def test_labels_that_do_not_fit_are_refused(label: Any, shape: tuple[int, ...]) -> None:
    with refuses(ConfigError, "objective.label-too-large"):
        ForwardForward(label=label).model_input_shape(shape, 10)
    assert ForwardForward("beside").model_input_shape((9,), 10) == (19,)


def training_batch(y: Tensor, rows: int) -> MicroBatch:
    return MicroBatch(targets=y, row_random=RowRandom(1, 0, 0, rows, 0, rows))


def test_random_negatives_are_wrong_and_equally_likely() -> None:
    y = torch.arange(4).repeat(1000)
    labels = negatives.random_labels(training_batch(y, 4000), 4)
    assert (labels != y).all()
    frequencies = torch.bincount(labels[y == 1], minlength=4) / 1000
    assert frequencies[1] == 0
    assert (frequencies[[0, 2, 3]] - 1 / 3).abs().max() < 0.05


def test_hard_negatives_are_drawn_by_the_probe() -> None:
    """In proportion to its probabilities, without the true class; also where it is certain."""
    y = torch.tensor([1, 3]).repeat_interleave(4000)
    scores = torch.tensor([0.1, 0.6, 0.1, 0.2]).log().expand(8000, 4)
    labels = negatives.hard_labels(training_batch(y, 8000), scores)
    assert (labels != y).all()
    for label, expected in ((1, [1 / 4, 0, 1 / 4, 1 / 2]), (3, [1 / 8, 6 / 8, 1 / 8, 0])):
        frequencies = torch.bincount(labels[y == label], minlength=4) / 4000
        assert (frequencies - torch.tensor(expected)).abs().max() < 0.04
    certain = negatives.hard_labels(training_batch(y, 8000), 1e4 * one_hot(y, 4).double())
    assert (certain != y).all()
    assert len(certain[y == 3].unique()) == 3


def test_hard_negatives_come_from_the_current_probe() -> None:
    """Two passes: the scores on neutral samples choose the negatives; the probe learns on them."""
    update = ff_update(negatives="hard", peer=0.0, schedule__name="drained")
    neutral_outputs = update.layer_outputs(row_groups(update)[2])
    wrong = negatives.hard_labels(update.micro_batch(), neutral_outputs[-1][-1].detach())
    assert not torch.equal(wrong, negatives.random_labels(update.micro_batch(), C))
    samples = (with_labels(update.x, labels) for labels in (update.y, wrong))
    pairs = (goodness_outputs(update.layer_outputs(x)) for x in samples)
    total = sum(map(loss, *pairs)) + probe_loss(update, neutral_outputs)
    assert_same(update.gradients, autograd(update, total))


@pytest.mark.parametrize("shape", [(40,), (2, 16, 16)])
def test_hybrids_are_patches_of_two_samples(shape: tuple[int, ...]) -> None:
    x = torch.randn(6, *shape, dtype=D)
    mixed = negatives.mixed_samples(training_batch(torch.zeros(6, dtype=torch.int64), 6), x)
    mask, next_mask = mixed == x, mixed == x.roll(-1, 0)
    assert (mask ^ next_mask).all()
    assert 0.2 < mask.double().mean() < 0.8
    assert (mask[..., 1:] != mask[..., :-1]).double().mean() < 0.25  # 1/2 for random bits
    if len(shape) == 3:
        assert torch.equal(mask[:, 0], mask[:, 1])


def test_masks_are_smoothed_by_quarters() -> None:
    spike = torch.zeros(1, 5, dtype=D)
    spike[0, 2] = 1
    assert negatives.blur(spike, 1).tolist() == [[0, 0.25, 0.5, 0.25, 0]]


def test_hybrid_negatives_learn_without_labels() -> None:
    update = ff_update(negatives="hybrid", prediction="probe", peer=0.0)
    mixed = negatives.mixed_samples(update.micro_batch(), update.x)
    outputs = [update.layer_outputs(x) for x in (update.x, mixed)]
    total = sum(map(loss, *map(goodness_outputs, outputs))) + probe_loss(update, outputs[0])
    assert_same(update.gradients, autograd(update, total))
    objective, specs = update.job.engine.objective, update.job.engine.block_specs
    assert [objective.couples_samples(spec) for spec in specs] == [True, False, False]
    with refuses(ConfigError, "objective.hybrid-needs-probe"):
        ForwardForward(negatives="hybrid")


# Peer normalisation


@pytest.mark.parametrize("shape", [(6,), (4, 3, 2)])
def test_the_cotangent_of_peer_normalisation_is_that_of_the_published_code(
    shape: tuple[int, ...],
) -> None:
    """Autograd of mean_i (mean(r) - r_i)^2 for a constant running mean: a = r."""
    peers = PeerNormalisation(shape).to(D)
    output = torch.rand(5, *shape, dtype=D, requires_grad=True)
    units = output.view(5, shape[0], -1).mean(2).mean(0)
    peers.mean.copy_(units.detach())
    running = MOMENTUM * peers.mean + (1 - MOMENTUM) * units
    (running.mean() - running).square().mean().backward()
    torch.testing.assert_close(
        peers.cotangent(output.detach()), output.grad, rtol=1e-12, atol=1e-17
    )


def test_the_running_mean_is_that_of_the_published_code() -> None:
    """Over updates that are cut into micro-batches, and over segments."""
    peers, expected = PeerNormalisation((4,)).to(D), torch.full((4,), 0.5, dtype=D)
    for _ in range(2):
        for rows in ([3, 5], [8], [2, 2]):
            parts = [torch.rand(n, 4, dtype=D) for n in rows]
            for part in parts:
                peers.accumulate(part, sum(rows))
            peers.apply_decay()
            expected = MOMENTUM * expected + (1 - MOMENTUM) * torch.cat(parts).mean(0)
        peers.finish_segment()
        torch.testing.assert_close(peers.mean, expected, rtol=1e-13, atol=0)


def test_peer_normalisation_acts_on_positives_only() -> None:
    """The gradient of the penalty is added in every block that has goodness."""
    means = [torch.rand(width, dtype=D) for width in (13, 11, 6)]

    def before(job: RankJob) -> None:
        for block, mean in zip(job.engine.blocks.values(), means, strict=True):
            assert isinstance(block.head, PeerNormalisation)
            block.head.mean.copy_(mean)

    without_peers, with_peers = ff_update(peer=0.0), ff_update(peer=0.5, before=before)
    total = torch.zeros((), dtype=D)
    positives = with_peers.layer_outputs(with_labels(with_peers.x, with_peers.y))
    for h, r in zip(goodness_outputs(positives), means, strict=True):
        total = total + 0.5 * 2 * 0.1 / len(r) * ((r - r.mean()) * h.mean(0)).sum()
    penalty = autograd(with_peers, total)
    for name, tensor in with_peers.gradients.items():
        expected = without_peers.gradients[name] + penalty[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-10, atol=1e-16)
        assert name.startswith("head.") or not torch.equal(tensor, without_peers.gradients[name])


# Prediction


@pytest.mark.parametrize("first_counts", [False, True])
def test_classes_are_predicted_by_the_sum_of_goodness(first_counts: bool) -> None:
    update = ff_update(first=first_counts)
    objective, specs = update.job.engine.objective, update.job.engine.block_specs
    scores = predictions(update, update.x, update.y)
    votes = torch.zeros(ROWS, C, dtype=D)
    for c in range(C):
        outputs = update.layer_outputs(with_labels(update.x, torch.full((ROWS,), c)))
        for k in range(3):
            expected = goodness_of(goodness_outputs(outputs)[k])
            torch.testing.assert_close(scores[k][:, c], expected)
            votes[:, c] += expected if k or first_counts else 0
    vote = sum(objective.vote(spec, s) for spec, s in zip(specs, scores, strict=True))
    torch.testing.assert_close(vote, votes)
    assert objective.predicts_by_vote


def test_the_first_block_counts_if_no_other_has_goodness() -> None:
    """If the second block is `head` alone, it has no goodness."""
    scores = torch.ones(2, C)
    for cut, first_counts in ((4, True), (3, False)):
        update = ff_update(partition__blocks=None, partition__cuts=[cut])
        engine = update.job.engine
        assert bool(engine.objective.vote(engine.block_specs[0], scores).any()) == first_counts
        assert (predictions(update, update.x, update.y)[1] is None) == first_counts


def test_the_probe_predicts_on_neutral_samples() -> None:
    update = ff_update(prediction="probe")
    scores = predictions(update, update.x, update.y)
    torch.testing.assert_close(scores[2], update.layer_outputs(row_groups(update)[2])[-1][-1])
    assert scores[:2] == [None, None]
    assert not update.job.engine.objective.predicts_by_vote


# Defaults, warnings and errors


def test_defaults() -> None:
    objective = OBJECTIVES["forward-forward"]()
    assert objective == ForwardForward("input", 1.0, "mean", "classes", False, "random", 0.03)
    assert objective.default_schedule == "stream"
    assert ForwardForward(negatives="hard").default_schedule == "pipelined"
    spec = BlockSpec(0, 2, (4,), (5,), D, C)
    for kind, passes in (("random", 3), ("hard", 3), ("hybrid", 2)):
        objective = ForwardForward(prediction="probe", negatives=kind)
        assert objective.forward_passes(spec) == passes


def test_convolutions_are_warned_of() -> None:
    image = [BlockSpec(0, 2, (3, 8, 8), (4, 8, 8), D, 10), BlockSpec(1, 2, (4, 8, 8), (10,), D, 10)]
    flat = [BlockSpec(0, 2, (64,), (5,), D, 10), BlockSpec(1, 2, (5,), (10,), D, 10)]
    [warning] = ForwardForward().warnings(image, 8)
    assert numbers_in(warning) >= {"10", "192"}
    assert ForwardForward().warnings(flat, 8) == []
    assert ForwardForward(negatives="hybrid", prediction="probe").warnings(image, 8) == []


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ConfigError):
        tiny.run(objective={"name": "forward-forward", "label": "above"})
