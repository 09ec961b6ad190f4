"""NodeTopology: the ranks of a group by node, and which of them reduces a piece of a mean.

Pure arithmetic; the only place that groups ranks by node.

Invariant: for each piece exactly one rank of each node, its leader, exchanges data with other
nodes. The leader of the owner node owns the piece. In a round of pieces each node is the owner in
turn, and each rank of a node is its leader in turn.

    3 nodes of 2, 1 and 3 ranks: leaders of piece k, the owner in brackets

    piece      0     1     2     3     4     5     6     7     8
    node 0    [0]    0     0    [1]    1     1    [0]    0     0
    node 1     2    [2]    2     2    [2]    2     2    [2]    2
    node 2     3     3    [3]    4     4    [4]    5     5    [5]
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import final


@final
class NodeTopology:
    """The ranks of a group, by node.

    Parameters
    ----------
    nodes : sequence of hashable
        Node of each rank.
    rank : int
        This rank.

    Attributes
    ----------
    nodes : list of list of int
        Ranks of each node, ascending; nodes in order of their first ranks.
    node_index : int
        Index of this rank's node.
    node_numbers : list of int
        Index of the node of each rank.
    node_ranks : list of int
        Ranks of this rank's node, ascending.
    node_peers : list of int
        The other ranks of this rank's node, ascending.
    node_sizes : list of int
        Number of ranks of each node.
    local_rank : int
        Position of this rank among them.
    pieces_per_round : int
        Pieces after which every rank has led as often as the others of its node, if all nodes have
        equally many ranks; otherwise as evenly as one round allows.
    """

    def __init__(self, nodes: Sequence[Hashable], rank: int) -> None:
        ranks_by_node: dict[Hashable, list[int]] = {}
        for other, node in enumerate(nodes):
            ranks_by_node.setdefault(node, []).append(other)
        self.rank = rank
        self.nodes = list(ranks_by_node.values())
        self.node_ranks = ranks_by_node[nodes[rank]]
        self.node_index = self.nodes.index(self.node_ranks)
        self.local_rank = self.node_ranks.index(rank)
        self.node_sizes = [len(ranks) for ranks in self.nodes]
        self.node_peers = [other for other in self.node_ranks if other != rank]
        self.pieces_per_round = len(self.nodes) * max(self.node_sizes)
        numbers = {node: number for number, node in enumerate(ranks_by_node)}
        self.node_numbers = [numbers[node] for node in nodes]
        self._is_local = [node == nodes[rank] for node in nodes]

    def is_local(self, rank: int) -> bool:
        """Return whether a rank is on this rank's node."""
        return self._is_local[rank]

    def leaders(self, piece: int) -> tuple[list[int], int]:
        """Return the ranks that add up the parts of a piece on each node, and its owner."""
        node_count = len(self.nodes)
        leaders = [ranks[piece // node_count % len(ranks)] for ranks in self.nodes]
        return leaders, leaders[piece % node_count]

    def weight_receivers(self, rank: int, piece_count: int) -> set[int]:
        """Return the ranks that multiply parts of `rank` by its weight, without `rank`.

        These are the leaders of its node. A rank that is alone on its node sends its parts
        unweighted, and the owners multiply.
        """
        node_count = len(self.nodes)
        node_ranks = next(ranks for ranks in self.nodes if rank in ranks)
        if len(node_ranks) > 1:
            return {*node_ranks[: -(-piece_count // node_count)]} - {rank}
        owners: set[int] = set()
        for node, ranks in enumerate(self.nodes):
            owned_pieces = max(0, -(-(piece_count - node) // node_count))
            owners.update(ranks[:owned_pieces])
        return owners - {rank}

    def weight_senders(self, piece_count: int) -> list[int]:
        """Return the ranks whose weights this rank needs: its node's first, in rank order."""
        lone_ranks = [ranks[0] for ranks in self.nodes if len(ranks) == 1]
        candidates = dict.fromkeys([*self.node_ranks, *lone_ranks])
        return [
            rank for rank in candidates if self.rank in self.weight_receivers(rank, piece_count)
        ]
