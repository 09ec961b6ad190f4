"""Sums over the neighbours of nodes: products of a constant sparse matrix and embeddings.

Invariant: the matrix is no tensor of the model; it is neither trained, nor sent, nor saved.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtrain.node_graph import NodeGraph, Normalisation, SparseMatrix

KEPT_SELECTIONS = 8
"""Selections of rows that are kept: the layers of a block take the same ones, one after another."""


def aggregate(
    graph: NodeGraph, normalisation: Normalisation, embeddings: Tensor, nodes: Tensor
) -> Tensor:
    """Return the weighted sum over the neighbours of some nodes.

    Parameters
    ----------
    embeddings : Tensor
        Of all nodes and virtual nodes, (graph.rows, d).
    nodes : Tensor
        Numbers of the nodes, (rows,) int64.

    Returns
    -------
    Tensor
        (rows, d); its gradient reaches `embeddings`.
    """
    matrix = None
    if not nodes.is_meta and type(nodes) is Tensor:  # others have a shape, but no numbers
        key = nodes.cpu().numpy().tobytes()
        matrix = _select(graph, normalisation, key, embeddings.dtype, embeddings.device)
    result: Tensor = _Product.apply(embeddings, matrix, len(nodes))  # type: ignore[no-untyped-call]
    return result


@final
@dataclass(frozen=True, eq=False)
class TensorMatrix:
    """Some rows of a graph's matrix as sparse tensors of torch, and their transpose.

    Attributes
    ----------
    rows : SparseMatrix
        The numbers.
    columns : int
        Width of the matrix.
    dtype, device
        Of the tensors.
    """

    rows: SparseMatrix
    columns: int
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def tensor(self) -> Tensor:
        """The rows, (rows, columns)."""
        return self._to_tensor(self.rows, self.columns)

    @cached_property
    def transpose(self) -> Tensor:
        """The transpose, (columns, rows)."""
        return self._to_tensor(self.rows.transpose(self.columns), len(self.rows.starts) - 1)

    def _to_tensor(self, matrix: SparseMatrix, columns: int) -> Tensor:
        starts, numbers = torch.from_numpy(matrix.starts), torch.from_numpy(matrix.columns)
        weights = torch.from_numpy(matrix.weights).to(self.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls compressed rows a beta feature
            size = len(matrix.starts) - 1, columns
            tensor = torch.sparse_csr_tensor(starts, numbers, weights, size, device="cpu")
        return tensor.to(self.device)


@lru_cache(maxsize=KEPT_SELECTIONS)
def _select(
    graph: NodeGraph,
    normalisation: Normalisation,
    nodes: bytes,
    dtype: torch.dtype,
    device: torch.device,
) -> TensorMatrix:
    """Return the rows of some nodes, given as the bytes of their numbers."""
    rows = graph.matrix(normalisation).select(np.frombuffer(nodes, np.int64))
    return TensorMatrix(rows, graph.rows, dtype, device)


class _Product(torch.autograd.Function):
    """The product of a constant sparse matrix and a dense one; without a matrix only its shape."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: TensorMatrix | None, rows: int) -> Tensor:
        ctx.matrix, ctx.rows = matrix, len(dense)
        if matrix is None:
            return dense.new_empty(rows, dense.shape[1])
        product: Tensor = torch.sparse.mm(matrix.tensor, dense)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.matrix is None:
            return gradient.new_empty(ctx.rows, gradient.shape[1]), None, None
        return torch.sparse.mm(ctx.matrix.transpose, gradient.contiguous()), None, None
