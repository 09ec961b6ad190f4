"""The base class of schedules that update after every micro-batch and never flush in a segment.

Invariant: the fields choose the weights with which blocks compute and how delayed gradients are
applied, never the order of the actions; so they combine freely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from dtrain.errors import ConfigError
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.cyclic import block_delays, cyclic_order, update_cycles
from dtrain.schedules.update_lags import UpdateCycles
from dtrain.schedules.weight_policy import Prediction, WeightPolicy


@dataclass(frozen=True)
class AsyncSchedule(Schedule):
    """Run cycles over any routes, with an update after every micro-batch.

    In the formulas, v is the velocity of SGD with momentum m, g the gradient, and D the delay of
    the block in updates.

    Attributes
    ----------
    weights : "current" or "stash"
        Weights of a backward: the current ones, or those of its forward (weight stashing:
        Narayanan et al. 2019, "PipeDream").
    prediction : str
        How a forward predicts the weights of T updates later. "velocity": w - lr T v, and
        "difference": w + T (w - w of one update before), are the linear weight predictions LWP-v
        and LWP-w (Kosson et al. 2021). "coasting": w - lr v (m - m^(T+1)) / (1 - m), the movement
        by the velocity alone (FTPipe). "optimizer": T times the present step of SGD, Adam or AdamW
        (PipeOptim, Guan et al. 2023). "spectrain": "velocity" in backwards too, to the moment at
        which the first block runs the backward of the micro-batch (SpecTrain, Chen et al. 2018).
    horizon : float
        T in units of the block's delay; 1 means T = D.
    compensation : "none" or "spike"
        "spike" (spike compensation, Kosson et al. 2021): a gradient that is D updates late is
        applied as the sum of all movements that it missed:
        w <- w - lr (m^D v + (1 - m^D) / (1 - m) g).

    Raises
    ------
    ConfigError
        Fields are out of range or contradict each other.
    """

    asynchronous: ClassVar[bool] = True
    delays_count_micro_batches: ClassVar[bool] = True
    name: ClassVar[str]
    period: ClassVar[int] = 1
    weights: Literal["current", "stash"] = "current"
    prediction: Prediction = "none"
    horizon: float = 1.0
    compensation: Literal["none", "spike"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.horizon < float("inf"):
            raise ConfigError(
                "schedule.horizon-out-of-range",
                f"[schedule] horizon = {self.horizon} must be 0 or more, and finite",
            )
        if self.horizon != 1 and self.prediction == "none":
            raise ConfigError(
                "schedule.horizon-without-prediction",
                f"[schedule] horizon = {self.horizon} has no effect without a prediction: "
                "set prediction too, or leave out horizon",
            )
        if self.prediction == "spectrain" and self.weights == "stash":
            raise ConfigError(
                "schedule.spectrain-with-stash",
                '[schedule] prediction = "spectrain" predicts the weights of backwards too, but '
                'weights = "stash" uses those of their forwards: set only one of them',
            )

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        self.check_routes(routes)
        largest = max(micro_batches, default=0)
        if largest > 1:
            raise ConfigError(
                "schedule.micro-batches-not-one",
                f"'{self.name}' updates after every micro-batch, but an update has {largest}: set "
                f"micro-batches = 1, and batch-size to 1/{largest} of its value for the same step",
            )
        return cyclic_order(stage, place, micro_batches, routes, period=self.period)

    def policy(self, place: Sequence[int], routes: Sequence[Route]) -> WeightPolicy:
        return WeightPolicy(
            block_delays(place, routes, self.period),
            stash=self.weights == "stash",
            prediction=self.prediction,
            horizon=self.horizon,
            spike_compensation=self.compensation == "spike",
        )

    def update_cycles(self, blocks: int, routes: Sequence[Route]) -> UpdateCycles | None:
        return update_cycles(blocks, routes, self.period)

    def optimizer_requirements(self) -> tuple[str, ...]:
        keys = (("prediction", self.prediction), ("compensation", self.compensation))
        return tuple(f'{key} = "{value}"' for key, value in keys if value != "none")
