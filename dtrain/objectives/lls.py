"""LLS: a block's output is compared with one fixed wave per class; nothing comes back.

Apolinario, Roy and Roy, "LLS: Local Learning Rule for Deep Neural Networks Inspired by Neural
Activity Synchronization", arXiv 2405.15868. With d numbers h of a sample, averaged down where an
image has more than `features`::

    f = h / |h|       S[c, t] = sin(w_c t)       t = 0 ... d - 1,  w_c = 50 ... 512 in equal steps
    G = f S^T         `lls`       nothing learns but the block
    G = f S^T * v     `lls-m`     v (C,) learns, too
    G = f S^T V       `lls-mxm`   V (C, C) learns, too             v and V start at 0.01 N(0, 1)
    loss = cross-entropy of softmax(G / temperature)

    x --> block 0 --h--> block 1 --h--> block 2 (own head)
             |              |
          f . waves      f . waves        nearly orthogonal: S S^T is about (d/2) I

The last block learns the true loss, so one block is ordinary backpropagation.

As in the authors' code t starts at 0, so the first number of a sample counts nothing. Unlike it,
waves are made in float64, since float32 loses 0.06 rad of w t = 1e6, and flat outputs are never
averaged. Temperature 1 is the default of the authors' layer, not of a published run.

Invariant: the waves follow from C and d alone; nobody draws or trains them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import pooling
from dtrain.objectives.common.aux_heads import AuxHead

Basis = Literal["sine", "square"]


MIN_FREQUENCY, MAX_FREQUENCY, INIT_STD = 50.0, 512.0, 0.01


WARN_CORRELATION = 0.5  # correlation of two classes' waves from which on a user is told


def waves(kind: Basis, classes: int, width: int) -> Tensor:
    """Return S (classes, width) in float64; "square" is the sign of "sine"."""
    frequencies = torch.linspace(MIN_FREQUENCY, MAX_FREQUENCY, classes, dtype=torch.float64)
    sines = torch.sin(torch.outer(frequencies, torch.arange(width, dtype=torch.float64)))
    return sines if kind == "sine" else sines.sign()


@final
class WaveHead(nn.Module):
    """From an output (rows, ...) to f S^T, modulated, over the temperature: (rows, classes)."""

    uses_rng = False
    identical_buffers = ("basis",)
    basis: Tensor

    def __init__(
        self, pool: nn.Module, basis: Tensor, temperature: float, modulation: Tensor | None
    ) -> None:
        super().__init__()
        self.pool, self.temperature = pool, temperature
        self.register_buffer("basis", basis)
        self.modulation = None if modulation is None else nn.Parameter(modulation)

    def forward(self, output: Tensor) -> Tensor:
        """Return G / temperature."""
        scores = normalize(self.pool(output)) @ self.basis.T
        if self.modulation is not None:
            times = torch.mul if self.modulation.dim() == 1 else torch.matmul
            scores = times(scores, self.modulation)
        return scores / self.temperature


@dataclass(frozen=True)
class LlsBase(AuxHead):
    """What the three have in common; prediction: last block, and the vote (sum).

    Parameters
    ----------
    basis : str
        "sine" or "square".
    temperature : float
        Divides the scores.
    features : int
        The most numbers of an image that are compared; flat outputs are whole.
    """

    basis: Basis = "sine"
    temperature: float = 1.0
    features: int = 2048

    def __post_init__(self) -> None:
        pooling.check_limit(self.features)
        if not self.temperature > 0:
            raise ConfigError(
                "todo.key", f"[objective] temperature = {self.temperature}: give a number above 0"
            )

    @abstractmethod
    def initial_modulation(self, classes: int) -> Tensor | None:
        """Return what multiplies the scores as it starts, drawn anew, or None."""

    def head_network(self, spec: BlockSpec) -> nn.Module:
        """Return the comparison with the waves."""
        basis = waves(self.basis, spec.classes, pooling.width(spec.output_shape, self.features))
        pool = pooling.make_pool(spec.output_shape, self.features)
        return WaveHead(pool, basis, self.temperature, self.initial_modulation(spec.classes))

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Tell of blocks so narrow that two classes' waves are much alike."""
        told = []
        for task in specs[:-1]:
            width = pooling.width(task.output_shape, self.features)
            unit = normalize(waves(self.basis, task.classes, width))
            most = float((unit @ unit.T).fill_diagonal_(0).abs().max())
            if most > WARN_CORRELATION:
                told.append(
                    f"block {task.index} tells {task.classes} classes apart by waves of {width} "
                    f"numbers, two of which correlate by {most:.2f}: widen it, or use mono-forward"
                )
        return told


@final
@dataclass(frozen=True)
class Lls(LlsBase):
    """Fixed waves alone: no parameters but the block's."""

    def initial_modulation(self, classes: int) -> Tensor | None:
        return None


@final
@dataclass(frozen=True)
class LlsM(LlsBase):
    """A learned factor per class."""

    def initial_modulation(self, classes: int) -> Tensor | None:
        return INIT_STD * torch.randn(classes)


@final
@dataclass(frozen=True)
class LlsMxM(LlsBase):
    """A learned matrix between waves and classes."""

    def initial_modulation(self, classes: int) -> Tensor | None:
        return INIT_STD * torch.randn(classes, classes)
