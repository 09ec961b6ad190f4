"""Learning-rate schedules against torch's own, and which changes a resumed run refuses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler as torch_lr

from dtrain.block.lr_schedule import (
    LR_SCHEDULES,
    ConstantLR,
    CosineLR,
    FunctionLR,
    LinearLR,
    LRSchedule,
    OneCycleLR,
    PlateauLR,
    StepLR,
)
from dtrain.callbacks import Event, RateOnPlateau
from dtrain.checkpoint.same_run import check_same_run
from dtrain.errors import ConfigError
from tests import tiny
from tests.refusals import refuses

PER_EPOCH, TOTAL = 4, 26
EXAMPLES: dict[str, LRSchedule] = {
    "constant": ConstantLR(),
    "cosine": CosineLR(final=0.1),
    "linear": LinearLR(final=0.2),
    "step": StepLR(every_epochs=2),
    "one-cycle": OneCycleLR(pct_start=0.4),
    "plateau": PlateauLR(),
}
FALLING = [name for name in LR_SCHEDULES if name != "one-cycle"]
"""The schedules that begin at 1; `one-cycle` rises to it."""
MakeScheduler = Callable[[optim.Optimizer], Any]


def torch_rates(make: MakeScheduler, updates: int = TOTAL, stride: int = 1) -> list[float]:
    """Return the learning rates of an optimizer of rate 1 under a scheduler of torch."""
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR passes a deprecated argument itself
        for update in range(updates):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if (update + 1) % stride == 0:
                scheduler.step()
    return rates


def factors(schedule: LRSchedule, total: int = TOTAL) -> list[float]:
    """Return the factors of a whole run."""
    return [schedule.lr_factor(update, PER_EPOCH, total) for update in range(total)]


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_torchs(final: float) -> None:
    expected = torch_rates(lambda o: torch_lr.CosineAnnealingLR(o, TOTAL, final))
    assert factors(CosineLR(final=final)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_linear_is_torchs(final: float) -> None:
    expected = torch_rates(lambda o: torch_lr.LinearLR(o, 1.0, final, TOTAL))
    assert factors(LinearLR(final=final)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("every", "gamma"), [(1, 0.1), (2, 0.5), (9, 0.1)])
def test_step_is_torchs_stepped_by_epoch(every: int, gamma: float) -> None:
    expected = torch_rates(lambda o: torch_lr.StepLR(o, every, gamma), stride=PER_EPOCH)
    assert factors(StepLR(every_epochs=every, gamma=gamma)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epochs", [(1,), (2, 5), (3, 3)])
def test_named_epochs_are_torchs_milestones(epochs: tuple[int, ...]) -> None:
    expected = torch_rates(lambda o: torch_lr.MultiStepLR(o, list(epochs), 0.1), stride=PER_EPOCH)
    assert factors(StepLR(epochs=epochs)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize(("pct", "div", "final"), [(0.3, 25.0, 1e4), (0.5, 4.0, 10.0)])
def test_one_cycle_is_torchs(anneal: Any, pct: float, div: float, final: float) -> None:
    expected = torch_rates(
        lambda o: torch_lr.OneCycleLR(
            *(o, 1.0, TOTAL),
            pct_start=pct,
            anneal_strategy=anneal,
            cycle_momentum=False,
            div_factor=div,
            final_div_factor=final,
        )
    )
    ours = factors(OneCycleLR(pct_start=pct, div_factor=div, final_div_factor=final, anneal=anneal))
    assert ours == pytest.approx(expected, rel=1e-12)
    assert all(0 < factor <= 1 for length in (1, 2, 3) for factor in factors(OneCycleLR(), length))


class Readings:
    """A session that reads one value after another."""

    def __init__(self, values: Sequence[float | None], higher: bool) -> None:
        self.values, self.higher = iter(values), higher
        self.scale = 1.0

    def metric(self, name: str) -> float | None:
        return next(self.values)

    def higher_is_better(self, name: str) -> bool:
        return self.higher

    def set_lr_scale(self, scale: float) -> None:
        self.scale = scale

    def stop(self, reason: str) -> None:
        raise AssertionError

    def save_best(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("keys", [{}, {"threshold": 0.1, "cooldown": 2}, {"min_factor": 0.1}])
def test_a_plateau_is_torchs(higher: bool, keys: dict[str, Any]) -> None:
    """On random readings, NaN included, and restored from its state at every one."""
    random = np.random.default_rng(0)
    values = [None if v < 0.05 else float(v) for v in random.random(60)]
    schedule = PlateauLR(factor=0.7, patience=2, **keys)
    session = Readings(values, higher)
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch_lr.ReduceLROnPlateau(
        optimizer,
        "max" if higher else "min",
        factor=0.7,
        patience=2,
        threshold=schedule.threshold,
        cooldown=schedule.cooldown,
        min_lr=schedule.min_factor,
        eps=0,
    )
    state, ours, expected = None, [], []
    for value in values:
        callback = RateOnPlateau(schedule)
        if state is not None:
            callback.restore(state)
        callback(session, Event("evaluation", None, 0))
        callback(session, Event("evaluation", None, 0, scheduled=False))
        state = callback.state()
        scheduler.step(math.nan if value is None else value)
        ours.append(session.scale)
        expected.append(optimizer.param_groups[0]["lr"])
    assert ours == pytest.approx(expected, rel=1e-12)
    assert len(set(ours)) > 3


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf, "1", None])
def test_a_function_returns_a_factor(factor: Any) -> None:
    with refuses(ConfigError, "lr.function-result"):
        FunctionLR.of(lambda *_: factor).lr_factor(0, PER_EPOCH, TOTAL)


@pytest.mark.parametrize("warmup", [2, 5])
def test_the_warmup_is_torchs_and_the_cosine_begins_at_its_end(warmup: int) -> None:
    def make(optimizer: optim.Optimizer) -> Any:
        linear = torch_lr.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
        cosine = torch_lr.CosineAnnealingLR(optimizer, TOTAL - warmup, 0.1)
        return torch_lr.SequentialLR(optimizer, [linear, cosine], [warmup])

    ours = factors(CosineLR(warmup_updates=warmup, final=0.1))
    assert ours == pytest.approx(torch_rates(make), rel=1e-12)
    assert ours[:warmup] == [(update + 1) / warmup for update in range(warmup)]


@pytest.mark.parametrize("name", FALLING)
def test_the_warmup_multiplies_and_steps_stay_at_their_epochs(name: str) -> None:
    fields = {"every_epochs": 1} if name == "step" else {}
    warm, plain = LR_SCHEDULES[name](warmup_updates=6, **fields), LR_SCHEDULES[name](**fields)
    for update in range(6):
        decay = plain.lr_factor(update, PER_EPOCH, TOTAL) if name == "step" else 1
        factor = warm.lr_factor(update, PER_EPOCH, TOTAL)
        assert factor == pytest.approx((update + 1) / 6 * decay)
    assert warm.lr_factor(6, PER_EPOCH, TOTAL) == (0.1 if name == "step" else 1)


@pytest.mark.parametrize(("name", "warmup"), list(product(FALLING, (0, 3, 40))))
def test_factors_are_fractions_and_fall_after_the_warmup(name: str, warmup: int) -> None:
    """A warm-up longer than the run included."""
    fields = {"epochs": (2, 4)} if name == "step" else {}
    ours = factors(LR_SCHEDULES[name](warmup_updates=warmup, **fields))
    assert all(0 < factor <= 1 for factor in ours)
    assert all(later <= earlier for earlier, later in pairwise(ours[warmup:]))


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_a_schedule_states_whether_the_length_matters(name: str) -> None:
    schedule = EXAMPLES[name]
    differs = factors(schedule) != factors(schedule, TOTAL + 8)[:TOTAL]
    assert schedule.depends_on_run_length == differs


def test_the_final_factor_is_that_of_the_first_update_after_the_run() -> None:
    for schedule in (CosineLR(final=0.1), LinearLR(final=0.1)):
        assert schedule.lr_factor(TOTAL, PER_EPOCH, TOTAL) == pytest.approx(0.1)
        assert schedule.lr_factor(TOTAL - 1, PER_EPOCH, TOTAL) > 0.1


@pytest.mark.parametrize(
    ("kind", "fields", "key"),
    [
        (CosineLR, {"final": -0.1}, "lr.no-fraction"),
        (LinearLR, {"final": 1.1}, "lr.no-fraction"),
        (StepLR, {"every_epochs": 1, "gamma": 2.0}, "lr.no-fraction"),
        (ConstantLR, {"warmup_updates": -1}, "lr.too-small"),
        (StepLR, {"epochs": (0,)}, "lr.too-small"),
        (StepLR, {}, "lr.step-epochs"),
        (OneCycleLR, {"pct_start": 1.5}, "lr.no-fraction"),
        (OneCycleLR, {"div_factor": 0.5}, "lr.too-small"),
        (PlateauLR, {"factor": 1.5}, "lr.no-fraction"),
        (PlateauLR, {"patience": -1}, "lr.too-small"),
        (StepLR, {"every_epochs": 1, "epochs": (1,)}, "lr.step-epochs"),
    ],
)
def test_wrong_numbers_are_refused(kind: Any, fields: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        kind(**fields)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"epochs": 2}, {"epochs": 3}),
        ({"epochs": 3}, {"epochs": 2}),
        ({"epochs": 2}, {"epochs": None, "updates": 40}),
    ],
)
def test_another_length_is_refused_where_rates_followed_the_old_one(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    table = tiny.run(**before, lr__name="cosine").to_table()
    with refuses(ConfigError, "resume.length-changed"):
        check_same_run(tmp_path, table, tiny.run(**after, lr__name="cosine"))
    check_same_run(tmp_path, table, tiny.run(**after, lr__name="cosine"), fully_trained=True)
    check_same_run(tmp_path, tiny.run(**before).to_table(), tiny.run(**after))
    steps: dict[str, Any] = {"lr": {"name": "step", "every-epochs": 1}}
    check_same_run(tmp_path, tiny.run(**before, **steps).to_table(), tiny.run(**after, **steps))


def test_the_same_length_and_other_meshes_go_on_under_any_rate(tmp_path: Path) -> None:
    table = tiny.run(lr__name="linear", mesh__stages=2).to_table()
    check_same_run(tmp_path, table, tiny.run(lr__name="linear"))


def test_another_rate_is_refused_by_key(tmp_path: Path) -> None:
    table = tiny.run(lr__name="cosine").to_table()
    with refuses(ConfigError, "resume.settings-changed"):
        check_same_run(tmp_path, table, tiny.run(lr={"name": "cosine", "final": 0.1}))
