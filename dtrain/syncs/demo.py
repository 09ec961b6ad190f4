"""DeMo: decoupled momentum; replicas exchange only the top-k DCT coefficients of their momenta.

Per tensor, with a momentum d of each replica's own, lr and wd of ``[optimizer]``::

    d <- decay d + lr gradient                  in chunks of at most 64 x 64
    DCT of each chunk; its `keep` largest coefficients are sent to all, and taken out of d
    u = inverse DCT of the received ones, each averaged over the replicas that sent it
    w <- (1 - lr wd) w - lr sign(u)             replaces the optimizer's own step

Sends, over n replicas on m nodes, 6 min(keep, c) bytes per replica for each chunk of c elements.
(m - 1) n of these n messages go between nodes, and each rank receives those of all others, so
traffic grows with the number of replicas, as that of any all-gather. Staleness 0; coefficients that
are not sent stay in d.

Source: Peng et al. 2024, "DeMo: Decoupled Momentum Optimization", arXiv 2411.19870, and its code,
whose indices have eight bytes instead of two. Tensors of more than two dimensions are seen as
matrices, the first dimension against the rest. A prime side above 64 gives chunks of side 1.

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
from dtrain.syncs.base import (
    SyncTarget,
    SyncTraits,
    UpdateClock,
    add_prefix,
    clone_all,
    require_at_least,
    select_prefix,
)
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.common.local_updates import LocalUpdates
from dtrain.syncs.common.node_groups import NodeLeaders
from dtrain.syncs.gradient_reducer import WeightedGroup

INDEX_DTYPE = torch.int16
"""Holds an index into a chunk, of 64 x 64 elements at most."""


@final
@dataclass
class DeMo(LocalUpdates):
    """Decoupled momentum with signed steps.

    Attributes
    ----------
    decay : float
        Decay of the momentum per update (beta).
    keep : int
        Coefficients sent of each chunk (k).
    chunk : int
        The largest side of a chunk; sides divide those of the tensor.
    """

    decay: float = 0.999
    keep: int = 32
    chunk: int = 64

    def __post_init__(self) -> None:
        require_at_least("decay", self.decay, 0)
        require_at_least("keep", self.keep, 1)
        require_at_least("chunk", self.chunk, 1)
        self._momenta: dict[str, Tensor] = {}

    def traits(self) -> SyncTraits:
        """Return traits of a lossy sync with an optimizer step of its own."""
        return SyncTraits(
            replicas_diverge=True,  # by their momenta
            state_diverges=True,
            lossy=True,
            parameter_copies=1,
            replaces_optimizer=True,
            keeps_no_optimizer_state=True,
            compressible=False,
        )

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Attach the sync to a block, and group its replicas. Collective over the replicas."""
        super().setup(block, replicas, compressor)
        self._leaders = NodeLeaders(replicas)

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """Return True: every replica steps by the coefficients of all."""
        return True

    def communication_cost(self) -> tuple[float, float]:
        """Return the bytes of coefficients over those of a mean in float32."""
        fraction = 6 * self.keep / (4 * self.chunk**2)
        return fraction, fraction

    def averaging_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return all replicas."""
        return WeightedGroup(self.replicas, weight)

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Replace the gradients by the signs of the mean coefficients. Collective over replicas."""
        if not gradients:
            return
        named = self.block.name_gradients(gradients)
        sent = []
        for name, gradient in named.items():
            momentum = self._momenta.setdefault(name, torch.zeros_like(gradient))
            momentum.mul_(self.decay).add_(gradient, alpha=clock.lr)
            sent.append(self._extract_top_k(ChunkedDCT(gradient.shape, self.chunk), momentum))
        message = torch.cat([part.view(torch.uint8) for pair in sent for part in pair])
        messages = self._leaders.allgather_bytes(message)
        start = 0
        for (indices, values), gradient in zip(sent, named.values(), strict=True):
            middle = start + indices.nbytes
            end = middle + values.nbytes
            contributions = [
                (
                    data[start:middle].clone().view(INDEX_DTYPE),
                    data[middle:end].clone().view(torch.float32),
                )
                for data in messages
            ]
            dct = ChunkedDCT(gradient.shape, self.chunk)
            mean = self._mean_coefficients(dct, contributions, gradient)
            gradient.copy_(dct.inverse_dct(mean).sign())
            start = end

    def _extract_top_k(self, dct: ChunkedDCT, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """Take the largest coefficients out of a momentum; return indices and values, flat."""
        coefficients = dct.dct(momentum)
        count = min(self.keep, coefficients.shape[1])
        indices = coefficients.abs().topk(count, dim=1, sorted=False).indices
        values = coefficients.gather(1, indices).to(torch.float32)
        extracted = torch.zeros_like(coefficients).scatter_(
            1, indices, values.to(coefficients.dtype)
        )
        momentum.sub_(dct.inverse_dct(extracted))
        return indices.to(INDEX_DTYPE).view(-1), values.view(-1)

    def _mean_coefficients(
        self, dct: ChunkedDCT, contributions: Sequence[tuple[Tensor, Tensor]], like: Tensor
    ) -> Tensor:
        """Return the received coefficients, each averaged over the replicas that sent it."""
        total = like.new_zeros(dct.count, dct.size)
        senders = torch.zeros_like(total)
        for flat_indices, values in contributions:
            indices = flat_indices.view(dct.count, -1).long()
            total.scatter_add_(1, indices, values.view(indices.shape).to(total.dtype))
            senders.scatter_add_(1, indices, senders.new_ones(indices.shape))
        return total.div_(senders.clamp_(min=1))

    def optimizer_step(self, clock: UpdateClock) -> OptimizerStep | None:
        """Return the signed step, in every update."""
        return sign_sgd_step

    def after_update(self, clock: UpdateClock) -> None:
        """Do nothing: equal signs moved equal parameters."""

    def state(self) -> dict[str, Tensor]:
        """Return this replica's momenta."""
        return super().state() | add_prefix("momentum/", self._momenta)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load this replica's momenta."""
        super().restore(state)
        self._momenta = clone_all(select_prefix(state, "momentum/"))


def sign_sgd_step(optimizer: optim.Optimizer) -> None:
    """Step by -lr times the gradients, which are signs, with decoupled weight decay."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            lr, decay = group["lr"], group.get("weight_decay", 0)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - lr * decay).sub_(parameter.grad, alpha=lr)


@final
class ChunkedDCT:
    """The discrete cosine transform of a tensor in chunks of at most `side` x `side`.

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
        self.count = math.prod(self.grid)
        self.size = math.prod(self.sides)

    def dct(self, tensor: Tensor) -> Tensor:
        """Return the coefficients (count, size) of the DCT (type II) of each chunk."""
        (height, width), (rows, columns) = self.sides, self.grid
        chunks = tensor.reshape(rows, height, columns, width).transpose(1, 2)
        left, right = dct_matrix(height).to(tensor), dct_matrix(width).to(tensor)
        return (left @ chunks @ right.T).reshape(self.count, -1)

    def inverse_dct(self, coefficients: Tensor) -> Tensor:
        """Return the tensor with these coefficients (count, size)."""
        (height, width), (rows, columns) = self.sides, self.grid
        chunks = coefficients.view(rows, columns, height, width)
        left, right = dct_matrix(height).to(coefficients), dct_matrix(width).to(coefficients)
        return (left.T @ chunks @ right).transpose(1, 2).reshape(self.shape)


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number up to a limit.

    >>> [largest_divisor(number, 64) for number in (64, 1000, 61, 67, 3072)]
    [64, 50, 61, 1, 64]
    """
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


@cache
def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal matrix (size, size) of the DCT (type II), in float64."""
    row, column = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    matrix = torch.cos(math.pi * (2 * column + 1) * row / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
