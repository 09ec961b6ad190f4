"""Learning-rate schedules: the factor by which the learning rate of an update is scaled.

Invariant: a factor is pure in (update, updates per epoch, updates of the run). So a schedule has no
state to save, and a resumed run and all ranks compute the same number. The exception is `plateau`,
whose factor a callback multiplies.

::

    factor = warm-up x decay           1 |    ____            warm-up: (u + 1) / w for u < w = 4
                                         |   /    ``--.       decay: cosine from its end
    update u = 0, 1, ...,                |  /          ``-.
    counted from the start of the run    | /               ``--..
                                       0 +-----------------------> u
                                           w                total
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, dataclass_transform, final

from dtrain.errors import ConfigError
from dtrain.schema import Strategy


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
@dataclass(frozen=True)
class LRSchedule(Strategy, ABC):
    """A schedule of learning rates. Fields of a subclass are its keys in the run file.

    Attributes
    ----------
    depends_on_run_length : bool
        Whether factors depend on the length of the run, which then cannot be extended later.
    warmup_updates : int
        Updates of the linear warm-up (w): update u < w has (u + 1) / w of its learning rate, so
        update w - 1 is the first at the full one.
    """

    depends_on_run_length: ClassVar[bool]
    warmup_updates: int = 0

    def __post_init__(self) -> None:
        _require_at_least("warmup-updates", self.warmup_updates, 0)

    @final
    def lr_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return the factor by which each parameter group's base learning rate is multiplied.

        Parameters
        ----------
        update : int
            Counted from 0 at the start of the run.
        updates_per_epoch, total_updates : int
            Updates of an epoch, and of the run.
        """
        warmup = min(1.0, (update + 1) / self.warmup_updates) if self.warmup_updates else 1.0
        return warmup * self.decay_factor(update, updates_per_epoch, total_updates)

    @abstractmethod
    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return the factor without warm-up; arguments as of `lr_factor`."""

    def _decay_progress(self, update: int, total_updates: int) -> float:
        """Return the fraction of the updates after the warm-up that are done, 0 to 1."""
        decay_updates = max(total_updates - self.warmup_updates, 1)
        return min(max(update - self.warmup_updates, 0) / decay_updates, 1.0)


@final
@dataclass(frozen=True)
class ConstantLR(LRSchedule):
    """The optimizer's base learning rate, after the warm-up."""

    depends_on_run_length: ClassVar[bool] = False

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return 1."""
        return 1.0


@final
@dataclass(frozen=True)
class CosineLR(LRSchedule):
    """Half a cosine from 1, at the end of the warm-up, to `final` at the end of the run.

    Update `total_updates`, the first after the run, would have the factor `final`.

    Source: Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts",
    eq. 5, without restarts; torch's `CosineAnnealingLR`.

    Attributes
    ----------
    final : float
        Factor at the end of the run, from 0 to 1.
    """

    depends_on_run_length: ClassVar[bool] = True
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_fraction("final", self.final)

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return ``final + (1 - final) (1 + cos(pi t)) / 2`` with t the fraction that is done."""
        cosine = (1 + math.cos(math.pi * self._decay_progress(update, total_updates))) / 2
        return self.final + (1 - self.final) * cosine


@final
@dataclass(frozen=True)
class LinearLR(LRSchedule):
    """A straight line from 1, at the end of the warm-up, to `final` at the end of the run.

    Update `total_updates`, the first after the run, would have the factor `final`. torch's
    `LinearLR` with ``start_factor = 1``.

    Attributes
    ----------
    final : float
        Factor at the end of the run, from 0 to 1.
    """

    depends_on_run_length: ClassVar[bool] = True
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_fraction("final", self.final)

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return ``1 - (1 - final) t`` with t the fraction that is done."""
        return 1 - (1 - self.final) * self._decay_progress(update, total_updates)


@final
@dataclass(frozen=True)
class StepLR(LRSchedule):
    """Multiplication by `gamma` after every `every_epochs` epochs, or after the given `epochs`.

    Epochs are counted from the start of the run, the warm-up included. torch's `StepLR` and
    `MultiStepLR`, stepped once per epoch.

    Attributes
    ----------
    every_epochs : int
        Epochs between two steps; 0: `epochs` lists them.
    epochs : tuple of int
        Epochs after which the rate steps: ``[30, 60]`` is two steps, the first before the 31st
        epoch.
    gamma : float
        Factor of each step, 0 to 1.
    """

    depends_on_run_length: ClassVar[bool] = False
    every_epochs: int = 0
    epochs: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least("every-epochs", self.every_epochs, 0)
        for epoch in self.epochs:
            _require_at_least("epochs", epoch, 1)
        _require_fraction("gamma", self.gamma)
        if bool(self.every_epochs) == bool(self.epochs):
            state = "both are" if self.epochs else "neither is"
            raise ConfigError(
                "lr.step-epochs",
                f"[lr] 'step' has one of two keys ({state} set): set either every-epochs or "
                "epochs = [...]",
            )

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return `gamma` to the power of the number of steps so far."""
        epoch = update // updates_per_epoch
        steps = sum(epoch >= step_epoch for step_epoch in self.epochs)
        if self.every_epochs:
            steps = epoch // self.every_epochs
        return self.gamma**steps


@final
@dataclass(frozen=True)
class OneCycleLR(LRSchedule):
    """A rise to the base learning rate, then a fall far below it; torch's `OneCycleLR`.

    The base rate is torch's ``max_lr``. Momenta are not cycled.

    Source: Smith and Topin 2018, "Super-Convergence: Very Fast Training of Neural Networks Using
    Large Learning Rates".

    Attributes
    ----------
    pct_start : float
        Part of the run in which the rate rises.
    div_factor, final_div_factor : float
        The first rate is the base rate over `div_factor`; the last is the first over
        `final_div_factor`.
    anneal : "cos" or "linear"
        Shape of rise and fall.
    """

    depends_on_run_length: ClassVar[bool] = True
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    anneal: Literal["cos", "linear"] = "cos"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_fraction("pct-start", self.pct_start)
        for key, value in (
            ("div-factor", self.div_factor),
            ("final-div-factor", self.final_div_factor),
        ):
            if not value >= 1:
                raise ConfigError("lr.too-small", f"[lr] {key} = {value} must be at least 1")

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return the factor of torch's two phases."""
        peak, last = self.pct_start * total_updates - 1, total_updates - 1
        first, final = 1 / self.div_factor, 1 / self.div_factor / self.final_div_factor
        if update <= peak:
            return self._between(first, 1.0, update / peak if peak else 1.0)
        peak = max(peak, 0.0)
        return self._between(1.0, final, (update - peak) / (last - peak) if last > peak else 1.0)

    def _between(self, start: float, end: float, t: float) -> float:
        """Return the value at the fraction `t` of the way from `start` to `end`."""
        if self.anneal == "linear":
            return start + (end - start) * t
        return end + (start - end) / 2 * (1 + math.cos(math.pi * t))


@final
@dataclass(frozen=True)
class PlateauLR(LRSchedule):
    """The base learning rate, lowered when a metric stops improving; torch's `ReduceLROnPlateau`.

    The factor is no function of the update, so it is not computed here: a callback counts
    evaluations, and its state is in the checkpoint.

    Attributes
    ----------
    metric : str
        The metric that has to improve.
    factor : float
        Factor of each reduction.
    patience : int
        Evaluations in a row without an improvement that are accepted; one more lowers the rate.
    threshold : float
        A change that is not larger than this fraction of the best value is no improvement.
    cooldown : int
        Evaluations after a reduction that are not counted.
    min_factor : float
        The smallest factor.
    """

    depends_on_run_length: ClassVar[bool] = False
    metric: str = "loss"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("factor", "threshold", "min_factor"):
            _require_fraction(key.replace("_", "-"), getattr(self, key))
        _require_at_least("patience", self.patience, 0)
        _require_at_least("cooldown", self.cooldown, 0)

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return 1; the factor of the evaluations so far is multiplied to it."""
        return 1.0


LRFunction = Callable[[int, int, int], float]
"""Takes update, updates per epoch and updates of the run; returns the factor."""


@final
@dataclass(frozen=True)
class FunctionLR(LRSchedule):
    """The factors of a user's function (update, updates_per_epoch, total_updates) -> factor.

    It may use the length of the run, so that cannot be changed later.
    """

    depends_on_run_length: ClassVar[bool] = True

    function: LRFunction = field(init=False)

    @classmethod
    def of(cls, function: LRFunction, warmup_updates: int = 0) -> FunctionLR:
        """Return the schedule of a function."""
        schedule = cls(warmup_updates)
        object.__setattr__(schedule, "function", function)
        return schedule

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return the function's factor; refuse one that is no number, negative or infinite."""
        factor = self.function(update, updates_per_epoch, total_updates)
        if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise ConfigError(
                "lr.function-result",
                f"[lr]: the function returned {factor!r} for update {update}: return a factor of "
                "the learning rate, a number of at least 0",
            )
        return float(factor)


LR_SCHEDULES: dict[str, type[LRSchedule]] = {
    "constant": ConstantLR,
    "cosine": CosineLR,
    "linear": LinearLR,
    "step": StepLR,
    "one-cycle": OneCycleLR,
    "plateau": PlateauLR,
}


def _require_at_least(key: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError("lr.too-small", f"[lr] {key} = {value} must be at least {minimum}")


def _require_fraction(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError("lr.no-fraction", f"[lr] {key} = {value} must be between 0 and 1")
