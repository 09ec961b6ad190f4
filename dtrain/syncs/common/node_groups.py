"""Groups of replicas by node: those of one node, and groups with one rank of each node.

`NodeGroups` has inter-node groups in which every rank takes part; `NodeLeaders` has one, of the
first rank of each node.

Invariant: inter-node group `i` has rank ``i mod g`` of a node of g ranks, in the order of ranks, so
every rank is in one of them.

::

    nodes {0 1 2} and {3 4}      node group of 1: 0 1 2      inter-node groups: {0 3} {1 4} {2 3}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from dtrain.comm.communicator import Comm
from dtrain.comm.node_topology import NodeTopology
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
class NodeGroups:
    """The replicas of a block by node. Construction is collective over the replicas.

    Attributes
    ----------
    topology : NodeTopology
        The ranks of each node.
    node_group : Comm
        The replicas of this node.
    """

    def __init__(self, replicas: Comm) -> None:
        self.topology = NodeTopology(replicas.nodes, replicas.rank)
        self.node_group = replicas.split_by_node()

    @property
    def node_count(self) -> int:
        """Nodes that have a replica."""
        return len(self.topology.nodes)

    @property
    def replica_fraction(self) -> float:
        """The fraction of all replicas that are on this node."""
        return len(self.topology.node_ranks) / sum(map(len, self.topology.nodes))

    def root(self, group_index: int) -> int:
        """Return the rank in `node_group` of this node's member of an inter-node group."""
        return group_index % len(self.topology.node_ranks)

    def node_rows(self, rows_per_replica: Sequence[float]) -> float:
        """Return the samples of this node."""
        return sum(rows_per_replica[rank] for rank in self.topology.node_ranks)

    def weighted_group(self, rows_per_replica: Sequence[float]) -> WeightedGroup | None:
        """Return the node group with the weight of a mean over samples.

        None if the node has no samples or only one replica.
        """
        total = self.node_rows(rows_per_replica)
        if len(self.topology.node_ranks) == 1 or not total:
            return None
        return WeightedGroup(self.node_group, rows_per_replica[self.topology.rank] / total)


def inter_node_groups(replicas: Comm, nodes: NodeGroups) -> list[Comm | None]:
    """Return as many inter-node groups as the largest node has replicas. Collective over replicas.

    An entry is None where this rank is not a member.
    """
    count = max(map(len, nodes.topology.nodes))
    return [_inter_node_group(replicas, nodes, index) for index in range(count)]


def _inter_node_group(replicas: Comm, nodes: NodeGroups, group_index: int) -> Comm | None:
    topology = nodes.topology
    member = topology.node_ranks[nodes.root(group_index)] == topology.rank
    group = replicas.split(0 if member else 1, name=f"inter-node group {group_index}")
    if member:
        return group
    group.close()
    return None


@final
class NodeLeaders:
    """The first rank of each node of a group. Construction is collective over the group.

    Attributes
    ----------
    node_group : Comm
        The ranks of this node.
    leader_group : Comm or None
        The leaders of all nodes; None where this rank is not a leader.
    node_sizes : list of int
        Ranks of each node.
    """

    def __init__(self, group: Comm) -> None:
        self.node_group = group.split_by_node()
        leader = self.node_group.rank == 0
        leader_group = group.split(0 if leader else 1, name=f"leaders of {group.name}")
        self.leader_group: Comm | None = leader_group if leader else None
        if not leader:
            leader_group.close()
        self.node_sizes = [len(ranks) for ranks in NodeTopology(group.nodes, group.rank).nodes]

    def allgather_bytes(self, data: Tensor) -> list[Tensor]:
        """Return the bytes (uint8) of all ranks, by node, then by rank. Collective over the group.

        All ranks pass tensors of one length, at least 1.
        """
        node_data = torch.cat(self.node_group.ialltoall([data] * self.node_group.size).wait())
        if len(self.node_sizes) == 1:
            return list(node_data.view(-1, len(data)))
        length = max(self.node_sizes) * len(data)  # the messages of all nodes have one length
        gathered = node_data.new_zeros(len(self.node_sizes) * length)
        if self.leader_group is not None:
            message = pad(node_data, (0, length - len(node_data)))
            messages = self.leader_group.ialltoall([message] * self.leader_group.size).wait()
            torch.cat(messages, out=gathered)
        self.node_group.broadcast_([gathered])
        nodes = zip(self.node_sizes, gathered.view(-1, length), strict=True)
        return [part for size, node in nodes for part in node.view(-1, len(data))[:size]]
