"""Learning-rate schedules against torch's own, and what may not change when a run goes on."""

from __future__ import annotations

import warnings
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler as torch_lr

from dtrain.block.lr_schedule import (
    LR_SCHEDULES,
    ConstantLR,
    CosineLR,
    LinearLR,
    LRSchedule,
    StepLR,
)
from dtrain.checkpoint.resume import check_same_run
from dtrain.errors import DtrainError
from tests import tiny

PER_EPOCH, TOTAL = 4, 26
EXAMPLES: dict[str, LRSchedule] = {
    "constant": ConstantLR(),
    "cosine": CosineLR(final=0.1),
    "linear": LinearLR(final=0.2),
    "step": StepLR(every_epochs=2),
}


def theirs(make: Any, updates: int = TOTAL, stride: int = 1) -> list[float]:
    """Return the rates that a scheduler of torch sets for an optimizer of rate 1."""
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR passes a deprecated argument itself
        for update in range(updates):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if (update + 1) % stride == 0:
                scheduler.step()
    return found


def ours(rate: LRSchedule, total: int = TOTAL) -> list[float]:
    """Return the factors of a whole run."""
    return [rate.lr_factor(update, PER_EPOCH, total) for update in range(total)]


def ramped(optimizer: optim.Optimizer, warmup: int, after: Any) -> Any:
    """Return torch's linear ramp, followed by another of its schedulers."""
    ramp = torch_lr.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
    return torch_lr.SequentialLR(optimizer, [ramp, after], [warmup])


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_torchs(final: float) -> None:
    wanted = theirs(lambda o: torch_lr.CosineAnnealingLR(o, TOTAL, final))
    assert ours(CosineLR(final=final)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_linear_is_torchs(final: float) -> None:
    wanted = theirs(lambda o: torch_lr.LinearLR(o, 1.0, final, TOTAL))
    assert ours(LinearLR(final=final)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("every", "gamma"), [(1, 0.1), (2, 0.5), (9, 0.1)])
def test_step_is_torchs_stepped_by_epoch(every: int, gamma: float) -> None:
    wanted = theirs(lambda o: torch_lr.StepLR(o, every, gamma), stride=PER_EPOCH)
    assert ours(StepLR(every_epochs=every, gamma=gamma)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("epochs", [(1,), (2, 5), (3, 3)])
def test_named_epochs_are_torchs_milestones(epochs: tuple[int, ...]) -> None:
    wanted = theirs(lambda o: torch_lr.MultiStepLR(o, list(epochs), 0.1), stride=PER_EPOCH)
    assert ours(StepLR(epochs=epochs)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("warmup", [2, 5])
def test_the_ramp_is_torchs_and_the_cosine_begins_at_its_end(warmup: int) -> None:
    def make(optimizer: optim.Optimizer) -> Any:
        after = torch_lr.CosineAnnealingLR(optimizer, TOTAL - warmup, 0.1)
        return ramped(optimizer, warmup, after)

    found = ours(CosineLR(warmup_updates=warmup, final=0.1))
    assert found == pytest.approx(theirs(make), rel=1e-12)
    assert found[:warmup] == [(update + 1) / warmup for update in range(warmup)]


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_the_ramp_multiplies_and_stairs_stay_where_they_are(name: str) -> None:
    fields = {"every_epochs": 1} if name == "step" else {}
    rate, plain = LR_SCHEDULES[name](warmup_updates=6, **fields), LR_SCHEDULES[name](**fields)
    for update in range(6):
        assert rate.lr_factor(update, PER_EPOCH, TOTAL) == pytest.approx(
            (update + 1) / 6 * (plain.lr_factor(update, PER_EPOCH, TOTAL) if name == "step" else 1)
        )
    assert rate.lr_factor(6, PER_EPOCH, TOTAL) == (0.1 if name == "step" else 1)


@pytest.mark.parametrize(("name", "warmup"), list(product(LR_SCHEDULES, (0, 3, 40))))
def test_factors_are_shares_and_fall_after_the_ramp(name: str, warmup: int) -> None:
    """A ramp longer than the run included."""
    fields = {"epochs": (2, 4)} if name == "step" else {}
    found = ours(LR_SCHEDULES[name](warmup_updates=warmup, **fields))
    assert all(0 < each <= 1 for each in found)
    assert all(b <= a for a, b in pairwise(found[warmup:]))


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_the_horizon_says_whether_the_length_matters(name: str) -> None:
    rate = EXAMPLES[name]
    assert rate.depends_on_run_length == (ours(rate) != ours(rate, TOTAL + 8)[:TOTAL])


def test_the_horizon_is_one_update_past_the_last() -> None:
    for rate in (CosineLR(final=0.1), LinearLR(final=0.1)):
        assert rate.lr_factor(TOTAL, PER_EPOCH, TOTAL) == pytest.approx(0.1)
        assert rate.lr_factor(TOTAL - 1, PER_EPOCH, TOTAL) > 0.1


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"epochs": 2}, {"epochs": 3}, ["epochs (was 2, is 3)", "'cosine'"]),
        ({"epochs": 3}, {"epochs": 2}, ["epochs (was 3, is 2)"]),
        ({"epochs": 2}, {"epochs": None, "updates": 40}, ["epochs (was 2, is absent)", "is 40"]),
    ],
)
def test_another_length_is_refused_where_rates_followed_the_old_one(
    before: dict[str, Any], now: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    was = tiny.run(**before, lr__name="cosine").to_table()
    with pytest.raises(DtrainError) as refusal:
        check_same_run(tmp_path, was, tiny.run(**now, lr__name="cosine"))
    for word in words:
        assert word in refusal.value.message
    check_same_run(tmp_path, was, tiny.run(**now, lr__name="cosine"), fully_trained=True)
    check_same_run(tmp_path, tiny.run(**before).to_table(), tiny.run(**now))
    stairs: dict[str, Any] = {"lr": {"name": "step", "every-epochs": 1}}
    check_same_run(tmp_path, tiny.run(**before, **stairs).to_table(), tiny.run(**now, **stairs))


def test_the_same_length_and_other_meshes_go_on_under_any_rate(tmp_path: Path) -> None:
    was = tiny.run(lr__name="linear", mesh__stages=2)
    check_same_run(tmp_path, was.to_table(), tiny.run(lr__name="linear"))


def test_another_rate_is_refused_by_key(tmp_path: Path) -> None:
    was = tiny.run(lr__name="cosine").to_table()
    with pytest.raises(DtrainError, match=r"lr\.final \(was 0\.0, is 0\.1\)"):
        check_same_run(tmp_path, was, tiny.run(lr={"name": "cosine", "final": 0.1}))
