"""NodeGraph: the edges of a data set whose samples are the nodes of one graph.

A row of its matrices lists the nodes from which a node aggregates, with a weight each. With A the
adjacency, undirected and without loops, and D the degrees::

    symmetric   (D + I)^-1/2 (A + I) (D + I)^-1/2     graph convolution, Kipf and Welling 2017
    mean        D^-1 A                                GraphSAGE, Hamilton et al. 2017

Behind the nodes are *virtual nodes*, one for each class. A virtual node aggregates the mean of the
labelled training nodes of its class (`symmetric`: and of itself). No node aggregates from it, so
the output of a node does not depend on labels.

Invariant: a graph is never written to; all ranks read the same one from the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

Normalisation = Literal["symmetric", "mean"]


class SparseMatrix(NamedTuple):
    """A matrix in compressed rows.

    Attributes
    ----------
    starts : array
        Position at which each row starts in the other two, (rows + 1,) int64.
    columns : array
        Columns of the numbers, (n,) int64.
    weights : array
        The numbers, (n,) float64.
    """

    starts: NDArray[np.int64]
    columns: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """The row of each number, (n,)."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def select(self, rows: NDArray[np.int64]) -> SparseMatrix:
        """Return some rows, in their order."""
        counts = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(counts)])
        positions = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], counts)
        return SparseMatrix(starts, self.columns[positions], self.weights[positions])

    def transpose(self, columns: int) -> SparseMatrix:
        """Return the transpose, given the number of columns."""
        order = np.argsort(self.columns, kind="stable")
        counts = np.bincount(self.columns, minlength=columns)
        starts = np.concatenate([[0], np.cumsum(counts)])
        return SparseMatrix(starts, self.row_numbers[order], self.weights[order])


@final
@dataclass(frozen=True, eq=False)
class NodeGraph:
    """Nodes, undirected edges, and one virtual node for each class.

    Attributes
    ----------
    nodes : int
        Number of nodes: the samples of every split.
    edges : array
        Each edge in both directions, without repetitions and loops, (2, n) int64.
    members : tuple of arrays
        The labelled training nodes of each class, (n_c,) int64.
    """

    nodes: int
    edges: NDArray[np.int64]
    members: tuple[NDArray[np.int64], ...] = ()

    @staticmethod
    def from_edges(
        nodes: int, edges: NDArray[Any], members: Sequence[NDArray[np.int64]] = ()
    ) -> NodeGraph:
        """Return the graph of edges (2, n) between nodes, in either direction or in both."""
        first, second = np.asarray(edges, np.int64)
        is_loop = first == second
        keys = np.concatenate([first * nodes + second, second * nodes + first])
        keys = np.unique(keys[~np.tile(is_loop, 2)])
        return NodeGraph(nodes, np.stack([keys // nodes, keys % nodes]), tuple(members))

    def __deepcopy__(self, _memo: object) -> NodeGraph:
        """Return the graph itself, which is constant."""
        return self

    @property
    def virtual_nodes(self) -> int:
        """Number of virtual nodes."""
        return len(self.members)

    @property
    def rows(self) -> int:
        """Number of nodes, virtual ones included: they are the last."""
        return self.nodes + self.virtual_nodes

    def matrix(self, normalisation: Normalisation) -> SparseMatrix:
        """Return the square matrix of weights, virtual nodes included."""
        return self._symmetric if normalisation == "symmetric" else self._mean

    @cached_property
    def _symmetric(self) -> SparseMatrix:
        degrees = np.bincount(self.edges[0], minlength=self.nodes) + 1.0
        loops = np.tile(np.arange(self.nodes), (2, 1))
        rows, columns = np.concatenate([self.edges, loops], 1)
        weights = 1 / np.sqrt(degrees[rows] * degrees[columns])
        return self._with_virtual_rows(rows, columns, weights, has_loops=True)

    @cached_property
    def _mean(self) -> SparseMatrix:
        rows, columns = self.edges
        weights = 1 / np.bincount(rows, minlength=self.nodes)[rows]
        return self._with_virtual_rows(rows, columns, weights, has_loops=False)

    def _with_virtual_rows(
        self,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        weights: NDArray[np.float64],
        has_loops: bool,
    ) -> SparseMatrix:
        """Return the matrix of numbers at (rows, columns), with the rows of virtual nodes."""
        parts = [(rows, columns, weights)]
        for number, members in enumerate(self.members, start=self.nodes):
            sources = np.append(members, number) if has_loops else members
            mean = np.full(len(sources), 1 / max(1, len(sources)))
            parts.append((np.full(len(sources), number), sources, mean))
        rows, columns, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = np.lexsort((columns, rows))
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=self.rows))])
        return SparseMatrix(starts, columns[order], weights[order])
