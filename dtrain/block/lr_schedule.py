"""Learning-rate schedules: by what factor an update's rate differs from the optimizer's own.

Invariant: a factor is pure in (update, updates per epoch, updates of the run), so it has no state
to save and no order to be asked in; a resumed run and any rank finds the same number.

::

    factor = ramp x shape              1 |    ____            ramp: (u + 1) / w for u < w = 4
                                         |   /    ``--.       shape: cosine from the ramp's end
    update u = 0, 1, ...,                |  /          ``-.
    counted from the start of the run    | /               ``--..
                                       0 +-----------------------> u
                                           w                total
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.errors import ConfigError


@dataclass(frozen=True)
class LRSchedule(ABC):
    """A schedule of learning rates. Fields of a subclass are its keys in the run file.

    Attributes
    ----------
    horizon : bool
        Whether factors depend on the length of the run: then a run cannot be made longer later.
    warmup_updates : int
        Updates of the linear ramp: update u < w has (u + 1) / w of its rate, so the first one
        moves and update w - 1 is the first at the full rate.
    """

    depends_on_run_length: ClassVar[bool]
    warmup_updates: int = 0

    def __post_init__(self) -> None:
        _require_at_least("warmup-updates", self.warmup_updates, 0)

    @final
    def lr_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return what each parameter group's own learning rate is multiplied by.

        Parameters
        ----------
        update : int
            Counted from 0 at the start of the run.
        per_epoch, total : int
            Updates in an epoch, and in the whole run.
        """
        ramp = min(1.0, (update + 1) / self.warmup_updates) if self.warmup_updates else 1.0
        return ramp * self.decay_factor(update, updates_per_epoch, total_updates)

    @abstractmethod
    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return the factor without the ramp; arguments as of `factor`."""

    def _decay_progress(self, update: int, total_updates: int) -> float:
        """Return which share of the updates after the ramp lies behind, 0 to 1."""
        after = max(total_updates - self.warmup_updates, 1)
        return min(max(update - self.warmup_updates, 0) / after, 1.0)


@final
@dataclass(frozen=True)
class ConstantLR(LRSchedule):
    """The optimizer's own rate."""

    depends_on_run_length: ClassVar[bool] = False

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return 1."""
        return 1.0


@final
@dataclass(frozen=True)
class CosineLR(LRSchedule):
    """Half a cosine from 1, at the end of the ramp, to `final`, which update `total` would have.

    Source: Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts",
    eq. 5, without restarts; torch's `CosineAnnealingLR`.
    """

    depends_on_run_length: ClassVar[bool] = True
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_fraction("final", self.final)

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return ``final + (1 - final) (1 + cos(pi t)) / 2`` at share t of the way."""
        wave = (1 + math.cos(math.pi * self._decay_progress(update, total_updates))) / 2
        return self.final + (1 - self.final) * wave


@final
@dataclass(frozen=True)
class LinearLR(LRSchedule):
    """A straight line from 1, at the end of the ramp, to `final`, which update `total` would have.

    torch's `LinearLR` with ``start_factor = 1``.
    """

    depends_on_run_length: ClassVar[bool] = True
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_fraction("final", self.final)

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return ``1 - (1 - final) t`` at share t of the way."""
        return 1 - (1 - self.final) * self._decay_progress(update, total_updates)


@final
@dataclass(frozen=True)
class StepLR(LRSchedule):
    """Stairs: times `gamma` after every so many epochs, or at the beginning of named ones.

    Epochs are counted from the start of the run, the ramp included. torch's `StepLR` and
    `MultiStepLR`, stepped once per epoch.

    Attributes
    ----------
    every_epochs : int
        Epochs on one stair; 0: `epochs` says where stairs begin.
    epochs : tuple of int
        Epochs behind when a stair begins: ``[30, 60]`` is two stairs down, the first before the
        31st epoch.
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
            found = "both stand there" if self.epochs else "neither stands there"
            raise ConfigError(
                "todo.key", f"[lr] 'step' needs every-epochs or epochs = [...] ({found})"
            )

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        """Return `gamma` to the power of the stairs passed."""
        epoch = update // updates_per_epoch
        stairs = sum(epoch >= each for each in self.epochs)
        if self.every_epochs:
            stairs = epoch // self.every_epochs
        return self.gamma**stairs


LR_SCHEDULES: dict[str, type[LRSchedule]] = {
    "constant": ConstantLR,
    "cosine": CosineLR,
    "linear": LinearLR,
    "step": StepLR,
}


def _require_at_least(key: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError("todo.key", f"[lr] {key} = {value} is too small: give at least {minimum}")


def _require_fraction(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError("todo.key", f"[lr] {key} = {value} is no share of the rate: give 0 to 1")
