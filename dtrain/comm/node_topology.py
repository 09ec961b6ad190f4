"""Tiers: which rank of which node handles a piece of a mean; pure arithmetic.

Invariant: per piece exactly one rank of each node speaks to other nodes, and over pieces the work
goes round the nodes, and round the ranks of each of them, however many those are.

    3 nodes of 2, 1 and 3 ranks: leads of piece k, the owner in brackets

    piece      0     1     2     3     4     5     6     7     8
    node 0    [0]    0     0    [1]    1     1    [0]    0     0
    node 1     2    [2]    2     2    [2]    2     2    [2]    2
    node 2     3     3    [3]    4     4    [4]    5     5    [5]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final


@final
class NodeTopology:
    """The ranks of a group, by node.

    Attributes
    ----------
    nodes : list of list of int
        Ranks, ascending, of each node, in order of their first ranks.
    node, near : int, list of int
        My node, and its ranks.
    even : int
        Pieces in a round, after which every rank has led as often as the others of its node (where
        nodes are equal; else as nearly as a round allows).
    """

    def __init__(self, hosts: Sequence[str], rank: int) -> None:
        members: dict[str, list[int]] = {}
        for other, host in enumerate(hosts):
            members.setdefault(host, []).append(other)
        self.rank, self.nodes, self.node_ranks = rank, list(members.values()), members[hosts[rank]]
        self.node_index = self.nodes.index(self.node_ranks)
        self.pieces_per_round = len(self.nodes) * max(map(len, self.nodes))

    def leader(self, piece: int, node: int) -> int:
        """Return who adds up a node's parts of a piece."""
        ranks = self.nodes[node]
        return ranks[piece // len(self.nodes) % len(ranks)]

    def owner_node(self, piece: int) -> int:
        """Return the node whose lead owns a piece."""
        return piece % len(self.nodes)

    def weight_receivers(self, rank: int, pieces: int) -> set[int]:
        """Return the ranks that multiply parts of `rank` by its weight, itself excepted.

        Those are the leads of its node; where it is alone there, its parts travel as they are, and
        the owners multiply.
        """
        nodes = self.nodes
        near = next(ranks for ranks in nodes if rank in ranks)
        if len(near) > 1:
            found = set(near[: -(-pieces // len(nodes))])
        else:
            owned = [-(-(pieces - node) // len(nodes)) for node in range(len(nodes))]
            found = {r for ranks, n in zip(nodes, owned, strict=True) for r in ranks[: max(0, n)]}
        return found - {rank}

    def weight_senders(self, pieces: int) -> list[int]:
        """Return the ranks whose weights I need."""
        far = [ranks[0] for ranks in self.nodes if len(ranks) == 1]
        known = dict.fromkeys([*self.node_ranks, *far])
        return [rank for rank in known if self.rank in self.weight_receivers(rank, pieces)]
