"""The base class of schedules: the order in which a rank computes.

Invariant: a plan depends on its arguments alone and is complete. For every block of the stage it
has each pass of `F`, then `B` (or `I`, then `W`), once per micro-batch, and `U` once per update;
backwards run in the order of the micro-batches, 0 .. M-1. Therefore all schedules without
staleness train the same model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import ClassVar, dataclass_transform

from dtrain import partition
from dtrain.errors import ConfigError
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.update_lags import UpdateCycles
from dtrain.schedules.weight_policy import WeightPolicy
from dtrain.schema import Strategy


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Schedule(Strategy, ABC):
    """The order of one rank's actions over one segment.

    A subclass is a dataclass, with or without the decorator (see `Strategy`); its fields are the
    keys of `[schedule]` in a run file.
    """

    unsupported_routes: ClassVar[str]
    """The routes that it cannot run, and the alternative: the end of an error message."""

    asynchronous: ClassVar[bool] = False
    """Whether a block may be updated between the forward and the backward of a micro-batch."""

    delays_count_micro_batches: ClassVar[bool] = False
    """Whether micro-batches of one update may train with different versions of the weights, so that
    the result depends on the numbers of micro-batches and replicas."""

    splits_backward: ClassVar[bool] = False
    """Whether plans have `I` and `W` instead of `B`."""

    recomputes: ClassVar[bool] = False
    """Whether backwards compute their forwards again, as with ``[partition] recompute = true``."""

    rebuilds_inputs: ClassVar[bool] = False
    """Whether blocks keep no activations from forward to backward: a reversible block rebuilds its
    input from its output, which the next block returns; others keep their input and compute the
    forward again."""

    flushes: ClassVar[bool] = False
    """Whether a rank runs all backwards of an update before its first `U` of that update, so that
    the gradients of the whole model are available together (to clip their norm)."""

    def assign_stages(
        self, costs: Sequence[float], stages: int, transfers: Sequence[float] = ()
    ) -> tuple[int, ...]:
        """Return the stage of each block.

        The default is contiguous; a schedule may override it with a loop or a V.

        Parameters
        ----------
        costs, stages, transfers
            As in `partition.assign_stages`.

        Raises
        ------
        ConfigError
            The blocks cannot be placed on that many stages.
        """
        return partition.assign_stages(costs, stages, transfers)

    def check_places(self, place: Sequence[int]) -> None:
        """Raise a `ConfigError` for places that this order cannot run, with the alternative.

        The default accepts any; the proof refuses those that lead to a deadlock.
        """
        return

    @abstractmethod
    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        """Yield the actions of one rank.

        A `tuple` of them takes about 100 bytes and a microsecond per action, so a caller that
        needs a plan twice keeps the tuple.

        Parameters
        ----------
        stage : int
            Stage of the rank.
        place : sequence of int
            `place[b]` is the stage of block b.
        micro_batches : sequence of int
            Number of micro-batches of each update of the segment, in this replica. An update with
            none keeps its `U`, since updates may be collective over the replicas.
        routes : sequence of Route
            All routes of the model.

        Raises
        ------
        ConfigError
            A route or a number of micro-batches cannot be run in this order.
        """

    @abstractmethod
    def supports(self, route: Route) -> bool:
        """Return whether this order can run a route, on any placement of the blocks."""

    def policy(self, place: Sequence[int], routes: Sequence[Route]) -> WeightPolicy | None:
        """Return which weight versions blocks compute with; None: the current ones, never stale."""
        return None

    def update_cycles(self, blocks: int, routes: Sequence[Route]) -> UpdateCycles | None:
        """Return the cycles of the updates, from which the lags of tied parameters follow; None:
        without a flush this order cannot train tied parameters."""
        return None

    def optimizer_requirements(self) -> tuple[str, ...]:
        """Return the settings that depend on the optimizer's update rule, as in a run file."""
        return ()

    def supports_all(self, routes: Sequence[Route]) -> bool:
        """Return whether this order can run all routes of an objective."""
        return all(self.supports(route) for route in routes)

    def check_routes(self, routes: Sequence[Route]) -> None:
        """Raise a `ConfigError` for the first route that cannot be run, with the alternative."""
        for route in routes:
            if not self.supports(route):
                raise ConfigError(
                    "schedule.route-unsupported",
                    f"the route {route} cannot be scheduled: {self.unsupported_routes}",
                )


def blocks_of_stage(stage: int, place: Sequence[int]) -> tuple[int, ...]:
    """Return the blocks of a stage, in order."""
    return tuple(block for block, block_stage in enumerate(place) if block_stage == stage)


def evaluation_plan(stage: int, place: Sequence[int], micro_batches: int) -> Iterator[Action]:
    """Yield one rank's plan of an evaluation: `F` of every block, micro-batch by micro-batch."""
    blocks = blocks_of_stage(stage, place)
    return (Action("F", block, 0, micro) for micro in range(micro_batches) for block in blocks)
