"""Nodes: the replicas of a block, host by host, and groups with one of them from each host.

Invariant: a node's ranks keep their order, and bridge `i` takes rank ``i mod g`` of a node of g; so
every rank is on some bridge.

::

    nodes {0 1 2} and {3 4}        near of 1: 0 1 2        bridges: {0 3}  {1 4}  {2 3}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
class NodeGroups:
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
        self.ranks_by_node, self.node_ranks = (
            list(members.values()),
            members[replicas.hosts[replicas.rank]],
        )
        self.rank, self.node_group = replicas.rank, replicas.split_by_node()

    @property
    def replica_fraction(self) -> float:
        """The part of all replicas that are on my node."""
        return len(self.node_ranks) / sum(map(len, self.ranks_by_node))

    def root(self, group_index: int) -> int:
        """Return which rank of `near` is on a bridge."""
        return group_index % len(self.node_ranks)

    def node_rows(self, rows: Sequence[int]) -> int:
        """Return the samples of my node, of those of each replica."""
        return sum(rows[rank] for rank in self.node_ranks)

    def weighted_group(self, rows: Sequence[int]) -> WeightedGroup | None:
        """Return my node as a group whose means are over samples; None where nobody has any, or
        nobody else is there."""
        total = self.node_rows(rows)
        return (
            WeightedGroup(self.node_group, rows[self.rank] / total)
            if len(self.node_ranks) > 1 and total
            else None
        )


def inter_node_groups(replicas: Comm, nodes: NodeGroups) -> list[Comm | None]:
    """Return the bridges, as many as the largest node has replicas; None where I am not a member.

    Collective over the replicas.
    """
    return [
        _inter_node_group(replicas, nodes, each)
        for each in range(max(map(len, nodes.ranks_by_node)))
    ]


def _inter_node_group(replicas: Comm, nodes: NodeGroups, group_index: int) -> Comm | None:
    member = nodes.node_ranks[nodes.root(group_index)] == nodes.rank
    group = replicas.split(0 if member else 1, name=f"bridge {group_index}")
    if member:
        return group
    group.close()
    return None


@final
class NodeLeaders:
    """Making it is collective over the group.

    Attributes
    ----------
    near : Comm
        The ranks of my node.
    far : Comm or None
        The first rank of each node, where I am one.
    """

    def __init__(self, group: Comm) -> None:
        self.node_group = group.split_by_node()
        leads = group.split(0 if self.node_group.rank == 0 else 1, name=f"leads of {group.name}")
        self.leader_group: Comm | None = leads if self.node_group.rank == 0 else None
        if self.leader_group is None:
            leads.close()
        self.node_sizes = [group.hosts.count(host) for host in dict.fromkeys(group.hosts)]

    def allgather_bytes(self, data: Tensor) -> list[Tensor]:
        """Return the bytes (uint8, one or more) of all ranks, by node, then rank; each has as many.
        Collective."""
        own = torch.cat(self.node_group.ialltoall([data] * self.node_group.size).wait())
        if len(self.node_sizes) == 1:
            return list(own.view(-1, len(data)))
        most = max(self.node_sizes) * len(data)  # what travels has one length
        everything = own.new_zeros(len(self.node_sizes) * most)
        if self.leader_group is not None:
            padded = torch.cat([own, own.new_zeros(most - len(own))])
            torch.cat(
                self.leader_group.ialltoall([padded] * self.leader_group.size).wait(),
                out=everything,
            )
        self.node_group.broadcast_([everything])
        nodes = zip(self.node_sizes, everything.view(-1, most), strict=True)
        return [part for size, node in nodes for part in node.view(-1, len(data))[:size]]
