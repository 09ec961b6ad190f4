"""PowerSGD: low-rank compression of transfers between nodes, with error feedback.

A gradient matrix M (a x b) (or, around another sync, a delta of weights) is sent as a product P Q'
of rank k, from one step of a power iteration that starts from the Q of the last mean::

    M <- M + error        P <- mean of M Q        orthogonalise P        Q <- mean of M' P
    result P Q'           error <- M - P Q', kept by each replica

Vectors, and matrices whose `min_compression_rate` is not reached, are averaged exactly.

Sends, over n replicas on m nodes, 2 (m - 1) (k (a + b) per matrix + everything else) elements
between nodes per mean, and 2 (n - m) of them inside, in two means one after the other. Staleness:
that of the inner sync, and the error of a replica. On one node it is the inner sync.

Source: Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", arXiv 1905.13727, with the defaults of torch's hook. That hook starts after ten
updates; the wrapper `warmup` does so here.

Invariant: all replicas apply the same product. The sum of all products, plus the mean error of the
replicas, is the sum of all gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.rng import derive_seed
from dtrain.syncs.base import add_prefix, clone_all, require_at_least, select_prefix
from dtrain.syncs.common.compressed import CompressedSync
from dtrain.syncs.common.compressor import Completion, Compressor


@final
@dataclass
class PowerSGD(CompressedSync):
    """Low-rank transfers between nodes, with error feedback.

    Attributes
    ----------
    rank : int
        Columns of P and Q (k).
    min_compression_rate : float
        A matrix is compressed if it has more than so many times the elements of its factors.
    """

    error_feedback: ClassVar[bool] = True
    rank: int = 1
    min_compression_rate: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("rank", self.rank, 1)
        require_at_least("min-compression-rate", self.min_compression_rate, 1)

    def make_compressor(self, payload: str) -> Compressor:
        """Return a compressor whose first Q is the same on all replicas."""
        rng_key = "powersgd", payload, self.block.seed
        return PowerSGDCompressor(self.rank, self.min_compression_rate, rng_key)

    def sent_fraction(self) -> float:
        """Return the fraction of a square matrix of a thousand rows; vectors are few."""
        return 2 * self.rank / 1000


@final
class PowerSGDCompressor(Compressor):
    """Low-rank means with error feedback and warm start.

    Parameters
    ----------
    rank : int
        Columns of P and Q.
    min_compression_rate : float
        A matrix is compressed if it has more than so many times the elements of its factors.
    rng_key : tuple of int or str
        Keys the first Q, the same on all ranks.
    """

    def __init__(
        self, rank: int, min_compression_rate: float, rng_key: tuple[int | str, ...]
    ) -> None:
        self.rank = rank
        self.min_compression_rate = min_compression_rate
        self.rng_key = rng_key
        self._errors: dict[str, Tensor] = {}
        self._warm_starts: dict[str, Tensor] = {}

    def begin(
        self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int
    ) -> Completion:
        """Start the mean of P and of tensors that are not compressed. Collective over the group."""
        if group.node_count == 1 or not tensors:
            return group.imean_(tensors, weight).wait
        compressed, exact = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in tensors.items():
            (compressed if self.is_worth_compressing(tensor) else exact)[name] = tensor
        matrices = {name: self._add_error(name, tensor) for name, tensor in compressed.items()}
        p = {name: matrix @ self._initial_q(name, matrix) for name, matrix in matrices.items()}
        mean = group.imean_(exact | p, weight)

        def finish() -> None:
            mean.wait()
            q: dict[str, Tensor] = {}
            for name, matrix in matrices.items():
                p[name] = torch.linalg.qr(p[name]).Q.contiguous()
                q[name] = matrix.T @ p[name]
            group.mean_(q, weight)
            for name, tensor in compressed.items():
                product = p[name] @ q[name].T
                self._errors[name] = matrices[name] - product
                self._warm_starts[name] = q[name]
                tensor.copy_(product.view(tensor.shape))

        return finish

    def is_worth_compressing(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a matrix that reaches the minimum compression rate."""
        if tensor.dim() < 2:
            return False
        rows, columns = len(tensor), tensor.numel() // max(len(tensor), 1)
        rank = min(self.rank, rows, columns)
        return rank * (rows + columns) * self.min_compression_rate < rows * columns

    def _add_error(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor as a matrix plus the error of the last mean, as a copy."""
        matrix = tensor.reshape(len(tensor), -1).clone()
        error = self._errors.get(name)
        if error is None or error.shape != matrix.shape:  # an inner sync may change shapes
            return matrix
        return matrix.add_(error)

    def _initial_q(self, name: str, matrix: Tensor) -> Tensor:
        """Return the Q of the last mean, or a random one."""
        shape = matrix.shape[1], min(self.rank, *matrix.shape)
        if name not in self._warm_starts or self._warm_starts[name].shape != shape:
            generator = torch.Generator().manual_seed(derive_seed(*self.rng_key, name))
            first = torch.randn(shape, generator=generator, dtype=torch.float64)
            self._warm_starts[name] = first.to(matrix)
        return self._warm_starts[name]

    def state(self) -> dict[str, Tensor]:
        """Return the errors of this rank, and the last Q."""
        return add_prefix("error/", self._errors) | add_prefix("start/", self._warm_starts)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the errors of this rank, and the last Q."""
        self._errors = clone_all(select_prefix(state, "error/"))
        self._warm_starts = clone_all(select_prefix(state, "start/"))
