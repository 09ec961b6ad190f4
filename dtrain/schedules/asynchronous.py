"""Late: schedules that never drain inside a segment, and what they do about stale weights.

Invariant: the fields say with which weights blocks compute and how late gradients are applied,
never the order; so they combine freely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from dtrain.errors import ConfigError
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.cyclic import block_delays, cyclic_order
from dtrain.schedules.weight_policy import Prediction, WeightPolicy


@dataclass(frozen=True)
class AsyncSchedule(Schedule):
    """An update after every micro-batch, in cycles of whatever flows.

    Attributes
    ----------
    weights : "current" or "stash"
        With which a backward computes: those of its own moment, or those of its forward (weight
        stashing: Narayanan et al. 2019, "PipeDream").
    prediction : str
        How a forward foretells the weights of T updates later. "velocity" w - lr T v and
        "difference" w + T (w - w of one update before): Kosson et al. 2021, linear weight
        prediction; "coasting" w - lr v (m - m^(T+1)) / (1 - m): what the velocity alone will do
        (FTPipe); "optimizer": the present step of SGD, Adam or AdamW, T times (PipeOptim, Guan et
        al. 2023); "spectrain": velocity in backwards too, to the moment at which the first block
        learns the micro-batch (Chen et al. 2018, SpecTrain).
    horizon : float
        T in delays of the block: 1 is T = D.
    compensation : "none" or "spike"
        "spike": a gradient that is D updates late is applied as the sum of what it would have moved
        meanwhile: w <- w - lr (m^D v + (1 - m^D) / (1 - m) g).
    """

    asynchronous: ClassVar[bool] = True
    name: ClassVar[str]
    period: ClassVar[int] = 1
    weights: Literal["current", "stash"] = "current"
    prediction: Prediction = "none"
    horizon: float = 1.0
    compensation: Literal["none", "spike"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.horizon < float("inf"):
            raise ConfigError(
                "todo.key",
                f"[schedule] horizon = {self.horizon} is no number of delays: give 0 or more",
            )
        if self.horizon != 1 and self.prediction == "none":
            raise ConfigError(
                "todo.key", "[schedule] horizon without a prediction: set prediction, too"
            )
        if self.prediction == "spectrain" and self.weights == "stash":
            raise ConfigError(
                "todo.key",
                '[schedule] prediction = "spectrain" foretells the weights of backwards too, and '
                'weights = "stash" gives them those of their forwards: choose one of them',
            )

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        self.check_routes(routes)
        if max(micro_batches, default=0) > 1:
            raise ConfigError(
                "todo.key",
                f"'{self.name}' updates after every micro-batch, but an update has {max(micro_batches)}: "
                f"set micro-batches = 1, and batch-size to 1/{max(micro_batches)} of it for the same step",
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

    def optimizer_requirements(self) -> tuple[str, ...]:
        keys = (("prediction", self.prediction), ("compensation", self.compensation))
        return tuple(f'{key} = "{value}"' for key, value in keys if value != "none")
