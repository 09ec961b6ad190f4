"""Callbacks: early stopping, the best checkpoint, averaged weights, and rates that follow a metric.

Invariant: a decision depends only on totals over all ranks, so all ranks decide alike. A callback's
`state` is kept in checkpoints, so a resumed run decides as an uninterrupted one.

::

    [stop] metric, patience, min-delta      EarlyStopping(metric, patience, min_delta)
    [checkpoint] best                       BestCheckpoint(metric)
    [ema] decay, start, evaluate            Ema(decay, start, evaluate)
    [lr] name = "plateau"                   RateOnPlateau, made by the key alone

A callback of the user is any function of (session, event). An object may also have ``state()``,
which returns plain values, and ``restore(state)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, final

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.lr_schedule import PlateauLR
from dtrain.config import sections
from dtrain.config.run import RunConfig
from dtrain.config.validate import validate_run
from dtrain.errors import ConfigError
from dtrain.schedules.segments import Segment

__all__ = ["BestCheckpoint", "Callback", "EarlyStopping", "Ema", "Event", "RateOnPlateau"]

EventKind = Literal["start", "update", "segment", "evaluation", "checkpoint", "end"]

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Event:
    """An event of a session, for callbacks.

    Attributes
    ----------
    kind : str
        "start": before the first segment. "update": after each update. "segment": a segment has
        ended. "evaluation": the model was tested. "checkpoint": one was saved. "end": the run ends.
    segment : Segment or None
        The segment that is open or has just ended.
    update : int
        Number of updates done.
    scheduled : bool
        False for an evaluation that only the end of the run made due: a longer run would not have
        it.
    """

    kind: EventKind
    segment: Segment | None
    update: int
    scheduled: bool = True


class TrainingSession(Protocol):
    """The part of `dtrain.Session` that the callbacks of this module use."""

    def metric(self, name: str) -> float | None:
        """Return a metric of the latest evaluation."""

    def higher_is_better(self, name: str) -> bool:
        """Return whether a larger value of a metric is better."""

    def stop(self, reason: str) -> None:
        """End the run after this segment."""

    def save_best(self) -> None:
        """Keep the evaluated weights as the best."""

    def set_lr_scale(self, scale: float) -> None:
        """Multiply the learning rates of later updates."""


Callback = Callable[[Any, Event], object]
"""A function of (session, event) that a session calls on all ranks."""


class Improvement:
    """The best value of a metric so far.

    Attributes
    ----------
    best : float or None
        None before the first value that is a number.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.best: float | None = None

    def add(
        self,
        value: float | None,
        higher_is_better: bool,
        min_delta: float = 0.0,
        relative: float = 0.0,
    ) -> bool:
        """Return whether a value is better than the best by more than a margin, and keep it then.

        Parameters
        ----------
        min_delta, relative : float
            The margin, as a number and as a fraction of the best value.
        """
        sign = 1 if higher_is_better else -1
        if value is None:
            return False
        if self.best is not None:
            limit = self.best * (1 + sign * relative) + sign * min_delta
            if sign * (value - limit) <= 0:
                return False
        self.best = value
        return True

    def state(self) -> dict[str, Any]:
        """Return the metric and its best value."""
        return {"metric": self.metric, "best": self.best}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Load a state; return False if it is that of another metric, which is left alone."""
        is_same = bool(state["metric"] == self.metric)
        if is_same:
            self.best = state["best"]
        return is_same


@final
class EarlyStopping:
    """End the run when a metric has not improved in `patience` evaluations in a row.

    Parameters
    ----------
    metric : str
        "test_loss", "validation_loss" or the name of a metric; see `metric_values`.
    patience : int
        Evaluations in a row without an improvement.
    min_delta : float
        A change that is not larger than this is no improvement.
    """

    key = "early-stopping"

    def __init__(self, metric: str, patience: int, min_delta: float = 0.0) -> None:
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self.improvement = Improvement(metric)
        self.waited = 0

    def __call__(self, session: TrainingSession, event: Event) -> None:
        """Count an evaluation; stop after too many without an improvement."""
        if event.kind == "evaluation" and event.scheduled:
            value, higher = session.metric(self.metric), session.higher_is_better(self.metric)
            is_better = self.improvement.add(value, higher, self.min_delta)
            self.waited = 0 if is_better else self.waited + 1
        if event.kind in ("start", "evaluation") and self.waited >= self.patience:
            best = self.improvement.best
            session.stop(
                f"{self.metric} has not improved in {self.waited} evaluations"
                + ("" if best is None else f" (best: {best:.6g})")
            )

    def state(self) -> dict[str, Any]:
        """Return the best value, and the evaluations since then."""
        return self.improvement.state() | {"waited": self.waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a state; that of another metric is left alone."""
        if self.improvement.restore(state):
            self.waited = state["waited"]


@final
class BestCheckpoint:
    """Keep the evaluated weights of the best evaluation, in ``checkpoints/best``.

    Parameters
    ----------
    metric : str
        As of `EarlyStopping`.
    """

    key = "best-checkpoint"

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.improvement = Improvement(metric)
        self.update: int | None = None

    def __call__(self, session: TrainingSession, event: Event) -> None:
        """Save the weights of an evaluation that is the best so far."""
        if event.kind != "evaluation":
            return
        value, higher = session.metric(self.metric), session.higher_is_better(self.metric)
        if self.improvement.add(value, higher):
            self.update = event.update
            session.save_best()

    def state(self) -> dict[str, Any]:
        """Return the best value, and the updates before it."""
        return self.improvement.state() | {"update": self.update}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a state; that of another metric is left alone."""
        if self.improvement.restore(state):
            self.update = state["update"]


@final
class RateOnPlateau:
    """Lower the learning rate when a metric stops improving; torch's `ReduceLROnPlateau`.

    Parameters
    ----------
    schedule : PlateauLR
        Its keys.
    """

    key = "plateau"

    def __init__(self, schedule: PlateauLR) -> None:
        self.schedule = schedule
        self.metric = schedule.metric
        self.improvement = Improvement(schedule.metric)
        self.bad_evaluations = self.cooldown = 0
        self.scale = 1.0

    def __call__(self, session: TrainingSession, event: Event) -> None:
        """Count an evaluation; lower the rate after too many without an improvement."""
        if event.kind == "evaluation" and event.scheduled:
            self._count(session.metric(self.metric), session.higher_is_better(self.metric))
        if event.kind in ("start", "evaluation"):
            session.set_lr_scale(self.scale)

    def _count(self, value: float | None, higher_is_better: bool) -> None:
        keys = self.schedule
        is_better = self.improvement.add(value, higher_is_better, relative=keys.threshold)
        self.bad_evaluations = 0 if is_better else self.bad_evaluations + 1
        if self.cooldown:
            self.cooldown -= 1
            self.bad_evaluations = 0
        if self.bad_evaluations > keys.patience:
            self.scale = max(self.scale * keys.factor, keys.min_factor)
            self.bad_evaluations, self.cooldown = 0, keys.cooldown

    def state(self) -> dict[str, Any]:
        """Return the counts and the present factor."""
        counts = {"bad_evaluations": self.bad_evaluations, "cooldown": self.cooldown}
        return self.improvement.state() | counts | {"scale": self.scale}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a state."""
        self.improvement.restore(state)
        self.bad_evaluations, self.cooldown = state["bad_evaluations"], state["cooldown"]
        self.scale = state["scale"]


@final
class Ema:
    """Exponential moving average of the trained parameters, block by block after each update.

    average = decay x average + (1 - decay) x weights. Buffers (batch statistics) and frozen
    parameters are not averaged: they are those of the model.

    Parameters
    ----------
    decay : float
        At least 0, less than 1.
    start : int
        Updates after which the averaging begins; before, the average is a copy of the weights.
    evaluate : bool
        Whether every evaluation also tests the averaged weights.
    """

    key = "ema"

    def __init__(self, decay: float, start: int = 0, evaluate: bool = False) -> None:
        self.decay, self.start, self.evaluate = decay, start, evaluate
        self._averages: dict[int, dict[str, Tensor]] = {}

    def __call__(self, session: object, event: Event) -> None:
        """Do nothing: the session calls `update` after the update of each block."""

    def attach(self, blocks: Mapping[int, Block]) -> None:
        """Begin with copies of the weights of this rank's blocks."""
        self._averages = {
            index: {name: tensor.clone() for name, tensor in trained_tensors(block).items()}
            for index, block in blocks.items()
        }

    @torch.no_grad()
    def update(self, block: Block, update: int) -> None:
        """Average the weights of a block after an update, counted from 0 in the run."""
        averages, weight = self._averages[block.index], 1 - self.decay
        for name, tensor in trained_tensors(block).items():
            if update < self.start:
                averages[name].copy_(tensor)
            else:
                averages[name].lerp_(tensor, weight)

    def weights(self, block: int) -> Mapping[str, Tensor]:
        """Return the averaged parameters of a block of this rank, by name."""
        return self._averages[block]

    @property
    def nbytes(self) -> int:
        """Bytes of the averages of this rank."""
        tensors = [t for averages in self._averages.values() for t in averages.values()]
        return sum(tensor.nbytes for tensor in tensors)


def trained_tensors(block: Block) -> dict[str, Tensor]:
    """Return the trained parameters of a block by name, detached, not copied."""
    return {name: p.detach() for name, p in block.parameters.items() if p.requires_grad}


def with_callback_keys(run: RunConfig, callbacks: Sequence[Callback]) -> RunConfig:
    """Return the run with the keys of the given callbacks of this module.

    Raises
    ------
    ConfigError
        Two callbacks of one class, values out of range, or a key says something else.
    """
    stopping = _only(callbacks, EarlyStopping)
    best, ema = _only(callbacks, BestCheckpoint), _only(callbacks, Ema)
    if stopping is not None:
        stop = sections.Stop(stopping.metric, stopping.patience, stopping.min_delta)
        _check_key("[stop]", run.stop, stop)
        run = dataclasses.replace(run, stop=stop)
    if best is not None:
        _check_key("[checkpoint] best", run.checkpoint.best, best.metric)
        run = dataclasses.replace(
            run, checkpoint=dataclasses.replace(run.checkpoint, best=best.metric)
        )
    if ema is not None:
        keys = sections.Ema(ema.decay, ema.start, ema.evaluate)
        _check_key("[ema]", run.ema, keys)
        run = dataclasses.replace(run, ema=keys)
    if callbacks:
        validate_run(run)
    return run


def all_callbacks(run: RunConfig, callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """Return the callbacks of the run's keys that are not among the given ones, and those."""
    made: list[Callback] = []
    if isinstance(run.lr_schedule.instance, PlateauLR):
        made.append(RateOnPlateau(run.lr_schedule.instance))
    if run.stop is not None and _only(callbacks, EarlyStopping) is None:
        made.append(EarlyStopping(run.stop.metric, run.stop.patience, run.stop.min_delta))
    if run.checkpoint.best is not None and _only(callbacks, BestCheckpoint) is None:
        made.append(BestCheckpoint(run.checkpoint.best))
    if run.ema is not None and _only(callbacks, Ema) is None:
        made.append(Ema(run.ema.decay, run.ema.start, run.ema.evaluate))
    return (*made, *callbacks)


def callback_keys(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Return the callbacks that have a state, by the keys under which checkpoints keep it."""
    keyed: dict[str, Any] = {}
    for callback in callbacks:
        if not (hasattr(callback, "state") and hasattr(callback, "restore")):
            continue
        kind = type(callback)
        key = getattr(callback, "key", f"{kind.__module__}:{kind.__qualname__}")
        count = sum(other.partition(" ")[0] == key for other in keyed)
        keyed[f"{key} {count + 1}" if count else key] = callback
    return keyed


def _only(callbacks: Sequence[Callback], kind: type[T]) -> T | None:
    """Return the callback of a class, None where there is none."""
    members = [callback for callback in callbacks if isinstance(callback, kind)]
    if len(members) > 1:
        raise ConfigError(
            "callbacks.twice",
            f"{len(members)} callbacks of class {kind.__name__}: give one",
        )
    return members[0] if members else None


def _check_key(key: str, present: object, given: object) -> None:
    """Refuse a callback that differs from the key of the run."""
    if present is not None and present != given:
        raise ConfigError(
            "callbacks.differ-from-run",
            f"the run has {key} = {present}, but the callback is {given}: leave one of them out",
        )
