"""The mesh of ranks: replicas x stages, pure arithmetic.

Invariant: `rank(*coords(r)) == r` for every rank r in either placement.

Six ranks as 2 replicas x 3 stages:

    stages-in-node                     replicas-in-node

              stage 0  1  2                      stage 0  1  2
    replica 0       0  1  2            replica 0       0  2  4
    replica 1       3  4  5            replica 1       1  3  5

Launchers fill a node with consecutive ranks. So `stages-in-node` keeps activations inside a node,
and `replicas-in-node` keeps the all-reduce of gradients inside a node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

from dtrain.errors import ConfigError, add_location, unknown_name


@dataclass(frozen=True)
class RankPosition:
    """Coordinates of a rank on the mesh, and the stage of every block.

    Attributes
    ----------
    place : tuple of int
        `place[b]` is the stage of block b.
    """

    mesh: RankMesh
    replica: int
    stage: int
    place: tuple[int, ...]

    def rank(self, block: int) -> int:
        """Return the rank of this replica that holds `block`."""
        return self.mesh.rank(self.replica, self.place[block])

    @contextmanager
    def error_context(self, action: object, when: str) -> Iterator[None]:
        """Append replica, stage, time and action to every error that is raised inside.

        Parameters
        ----------
        action : Action
            The action that runs.
        when : str
            The time in the run, such as "update 3".
        """
        try:
            yield
        except BaseException as error:
            location = f"[replica {self.replica} stage {self.stage} | {when} | action {action}]"
            add_location(error, location)
            raise


PLACEMENTS = ("stages-in-node", "replicas-in-node")


@final
@dataclass(frozen=True)
class RankMesh:
    """A mesh of `replicas` x `stages` ranks.

    Parameters
    ----------
    replicas, stages : int
        Ranks along each axis, both at least 1.
    placement : str
        The axis with consecutive ranks: "stages-in-node" or "replicas-in-node".
    shares : tuple of int
        Parts of an update that the replicas have, in proportion; empty: equal ones.

    Raises
    ------
    ConfigError
        An axis has no ranks, the placement is unknown, or there is not one share for each replica.
    """

    replicas: int
    stages: int
    placement: str = "stages-in-node"
    shares: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.stages < 1:
            raise ConfigError(
                "mesh.no-ranks",
                f"a mesh of {self.replicas} replicas x {self.stages} stages has no ranks: "
                "both must be at least 1",
            )
        if self.placement not in PLACEMENTS:
            raise unknown_name("mesh placement", self.placement, PLACEMENTS)
        if self.shares and len(self.shares) != self.replicas:
            raise _shares_error(self)

    @classmethod
    def for_ranks(
        cls,
        ranks: int,
        stages: int | None = None,
        placement: str = PLACEMENTS[0],
        shares: tuple[int, ...] = (),
    ) -> RankMesh:
        """Return the mesh that uses all `ranks`; without `stages`, every rank is a stage.

        Raises
        ------
        ConfigError
            `stages` is less than 1 or does not divide `ranks`; the message names the nearest
            numbers of stages and of ranks that work.
        """
        stages = ranks if stages is None else stages
        if stages < 1:
            raise ConfigError(
                "mesh.stages-too-few",
                f"[mesh] stages = {stages} must be between 1 and {ranks}, the number of ranks",
            )
        if ranks % stages:
            raise _indivisible_error(ranks, stages)
        return cls(ranks // stages, stages, placement, shares)

    @property
    def ranks(self) -> int:
        return self.replicas * self.stages

    def coords(self, rank: int) -> tuple[int, int]:
        """Return `(replica, stage)` of a rank, or raise `ValueError` if it is outside the mesh."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank {rank} is outside a mesh of {self.ranks} ranks")
        if self.placement == "stages-in-node":
            return divmod(rank, self.stages)
        stage, replica = divmod(rank, self.replicas)
        return replica, stage

    def rank(self, replica: int, stage: int) -> int:
        """Return the rank at `(replica, stage)`, or raise `ValueError` if it does not exist."""
        if not (0 <= replica < self.replicas and 0 <= stage < self.stages):
            raise ValueError(f"replica {replica}, stage {stage} is outside {self}")
        if self.placement == "stages-in-node":
            return replica * self.stages + stage
        return stage * self.replicas + replica


def _shares_error(mesh: RankMesh) -> ConfigError:
    """Return the error for shares that are not one for each replica."""
    count, noun = len(mesh.shares), "replica" if mesh.replicas == 1 else "replicas"
    return ConfigError(
        "mesh.shares-length",
        f"[mesh] shares = {list(mesh.shares)} has {count} {'number' if count == 1 else 'numbers'} "
        f"for {mesh.replicas} {noun} (ranks / stages): give one for each replica, start "
        f"{count * mesh.stages} ranks, or leave out shares",
    )


def _indivisible_error(ranks: int, stages: int) -> ConfigError:
    """Return the error for `ranks` that `stages` does not divide, with the nearest fixes."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    nearest_stages = min(divisors, key=lambda n: (abs(n - stages), -n))
    below = max(1, ranks // stages)
    replicas = min(below, ranks // stages + 1, key=lambda n: abs(n * stages - ranks))
    noun = "replica" if replicas == 1 else "replicas"
    return ConfigError(
        "mesh.ranks-indivisible",
        f"{ranks} ranks cannot form {replicas} {noun} x {stages} stages "
        f"(needs {replicas * stages}): set stages = {nearest_stages}, "
        f"or start {replicas * stages} ranks",
    )
