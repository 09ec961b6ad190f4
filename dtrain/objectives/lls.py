"""LLS: a block's output is compared with one fixed wave per class; nothing is sent back.

Apolinario, Roy and Roy, "LLS: Local Learning Rule for Deep Neural Networks Inspired by Neural
Activity Synchronization", arXiv 2405.15868. With the d numbers h of a sample, averaged down where
an image has more than `features`::

    f = h / |h|       S[c, t] = sin(w_c t)       t = 0 ... d - 1,  w_c = 50 ... 512 in equal steps
    G = f S^T         `lls`       only the block learns
    G = f S^T * v     `lls-m`     v (C,) learns, too
    G = f S^T V       `lls-mxm`   V (C, C) learns, too             v and V start at 0.01 N(0, 1)
    loss = cross-entropy of softmax(G / temperature)

    x --> block 0 --h--> block 1 --h--> block 2 (own head)
             |              |
          f . waves      f . waves        nearly orthogonal: S S^T is about (d/2) I

The last block learns the cross-entropy of the model's own head, so one block is ordinary
backpropagation.

As in the authors' code t starts at 0, so the first number of a sample has no effect. Unlike there,
waves are computed in float64, since float32 loses 0.06 rad of w t = 1e6, and flat outputs are never
averaged. Temperature 1 is the default of the authors' layer, not of a published run.

Invariant: the waves are a function of C and d alone; they are neither random nor trained.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import pooling
from dtrain.objectives.common.aux_heads import AuxHead
from dtrain.objectives.common.field_checks import check_temperature
from dtrain.tasks.task import Task

Basis = Literal["sine", "square"]


MIN_FREQUENCY, MAX_FREQUENCY, INIT_STD = 50.0, 512.0, 0.01


WARN_CORRELATION = 0.5
"""Correlation of the waves of two classes above which the run warns."""


@dataclass(frozen=True)
class LlsBase(AuxHead):
    """Base of the three variants. The last block predicts; the vote is the sum of the scores.

    Parameters
    ----------
    basis : str
        "sine" or "square".
    temperature : float
        Divisor of the scores, above 0.
    features : int
        Largest number of features of an image; flat outputs enter whole.

    Raises
    ------
    ConfigError
        `temperature` or `features` is out of range.
    """

    basis: Basis = "sine"
    temperature: float = 1.0
    features: int = 2048

    def __post_init__(self) -> None:
        pooling.check_limit(self.features)
        check_temperature(self.temperature)

    def serves(self, task: Task) -> str | None:
        """Return None where samples have classes: a wave belongs to a class."""
        has_waves = task.has_classes and not task.has_positions
        return None if has_waves else "needs classes, one prediction per sample"

    @abstractmethod
    def initial_modulation(self, classes: int) -> Tensor | None:
        """Return the initial factor of the scores, (C,) or (C, C), newly drawn, or None."""

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the comparison with the waves."""
        basis = waves(self.basis, block.classes, pooling.width(block.output_shape, self.features))
        pool = pooling.make_pool(block.output_shape, self.features)
        return WaveHead(pool, basis, self.temperature, self.initial_modulation(block.classes))

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn of blocks so narrow that the waves of two classes correlate."""
        warnings = []
        for spec in specs[:-1]:
            width = pooling.width(spec.output_shape, self.features)
            unit = normalize(waves(self.basis, spec.classes, width))
            largest = float((unit @ unit.T).fill_diagonal_(0).abs().max())
            if largest > WARN_CORRELATION:
                warnings.append(
                    f"block {spec.index} separates {spec.classes} classes by waves of {width} "
                    f"numbers, two of which correlate by {largest:.2f}: widen the block, or use "
                    "mono-forward"
                )
        return warnings


@final
@dataclass(frozen=True)
class Lls(LlsBase):
    """Fixed waves only; the head has no parameters."""

    def initial_modulation(self, classes: int) -> Tensor | None:
        return None


@final
@dataclass(frozen=True)
class LlsM(LlsBase):
    """A trained factor per class."""

    def initial_modulation(self, classes: int) -> Tensor | None:
        return INIT_STD * torch.randn(classes)


@final
@dataclass(frozen=True)
class LlsMxM(LlsBase):
    """A trained matrix between waves and classes."""

    def initial_modulation(self, classes: int) -> Tensor | None:
        return INIT_STD * torch.randn(classes, classes)


@final
class WaveHead(nn.Module):
    """The scores (rows, classes) of an output (rows, ...): f S^T, modulated, over the
    temperature."""

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


def waves(kind: Basis, classes: int, width: int) -> Tensor:
    """Return S (classes, width) in float64; "square" is the sign of "sine"."""
    frequencies = torch.linspace(MIN_FREQUENCY, MAX_FREQUENCY, classes, dtype=torch.float64)
    sines = torch.sin(torch.outer(frequencies, torch.arange(width, dtype=torch.float64)))
    return sines if kind == "sine" else sines.sign()
