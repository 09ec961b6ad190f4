"""ULR, the unified likelihood ratio: a block learns from losses that it measures with noise.

Jiang et al. 2023, "One Forward is Enough for Neural Network Training via Likelihood Ratio Method",
arXiv 2305.08960. Noise sigma v of variance sigma^2 is added to the pre-activations, and no
derivative of the block or of its head is needed::

    g = (l(z + sigma v) - l(z)) / sigma              v       with `baseline`
    g = (l(z + sigma v) - l(z - sigma v)) / (2 sigma) v      `antithetic`
    g =  l(z + sigma v) / sigma                      v       neither: the paper's plain form

E g is the gradient of the loss that noise smooths, which differs from grad l by O(sigma^2); for a
quadratic loss it is grad l. The baseline and the pairs do not change E g. Without either, the
variance contains l^2 / sigma^2, which hides the gradient. With both keys set the baseline cancels.
As in `common/perturbed_heads` a module learns from its own input, here that of the forward without
noise; the paper's is noisy, which changes E g by O(sigma^2), too.

The last block measures the model's loss, so one block is not ordinary backpropagation.

Invariant: no gradient is passed from module to module, so layers need not be differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.common.field_checks import check_scale
from dtrain.objectives.common.perturbed_heads import PerturbedForward, PerturbedHead


@final
@dataclass(frozen=True)
class Ulr(PerturbedHead):
    """Likelihood ratios of a head's loss. The last block predicts; the vote is the sum of the
    scores.

    Parameters
    ----------
    noise : float
        sigma: standard deviation of the noise at the pre-activations.
    antithetic : bool
        Whether every noise is used with both signs, at the cost of a further forward.
    baseline : bool
        Whether the loss without noise is subtracted.

    Raises
    ------
    ConfigError
        `noise` is not a finite number above 0.
    """

    noise: float = 0.1
    antithetic: bool = False
    baseline: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.noise, default=0.1, key="noise")

    @property
    def extra_forwards(self) -> int:
        """Return 1 for each perturbation, or 2 for a pair."""
        return (1 + self.antithetic) * self.perturbations

    def loss_changes(
        self, forward: PerturbedForward, noise: Mapping[str, Tensor], micro_batch: MicroBatch
    ) -> Tensor:
        """Return the difference (rows,) of each sample's own loss, over sigma."""

        targets, weights = micro_batch.targets, micro_batch.weights

        @torch.no_grad()
        def losses(output: Tensor) -> Tensor:
            return micro_batch.task.sample_losses(output, targets, weights)

        def noisy(factor: float) -> Tensor:
            return losses(forward(lambda name, z: z + factor * noise[name] if name in noise else z))

        if self.antithetic:
            return (noisy(self.noise) - noisy(-self.noise)) / (2 * self.noise)
        baseline = losses(forward.clean_prediction()) if self.baseline else 0.0
        return (noisy(self.noise) - baseline) / self.noise
