"""Weights foretold and late gradients compensated: the identities of the papers, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from dtrain.block.optimizer import scale_lr_and_momentum
from dtrain.block.weight_prediction import predict_weights, spike_compensated_step
from dtrain.errors import DtrainError
from dtrain.planning.block_factory import optimizer_factory
from tests import tiny


@pytest.fixture(autouse=True)
def doubled() -> Any:
    """Compute in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def moving(
    kind: Callable[..., optim.Optimizer], steps: int = 5, **fields: Any
) -> tuple[list[nn.Parameter], optim.Optimizer, list[Tensor]]:
    """Return parameters that took some steps, their optimizer, and what they were before the
    last one."""
    generator = torch.Generator().manual_seed(0)
    own = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]
    optimizer = kind(own, **fields)
    before: list[Tensor] = []
    for _ in range(steps):
        before = [each.detach().clone() for each in own]
        for each in own:
            each.grad = torch.randn(each.shape, generator=generator)
        optimizer.step()
    return own, optimizer, before


def equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Assert that tensors are equal to rounding."""
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["velocity", "difference", "coasting", "optimizer", "spectrain"])
def test_no_step_ahead_is_where_it_is(kind: Any) -> None:
    own, optimizer, before = moving(optim.SGD, lr=0.1, momentum=0.9)
    found = predict_weights(kind, optimizer, 0.0, before)
    equal(found, [each.detach() for each in own])
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(found, own, strict=True))


@pytest.mark.parametrize("kind", ["velocity", "difference", "coasting", "optimizer"])
def test_what_has_not_moved_is_foretold_to_stay(kind: Any) -> None:
    own, optimizer, _ = moving(optim.SGD, steps=0, lr=0.1, momentum=0.9)
    equal(predict_weights(kind, optimizer, 6.0, None), [each.detach() for each in own])


def test_velocity_and_difference_are_one_for_sgd() -> None:
    _, optimizer, before = moving(optim.SGD, lr=0.1, momentum=0.9)
    one, two = (
        predict_weights(kind, optimizer, 6.0, before) for kind in ("velocity", "difference")
    )
    equal(one, two)


def test_coasting_is_what_the_optimizer_does_without_a_gradient() -> None:
    """The velocity alone for six updates; plain prediction overshoots it, 6.0 against 4.2."""
    own, optimizer, before = moving(optim.SGD, lr=0.1, momentum=0.9)
    far, near = (predict_weights(kind, optimizer, 6.0, before) for kind in ("velocity", "coasting"))
    start = [each.detach().clone() for each in own]
    for _ in range(6):
        for each in own:
            each.grad = torch.zeros_like(each)
        optimizer.step()
    equal(near, [each.detach() for each in own])
    for a, b, c in zip(far, near, start, strict=True):
        share = ((a - c) / (b - c)).mean()
        assert float(share) == pytest.approx(6.0 / ((0.9 - 0.9**7) / 0.1))


def test_a_constant_velocity_is_foretold_exactly() -> None:
    """g = (1 - m) v keeps the velocity; then T updates end where all forms say."""
    own, optimizer, _ = moving(optim.SGD, steps=1, lr=0.1, momentum=0.9)
    kept = [optimizer.state[each]["momentum_buffer"].clone() for each in own]

    def go() -> None:
        for each, velocity in zip(own, kept, strict=True):
            each.grad = 0.1 * velocity
        optimizer.step()

    before = [each.detach().clone() for each in own]
    go()
    found = [predict_weights(kind, optimizer, 5.0, before) for kind in ("velocity", "difference")]
    for _ in range(5):
        go()
    for each in found:
        equal(each, [p.detach() for p in own])


@pytest.mark.parametrize(
    ("kind", "fields"),
    [(optim.Adam, {}), (optim.Adam, {"amsgrad": True}), (optim.AdamW, {"weight_decay": 0.1})],
)
def test_the_step_of_adam_is_foretold(kind: Any, fields: dict[str, Any]) -> None:
    """With the bias corrections of its last step: one step ahead repeats that step."""
    own, optimizer, before = moving(kind, lr=0.01, **fields)
    found = predict_weights("optimizer", optimizer, 1.0, None)
    wanted = []
    for each, old in zip(own, before, strict=True):
        step = each.detach() - old * (1 - 0.01 * fields.get("weight_decay", 0.0))
        now = each.detach()
        wanted.append(now + step - 0.01 * fields.get("weight_decay", 0.0) * now)
    equal(found, wanted)


@pytest.mark.parametrize("delay", [0, 1, 5, 20])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_a_spike_makes_up_for_what_was_missed(delay: int, momentum: float) -> None:
    """The impulse: a gradient of 1, D late, then none; from then on as if it had come in time."""
    late, timely = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    ours, theirs = (optim.SGD([each], lr=0.1, momentum=momentum) for each in (late, timely))
    for update in range(delay + 30):
        for each, arrives in ((late, delay), (timely, 0)):
            each.grad = torch.full((1,), float(update == arrives))
        spike_compensated_step(ours, delay)
        theirs.step()
        if update >= delay:
            torch.testing.assert_close(late.data, timely.data, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_one_update_late_is_nesterov(decay: float) -> None:
    """The form of torch: w - lr (m v + g)."""
    one, ours, _ = moving(optim.SGD, steps=0, lr=0.1, momentum=0.9, weight_decay=decay)
    fields = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": decay}
    two, theirs, _ = moving(optim.SGD, steps=0, **fields)
    for step in range(6):
        for each in (*one, *two):
            each.grad = torch.full_like(each, 0.3 * step - 1)
        spike_compensated_step(ours, 1)
        theirs.step()
        equal([each.detach() for each in one], [each.detach() for each in two])


def test_without_momentum_a_spike_is_delayed_sgd() -> None:
    one, ours, _ = moving(optim.SGD, steps=0, lr=0.1)
    two, theirs, _ = moving(optim.SGD, steps=0, lr=0.1)
    for each in (*one, *two):
        each.grad = torch.ones_like(each)
    spike_compensated_step(ours, 7)
    theirs.step()
    equal([each.detach() for each in one], [each.detach() for each in two])


def test_the_state_stays_that_of_the_optimizer() -> None:
    one, ours, _ = moving(optim.SGD, steps=0, lr=0.1, momentum=0.9)
    two, theirs, _ = moving(optim.SGD, steps=0, lr=0.1, momentum=0.9)
    for step in range(4):
        for each in (*one, *two):
            each.grad = torch.full_like(each, step - 1.5)
        spike_compensated_step(ours, 3)
        theirs.step()
    for mine, its in zip(one, two, strict=True):
        assert torch.equal(
            ours.state[mine]["momentum_buffer"], theirs.state[its]["momentum_buffer"]
        )


# ---- another batch


def test_scaling_keeps_what_a_sample_does() -> None:
    """m^(1/N) and lr / (N (1 - m)) do not change; the batch that was given changes nothing."""
    lr, momentum = scale_lr_and_momentum(0.1, 0.9, batch_size=1, reference_batch_size=128)
    assert (momentum, lr) == (
        pytest.approx(0.99917721, abs=5e-9),
        pytest.approx(6.428e-6, rel=1e-4),
    )
    assert momentum == pytest.approx(0.9 ** (1 / 128), rel=1e-14)
    assert lr / (1 * (1 - momentum)) == pytest.approx(0.1 / (128 * (1 - 0.9)), rel=1e-12)
    assert scale_lr_and_momentum(0.1, 0.9, batch_size=128, reference_batch_size=128) == (
        pytest.approx(0.1),
        pytest.approx(0.9),
    )
    there = scale_lr_and_momentum(
        *scale_lr_and_momentum(0.1, 0.9, batch_size=7, reference_batch_size=128),
        batch_size=128,
        reference_batch_size=7,
    )
    assert there == (pytest.approx(0.1, rel=1e-12), pytest.approx(0.9, rel=1e-14))


def test_small_batches_end_where_large_ones_do() -> None:
    """A quadratic: the same samples in batches of 64, and one by one with scaled numbers."""
    samples = torch.randn(6400, generator=torch.Generator().manual_seed(0)) + 3

    def ends(batch: int) -> float:
        lr, momentum = scale_lr_and_momentum(0.01, 0.9, batch_size=batch, reference_batch_size=64)
        weight = nn.Parameter(torch.zeros(1))
        optimizer = optim.SGD([weight], lr=lr, momentum=momentum)
        for part in samples.split(batch):
            optimizer.zero_grad()
            (0.5 * (weight - part).square().mean()).backward()
            optimizer.step()
        return float(weight.detach())

    assert ends(1) == pytest.approx(ends(64), rel=0.02)
    assert 1 < ends(64) < 3, "it is on its way"


def test_a_run_file_scales() -> None:
    told = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "scale-from": 128}
    run = tiny.run(optimizer=told, batch_size=1)
    optimizer = optimizer_factory(run)([nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == scale_lr_and_momentum(0.1, 0.9, 1, 128)
    assert run.to_table()["optimizer"] == told, "the resolved run tells what was asked"


@pytest.mark.parametrize(
    "told",
    [
        {"name": "adam", "lr": 0.1, "scale-from": 128},
        {"name": "sgd", "lr": 0.1, "scale-from": 128},
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "scale-from": -1},
    ],
)
def test_what_cannot_be_scaled_is_refused(told: dict[str, Any]) -> None:
    with pytest.raises(DtrainError, match=r"\[optimizer\] scale-from"):
        tiny.run(optimizer=told)
