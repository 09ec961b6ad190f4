"""Nodes: the replicas of a block, host by host, and groups with one of them from each host.

Invariant: a node's ranks keep their order, and bridge `i` takes rank ``i mod g`` of a node of g; so
every rank is on some bridge.

::

    nodes {0 1 2} and {3 4}        near of 1: 0 1 2        bridges: {0 3}  {1 4}  {2 3}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from dtrain.comm.comm import Comm
from dtrain.early import Group


@final
class Nodes:
    """One replica's view of them. Making it is collective over the replicas.

    Attributes
    ----------
    near : Comm
        The replicas of my node.
    ranks : list of list of int
        Replicas of each node, in order of first appearance.
    mine : list of int
        Those of my node.
    """

    def __init__(self, replicas: Comm) -> None:
        members: dict[str, list[int]] = {}
        for rank, host in enumerate(replicas.hosts):
            members.setdefault(host, []).append(rank)
        self.ranks, self.mine = list(members.values()), members[replicas.hosts[replicas.rank]]
        self.rank, self.near = replicas.rank, replicas.by_node()

    @property
    def share(self) -> float:
        """The part of all replicas that are on my node."""
        return len(self.mine) / sum(map(len, self.ranks))

    def root(self, bridge: int) -> int:
        """Return which rank of `near` is on a bridge."""
        return bridge % len(self.mine)

    def rows(self, rows: Sequence[int]) -> int:
        """Return the samples of my node, of those of each replica."""
        return sum(rows[rank] for rank in self.mine)

    def group(self, rows: Sequence[int]) -> Group | None:
        """Return my node as a group whose means are over samples; None where nobody has any, or
        nobody else is there."""
        total = self.rows(rows)
        return Group(self.near, rows[self.rank] / total) if len(self.mine) > 1 and total else None


def bridged(replicas: Comm, nodes: Nodes) -> list[Comm | None]:
    """Return the bridges, as many as the largest node has replicas; None where I am not a member.

    Collective over the replicas.
    """
    return [_bridge(replicas, nodes, each) for each in range(max(map(len, nodes.ranks)))]


def _bridge(replicas: Comm, nodes: Nodes, number: int) -> Comm | None:
    member = nodes.mine[nodes.root(number)] == nodes.rank
    group = replicas.split(0 if member else 1, name=f"bridge {number}")
    if member:
        return group
    group.close()
    return None
