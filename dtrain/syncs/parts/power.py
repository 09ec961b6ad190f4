"""Power: matrices as products of two thin ones, by one step of a power iteration per mean.

Invariant: what a mean has not carried is kept by who had it, and sent with the next one: the sum of
all that was applied, plus the mean of what is kept, is the sum of all that was to be sent.

::

    M_r = difference + e_r    P = mean M_r Q    P orthonormal    Q = mean M_r' P    out = P Q'
                                                                 e_r = M_r - out

Sends two means, one after the other: of P and all that is not worth it, as it is, then of Q.

Source: Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", arXiv 1905.13727, and the hook of the same name in torch: what it calls a minimum
compression rate is `worth`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from dtrain.comm.comm import Comm
from dtrain.seeds import key
from dtrain.syncs.parts.carrier import Carrier, Land


@final
class Power(Carrier):
    """Low rank with error feedback and a warm start.

    Parameters
    ----------
    rank : int
        Columns of P and Q.
    worth : float
        A tensor travels as it is unless it is so many times its factors.
    own : tuple of int or str
        Keys the first Q, the same on all ranks.
    """

    def __init__(self, rank: int, worth: float, own: tuple[int | str, ...]) -> None:
        self.rank, self.worth, self.own = rank, worth, own
        self._errors: dict[str, Tensor] = {}
        self._starts: dict[str, Tensor] = {}

    def begin(self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int) -> Land:
        """Start the mean of P, and of what travels as it is."""
        if group.nodes == 1 or not tensors:
            return group.imean_(tensors, weight).wait
        thin = {name: each for name, each in tensors.items() if self.thins(each)}
        matrices = {name: self._missed(name, each) for name, each in thin.items()}
        left = {name: each @ self._start(name, each) for name, each in matrices.items()}
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
                self._starts[name] = right[name]
                each.copy_(out.view(each.shape))

        return land

    def thins(self, tensor: Tensor) -> bool:
        """Say whether a tensor travels as factors."""
        if tensor.dim() < 2:
            return False
        rows, columns = len(tensor), tensor.numel() // max(len(tensor), 1)
        rank = min(self.rank, rows, columns)
        return rank * (rows + columns) * self.worth < rows * columns

    def _missed(self, name: str, tensor: Tensor) -> Tensor:
        """Return a difference as a matrix, with what was not carried before."""
        matrix = tensor.reshape(len(tensor), -1).clone()
        error = self._errors.get(name)
        fits = error is not None and error.shape == matrix.shape  # the sync inside may reshape
        return matrix.add_(error) if fits and error is not None else matrix

    def _start(self, name: str, matrix: Tensor) -> Tensor:
        """Return the Q of the last mean, or a random one."""
        shape = matrix.shape[1], min(self.rank, *matrix.shape)
        if name not in self._starts or self._starts[name].shape != shape:
            drawn = torch.Generator().manual_seed(key(*self.own, name))
            first = torch.randn(shape, generator=drawn, dtype=torch.float64)
            self._starts[name] = first.to(matrix)
        return self._starts[name]

    def state(self) -> dict[str, Tensor]:
        """Return what was not carried, and the last Q."""
        errors = {f"error/{name}": each for name, each in self._errors.items()}
        return errors | {f"start/{name}": each for name, each in self._starts.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        for name, each in state.items():
            kind, _, own = name.partition("/")
            (self._errors if kind == "error" else self._starts)[own] = each.clone()
