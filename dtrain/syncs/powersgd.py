"""PowerSGD: what crosses between nodes are two thin factors per matrix.

Gradients (or, around another sync, movements of weights) become products P Q' of rank k, by one
step of a power iteration per mean that starts where the last one ended; what the product lacks is
kept by each replica and added to the next one. Vectors, and matrices that are not worth compressing,
travel as they are.

Sends, over n replicas on m nodes, 2 (m - 1) (k (a + b) per matrix + all else) elements between
nodes per mean, and 2 (n - m) of them inside, in two means one after the other. Staleness: that of
the inner sync, and what a replica keeps. On one node it is the inner sync.

Source: Vogels et al. 2019, arXiv 1905.13727; defaults of torch's hook, whose start after ten
updates is the wrapper `warmup` here.

Invariant: all replicas apply the same product; the sum of all products, plus the mean of what
replicas keep, is the sum of all gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.rng import derive_seed
from dtrain.syncs.base import require_at_least
from dtrain.syncs.common.compressed import CompressedSync
from dtrain.syncs.common.compressor import Completion, Compressor


@final
@dataclass
class PowerSGD(CompressedSync):
    """Low-rank transfers between nodes, with error feedback.

    Attributes
    ----------
    rank : int
        Columns of the factors (k).
    min_compression_rate : float
        How many times its factors a matrix must be to travel as them; torch calls it
        ``min_compression_rate``.
    """

    error_feedback: ClassVar[bool] = True
    rank: int = 1
    min_compression_rate: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("rank", self.rank, 1)
        require_at_least("min-compression-rate", self.min_compression_rate, 1)

    def make_compressor(self, payload: str) -> Compressor:
        """Return a carrier whose first Q is the same on all replicas."""
        return PowerSGDCompressor(
            self.rank, self.min_compression_rate, ("powersgd", payload, self.block.seed)
        )

    def sent_fraction(self) -> float:
        """Of a square matrix of a thousand rows; vectors are few."""
        return 2 * self.rank / 1000


@final
class PowerSGDCompressor(Compressor):
    """Low rank with error feedback and a warm start.

    Parameters
    ----------
    rank : int
        Columns of P and Q.
    min_compression_rate : float
        A tensor travels as it is unless it is so many times its factors.
    own : tuple of int or str
        Keys the first Q, the same on all ranks.
    """

    def __init__(
        self, rank: int, min_compression_rate: float, rng_key: tuple[int | str, ...]
    ) -> None:
        self.rank, self.min_compression_rate, self.rng_key = rank, min_compression_rate, rng_key
        self._errors: dict[str, Tensor] = {}
        self._warm_starts: dict[str, Tensor] = {}

    def begin(
        self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int
    ) -> Completion:
        """Start the mean of P, and of what travels as it is."""
        if group.node_count == 1 or not tensors:
            return group.imean_(tensors, weight).wait
        thin = {name: each for name, each in tensors.items() if self.is_worth_compressing(each)}
        matrices = {name: self._with_error_feedback(name, each) for name, each in thin.items()}
        left = {name: each @ self._initial_q(name, each) for name, each in matrices.items()}
        plain = {name: each for name, each in tensors.items() if name not in thin}
        mean = group.imean_(plain | left, weight)

        def land() -> None:
            mean.wait()
            right: dict[str, Tensor] = {}
            for name, each in left.items():
                left[name] = torch.linalg.qr(each).Q.contiguous()
                right[name] = matrices[name].T @ left[name]
            group.mean_(right, weight)
            for name, each in thin.items():
                out = left[name] @ right[name].T
                self._errors[name] = matrices[name] - out
                self._warm_starts[name] = right[name]
                each.copy_(out.view(each.shape))

        return land

    def is_worth_compressing(self, tensor: Tensor) -> bool:
        """Say whether a tensor travels as factors."""
        if tensor.dim() < 2:
            return False
        rows, columns = len(tensor), tensor.numel() // max(len(tensor), 1)
        rank = min(self.rank, rows, columns)
        return rank * (rows + columns) * self.min_compression_rate < rows * columns

    def _with_error_feedback(self, name: str, tensor: Tensor) -> Tensor:
        """Return a difference as a matrix, with what was not carried before."""
        matrix = tensor.reshape(len(tensor), -1).clone()
        error = self._errors.get(name)
        fits = error is not None and error.shape == matrix.shape  # the sync inside may reshape
        return matrix.add_(error) if fits and error is not None else matrix

    def _initial_q(self, name: str, matrix: Tensor) -> Tensor:
        """Return the Q of the last mean, or a random one."""
        shape = matrix.shape[1], min(self.rank, *matrix.shape)
        if name not in self._warm_starts or self._warm_starts[name].shape != shape:
            drawn = torch.Generator().manual_seed(derive_seed(*self.rng_key, name))
            first = torch.randn(shape, generator=drawn, dtype=torch.float64)
            self._warm_starts[name] = first.to(matrix)
        return self._warm_starts[name]

    def state(self) -> dict[str, Tensor]:
        """Return what was not carried, and the last Q."""
        errors = {f"error/{name}": each for name, each in self._errors.items()}
        return errors | {f"start/{name}": each for name, each in self._warm_starts.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        for name, each in state.items():
            kind, _, own = name.partition("/")
            (self._errors if kind == "error" else self._warm_starts)[own] = each.clone()
