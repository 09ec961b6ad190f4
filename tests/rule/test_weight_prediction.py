"""Weight prediction and spike compensation: the identities of the papers, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from dtrain.block.optimizer import NamedParameter, scale_lr_and_momentum
from dtrain.block.weight_prediction import predict_weights, spike_compensated_step
from dtrain.errors import ConfigError
from tests import tiny
from tests.refusals import refuses


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Compute in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def after_steps(
    optimizer_class: Callable[..., optim.Optimizer], steps: int = 5, **fields: Any
) -> tuple[list[nn.Parameter], optim.Optimizer, list[Tensor]]:
    """Return parameters after some steps, their optimizer, and their values one step before."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]
    optimizer = optimizer_class(parameters, **fields)
    previous: list[Tensor] = []
    for _ in range(steps):
        previous = values(parameters, copy=True)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer, previous


def values(parameters: list[nn.Parameter], copy: bool = False) -> list[Tensor]:
    return [p.detach().clone() if copy else p.detach() for p in parameters]


def set_gradients(parameters: list[nn.Parameter], value: float) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)


def assert_equal(tensors: list[Tensor], expected: list[Tensor]) -> None:
    """Assert that tensors are equal up to rounding."""
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["velocity", "difference", "coasting", "optimizer", "spectrain"])
def test_a_prediction_of_no_steps_is_a_copy(kind: Any) -> None:
    parameters, optimizer, previous = after_steps(optim.SGD, lr=0.1, momentum=0.9)
    predicted = predict_weights(kind, optimizer, parameters, 0.0, previous)
    assert_equal(predicted, values(parameters))
    for weights, parameter in zip(predicted, parameters, strict=True):
        assert weights.data_ptr() != parameter.data_ptr()


@pytest.mark.parametrize("kind", ["velocity", "difference", "coasting", "optimizer"])
def test_parameters_that_never_moved_are_predicted_to_stay(kind: Any) -> None:
    parameters, optimizer, _ = after_steps(optim.SGD, steps=0, lr=0.1, momentum=0.9)
    assert_equal(predict_weights(kind, optimizer, parameters, 6.0, None), values(parameters))


def test_velocity_and_difference_are_one_for_sgd() -> None:
    parameters, optimizer, previous = after_steps(optim.SGD, lr=0.1, momentum=0.9)
    by_velocity = predict_weights("velocity", optimizer, parameters, 6.0, previous)
    assert_equal(by_velocity, predict_weights("difference", optimizer, parameters, 6.0, previous))


def test_coasting_is_what_the_optimizer_does_without_a_gradient() -> None:
    """The velocity alone for six updates; "velocity" predicts 6.0 where it is 4.2."""
    parameters, optimizer, previous = after_steps(optim.SGD, lr=0.1, momentum=0.9)
    by_velocity = predict_weights("velocity", optimizer, parameters, 6.0, previous)
    coasting = predict_weights("coasting", optimizer, parameters, 6.0, previous)
    start = values(parameters, copy=True)
    for _ in range(6):
        set_gradients(parameters, 0.0)
        optimizer.step()
    assert_equal(coasting, values(parameters))
    for far, near, origin in zip(by_velocity, coasting, start, strict=True):
        ratio = ((far - origin) / (near - origin)).mean()
        assert float(ratio) == pytest.approx(6.0 / ((0.9 - 0.9**7) / 0.1))


def test_a_constant_velocity_is_predicted_exactly() -> None:
    """g = (1 - m) v keeps the velocity; T such updates end where all predictions are."""
    parameters, optimizer, _ = after_steps(optim.SGD, steps=1, lr=0.1, momentum=0.9)
    velocities = [optimizer.state[p]["momentum_buffer"].clone() for p in parameters]

    def step() -> None:
        for parameter, velocity in zip(parameters, velocities, strict=True):
            parameter.grad = 0.1 * velocity
        optimizer.step()

    previous = values(parameters, copy=True)
    step()
    predictions = [
        predict_weights(kind, optimizer, parameters, 5.0, previous)
        for kind in ("velocity", "difference")
    ]
    for _ in range(5):
        step()
    for predicted in predictions:
        assert_equal(predicted, values(parameters))


@pytest.mark.parametrize(
    ("optimizer_class", "fields"),
    [(optim.Adam, {}), (optim.Adam, {"amsgrad": True}), (optim.AdamW, {"weight_decay": 0.1})],
)
def test_the_step_of_adam_is_predicted(optimizer_class: Any, fields: dict[str, Any]) -> None:
    """With the bias corrections of its last step: one step ahead repeats that step."""
    parameters, optimizer, previous = after_steps(optimizer_class, lr=0.01, **fields)
    predicted = predict_weights("optimizer", optimizer, parameters, 1.0, None)
    decay = 0.01 * fields.get("weight_decay", 0.0)
    expected = []
    for weights, old in zip(values(parameters), previous, strict=True):
        step = weights - old * (1 - decay)
        expected.append(weights + step - decay * weights)
    assert_equal(predicted, expected)


@pytest.mark.parametrize("delay", [0, 1, 5, 20])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_a_spike_makes_up_for_the_delay(delay: int, momentum: float) -> None:
    """An impulse: one gradient of 1, D late; from then on the weights are those without delay."""
    late, timely = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    ours, theirs = (optim.SGD([weights], lr=0.1, momentum=momentum) for weights in (late, timely))
    for update in range(delay + 30):
        for weights, arrival in ((late, delay), (timely, 0)):
            weights.grad = torch.full((1,), float(update == arrival))
        spike_compensated_step(ours, delay)
        theirs.step()
        if update >= delay:
            torch.testing.assert_close(late.data, timely.data, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_one_update_late_is_nesterov(decay: float) -> None:
    """The form of torch: w - lr (m v + g)."""
    fields: dict[str, Any] = {"steps": 0, "lr": 0.1, "momentum": 0.9, "weight_decay": decay}
    compensated, ours, _ = after_steps(optim.SGD, **fields)
    nesterov, theirs, _ = after_steps(optim.SGD, **fields, nesterov=True)
    for step in range(6):
        set_gradients([*compensated, *nesterov], 0.3 * step - 1)
        spike_compensated_step(ours, 1)
        theirs.step()
        assert_equal(values(compensated), values(nesterov))


def test_without_momentum_a_spike_is_delayed_sgd() -> None:
    compensated, ours, _ = after_steps(optim.SGD, steps=0, lr=0.1)
    plain, theirs, _ = after_steps(optim.SGD, steps=0, lr=0.1)
    set_gradients([*compensated, *plain], 1.0)
    spike_compensated_step(ours, 7)
    theirs.step()
    assert_equal(values(compensated), values(plain))


def test_the_state_stays_that_of_the_optimizer() -> None:
    compensated, ours, _ = after_steps(optim.SGD, steps=0, lr=0.1, momentum=0.9)
    plain, theirs, _ = after_steps(optim.SGD, steps=0, lr=0.1, momentum=0.9)
    for step in range(4):
        set_gradients([*compensated, *plain], step - 1.5)
        spike_compensated_step(ours, 3)
        theirs.step()
    for parameter, other in zip(compensated, plain, strict=True):
        velocity = ours.state[parameter]["momentum_buffer"]
        assert torch.equal(velocity, theirs.state[other]["momentum_buffer"])


# ---- another batch size


def test_scaling_keeps_the_effect_of_a_sample() -> None:
    """m^(1/N) and lr / (N (1 - m)) do not change; the reference batch size changes nothing."""
    lr, momentum = scale_lr_and_momentum(0.1, 0.9, batch_size=1, reference_batch_size=128)
    assert (momentum, lr) == (
        pytest.approx(0.99917721, abs=5e-9),
        pytest.approx(6.428e-6, rel=1e-4),
    )
    assert momentum == pytest.approx(0.9 ** (1 / 128), rel=1e-14)
    assert lr / (1 * (1 - momentum)) == pytest.approx(0.1 / (128 * (1 - 0.9)), rel=1e-12)
    unchanged = scale_lr_and_momentum(0.1, 0.9, batch_size=128, reference_batch_size=128)
    assert unchanged == (pytest.approx(0.1), pytest.approx(0.9))
    small = scale_lr_and_momentum(0.1, 0.9, batch_size=7, reference_batch_size=128)
    back = scale_lr_and_momentum(*small, batch_size=128, reference_batch_size=7)
    assert back == (pytest.approx(0.1, rel=1e-12), pytest.approx(0.9, rel=1e-14))


def test_small_batches_end_where_large_ones_do() -> None:
    """A quadratic: the same samples in batches of 64, and one by one with scaled numbers."""
    samples = torch.randn(3200, generator=torch.Generator().manual_seed(0)) + 3

    def final_weight(batch_size: int) -> float:
        lr, momentum = scale_lr_and_momentum(0.02, 0.9, batch_size, 64)
        weight = nn.Parameter(torch.zeros(1))
        optimizer = optim.SGD([weight], lr=lr, momentum=momentum)
        for batch in samples.split(batch_size):
            optimizer.zero_grad()
            (0.5 * (weight - batch).square().mean()).backward()
            optimizer.step()
        return float(weight.detach())

    large = final_weight(64)
    assert final_weight(1) == pytest.approx(large, rel=0.02)
    assert 1 < large < 3, "it has not converged yet"


def test_a_run_file_scales() -> None:
    table = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "scale-from": 128}
    run = tiny.run(optimizer=table, batch_size=1)
    parameter = NamedParameter("bias", nn.Parameter(torch.zeros(1)), "Linear")
    optimizer = run.optimizer_settings()([parameter])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == scale_lr_and_momentum(0.1, 0.9, 1, 128)
    assert run.to_table()["optimizer"] == table, "the resolved run holds the numbers as given"


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"name": "adam", "lr": 0.1, "scale-from": 128}, "optimizer.scale-from-needs-momentum"),
        ({"name": "sgd", "lr": 0.1, "scale-from": 128}, "optimizer.scale-from-needs-momentum"),
        (
            {"name": "sgd", "lr": 0.1, "momentum": 0.9, "scale-from": -1},
            "optimizer.scale-from-negative",
        ),
    ],
)
def test_what_cannot_be_scaled_is_refused(table: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        tiny.run(optimizer=table)
