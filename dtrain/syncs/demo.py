"""DeMo: replicas keep their momentum to themselves and tell each other its largest waves only.

Per tensor, with a momentum d of each replica's own, lr and wd of ``[optimizer]``::

    d <- decay d + lr gradient                  cut into chunks of at most 64 a side
    DCT of each chunk, its `keep` largest coefficients: told to all, and taken out of d
    u = inverse DCT of what was told, each coefficient averaged over those who told it
    w <- (1 - lr wd) w - lr sign(u)             the optimizer's own rule is not used

Sends, over n replicas on m nodes, for each chunk of c elements 6 min(keep, c) bytes per replica:
of n such messages (m - 1) n go between nodes, and each rank gets all others'. Staleness 0; what is
not told stays in d. It grows with the number of replicas, as any gather does.

Source: Peng et al. 2024, "DeMo: Decoupled Momentum Optimization", arXiv 2411.19870, and its code,
whose indices are eight bytes long, two here. Tensors of more than two dimensions are seen as
matrices, the first dimension against the rest. A prime side above 64 has chunks of one element.

Invariant: weights are equal on all replicas, since all add up the same messages in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor, optim

from dtrain.block.block import OptimizerStep
from dtrain.comm.communicator import Comm
from dtrain.syncs.base import SyncTarget, UpdateClock, require_at_least, select_prefix
from dtrain.syncs.common.local_updates import LocalUpdates
from dtrain.syncs.common.node_groups import NodeLeaders

INDEX_DTYPE = torch.int16
"""A chunk has 64 x 64 elements at most."""


@final
@dataclass
class DeMo(LocalUpdates):
    """Decoupled momentum; it replaces the optimizer's rule.

    Attributes
    ----------
    decay : float
        Of the momentum (beta).
    keep : int
        Coefficients told of each chunk (k).
    chunk : int
        Largest side of a chunk; sides divide those of the tensor.
    """

    lossy = True
    parameter_copies = 1
    replaces_optimizer = keeps_no_optimizer_state = True
    compressible = False
    decay: float = 0.999
    keep: int = 32
    chunk: int = 64

    def __post_init__(self) -> None:
        require_at_least("decay", self.decay, 0)
        require_at_least("keep", self.keep, 1)
        require_at_least("chunk", self.chunk, 1)
        self._momenta: dict[str, Tensor] = {}

    def setup(self, block: SyncTarget, replicas: Comm) -> None:
        """Take the block and its replicas, by node. Collective."""
        super().setup(block, replicas)
        self._node_leaders = NodeLeaders(replicas)

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """Every replica steps, by what all have told."""
        return True

    def communication_cost(self) -> tuple[float, float]:
        """A chunk of 64 x 64 in 6 bytes per coefficient, where a mean needs 16 kB, twice a half."""
        part = 6 * self.keep / (4 * self.chunk**2)
        return part, part

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Replace the gradients by the signs of what all told. Collective."""
        named = self.block.name_gradients(gradients)
        if not named:
            return
        told = []
        for name, each in named.items():
            momentum = self._momenta.setdefault(name, torch.zeros_like(each))
            momentum.mul_(self.decay).add_(each, alpha=clock.lr)
            told.append(self._extract_top_k(ChunkedDCT(each.shape, self.chunk), momentum))
        found = self._node_leaders.allgather_bytes(
            torch.cat([part.view(torch.uint8) for p in told for part in p])
        )
        start = 0
        for (places, values), each in zip(told, named.values(), strict=True):
            middle = start + places.nbytes
            end = middle + values.nbytes
            parts = [
                (
                    d[start:middle].clone().view(INDEX_DTYPE),
                    d[middle:end].clone().view(torch.float32),
                )
                for d in found
            ]
            chunks = ChunkedDCT(each.shape, self.chunk)
            each.copy_(chunks.inverse_dct(self._mean_coefficients(chunks, parts, each)).sign())
            start = end

    def _extract_top_k(self, chunks: ChunkedDCT, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """Take the largest coefficients out of a momentum; return places and values, flat."""
        waves = chunks.dct(momentum)
        count = min(self.keep, waves.shape[1])
        places = waves.abs().topk(count, dim=1, sorted=False).indices
        values = waves.gather(1, places).to(torch.float32)
        kept = torch.zeros_like(waves).scatter_(1, places, values.to(waves.dtype))
        momentum.sub_(chunks.inverse_dct(kept))
        return places.to(INDEX_DTYPE).view(-1), values.view(-1)

    def _mean_coefficients(
        self, chunks: ChunkedDCT, contributions: Sequence[tuple[Tensor, Tensor]], like: Tensor
    ) -> Tensor:
        """Return the coefficients that replicas told, averaged over those who told them."""
        total = like.new_zeros(chunks.count, chunks.size)
        tellers = torch.zeros_like(total)
        for places, values in contributions:
            rows = places.view(chunks.count, -1).long()
            total.scatter_add_(1, rows, values.view(rows.shape).to(total.dtype))
            tellers.scatter_add_(1, rows, tellers.new_ones(rows.shape))
        return total.div_(tellers.clamp_(min=1))

    def optimizer_step(self, clock: UpdateClock) -> OptimizerStep | None:
        """Its own, always."""
        return sign_sgd_step

    def after_update(self, clock: UpdateClock) -> None:
        """Nothing: equal signs moved equal parameters."""

    def state(self) -> dict[str, Tensor]:
        """Return this replica's momenta."""
        return super().state() | {f"momentum/{name}": t for name, t in self._momenta.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        super().restore(state)
        self._momenta = {name: t.clone() for name, t in select_prefix(state, "momentum/").items()}


def sign_sgd_step(optimizer: optim.Optimizer) -> None:
    """Move against the signs; weight decay as the optimizer's groups have it."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            rate, decay = group["lr"], group.get("weight_decay", 0)
            for each in group["params"]:
                if each.grad is not None:
                    each.mul_(1 - rate * decay).sub_(each.grad, alpha=rate)


@final
class ChunkedDCT:
    """How a tensor of a shape is cut into chunks of at most `side` by `side`.

    Attributes
    ----------
    count, size : int
        Chunks, and elements of each.
    """

    def __init__(self, shape: Sequence[int], side: int) -> None:
        self.shape = tuple(shape)
        rows = shape[0] if len(shape) > 1 else 1
        columns = math.prod(shape[1:] if len(shape) > 1 else shape)
        self.sides = largest_divisor(rows, side), largest_divisor(columns, side)
        self.grid = rows // self.sides[0], columns // self.sides[1]
        self.count, self.size = math.prod(self.grid), math.prod(self.sides)

    def dct(self, tensor: Tensor) -> Tensor:
        """Return the coefficients (count, size) of the type II cosine transform of each chunk."""
        (a, b), (rows, columns) = self.sides, self.grid
        cut = tensor.reshape(rows, a, columns, b).transpose(1, 2)
        return (dct_matrix(a).to(tensor) @ cut @ dct_matrix(b).to(tensor).T).reshape(self.count, -1)

    def inverse_dct(self, coefficients: Tensor) -> Tensor:
        """Return the tensor of which these are the coefficients."""
        (a, b), (rows, columns) = self.sides, self.grid
        cut = (
            dct_matrix(a).to(coefficients).T
            @ coefficients.view(rows, columns, a, b)
            @ dct_matrix(b).to(coefficients)
        )
        return cut.transpose(1, 2).reshape(self.shape)


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor up to `most`.

    >>> [divisor(number, 64) for number in (64, 1000, 61, 67, 3072)]
    [64, 50, 61, 1, 64]
    """
    return next(each for each in range(min(number, limit), 0, -1) if number % each == 0)


@cache
def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal matrix of the type II discrete cosine transform, in float64."""
    row, column = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    matrix = torch.cos(math.pi * (2 * column + 1) * row / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
