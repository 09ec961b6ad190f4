"""Schedules: in which order a rank computes.

Invariant: a plan is pure in its arguments and complete: every pass of `F`, then `B` (or `I`, then
`W`) of each own block once per micro-batch, `U` once per block and update, micro-batches learnt in
order 0 .. M-1. Therefore all schedules without staleness train the same model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from dtrain import partition
from dtrain.errors import ConfigError
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.weight_policy import WeightPolicy


class Schedule(ABC):
    """The order of one rank's actions over one segment."""

    unsupported_routes: ClassVar[str]
    """Which routes it cannot run, and what to use instead; the end of a refusal."""

    asynchronous: ClassVar[bool] = False
    """Whether updates of a block may come between a forward and its learning."""

    splits_backward: ClassVar[bool] = False
    """Whether plans hold `I` and `W` in the place of `B`."""

    flushes: ClassVar[bool] = False
    """Whether a rank has learnt all of an update before its first `U` of that update, so that the
    gradients of the whole model can be looked at together."""

    def assign_stages(
        self, costs: Sequence[float], stages: int, transfers: Sequence[float] = ()
    ) -> tuple[int, ...]:
        """Return the stage of each block: a line here, while a schedule may loop or fold.

        Parameters
        ----------
        costs, stages, transfers
            As of `partition.place`.

        Raises
        ------
        DtrainError
            Where the blocks cannot be placed on so many stages.
        """
        return partition.assign_stages(costs, stages, transfers)

    @abstractmethod
    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        """Yield the actions of one rank.

        Parameters
        ----------
        stage : int
            The rank's stage.
        place : sequence of int
            `place[b]` is the stage of block b.
        sizes : sequence of int
            Micro-batches of each update of the segment, of this replica. Where an update has
            none, its `U` remains, since an update may be collective over replicas.
        routes : sequence of Route
            What flows between actions.

        Raises
        ------
        DtrainError
            Where a route cannot be run in this order.
        """

    @abstractmethod
    def supports(self, route: Route) -> bool:
        """Say whether this order can serve a route, wherever its blocks are placed."""

    def policy(self, place: Sequence[int], routes: Sequence[Route]) -> WeightPolicy | None:
        """Return with which weights blocks compute; None where it is `late` never."""
        return None

    def optimizer_requirements(self) -> tuple[str, ...]:
        """Return the keys that go by an optimizer's rule, as a run file has them."""
        return ()

    def supports_all(self, routes: Sequence[Route]) -> bool:
        """Say whether this order can run all that an objective sends."""
        return all(self.supports(route) for route in routes)

    def check_routes(self, routes: Sequence[Route]) -> None:
        """Raise a `DtrainError` for the first route that cannot be run; it says what to use instead."""
        for route in routes:
            if not self.supports(route):
                raise ConfigError(
                    "todo.key", f"the route {route} cannot be scheduled: {self.unsupported_routes}"
                )


def blocks_of_stage(stage: int, place: Sequence[int]) -> tuple[int, ...]:
    """Return the blocks of a stage, in order."""
    return tuple(block for block, owner in enumerate(place) if owner == stage)


def evaluation_plan(stage: int, place: Sequence[int], micro_batches: int) -> Iterator[Action]:
    """Yield one rank's plan of an evaluation: `F` of every block, micro-batch by micro-batch."""
    blocks = blocks_of_stage(stage, place)
    return (Action("F", block, 0, micro) for micro in range(micro_batches) for block in blocks)
