"""InfoPro, information propagation: an earlier block reconstructs the sample and classifies it.

Wang, Ni, Song, Yang and Huang, "Revisiting locally supervised learning: an alternative to
end-to-end training", ICLR 2021, arXiv 2101.10832::

    loss_k = lambda1 reconstruction(decoder(h_k)) + lambda2 L_y(head(h_k)),   k = 0 ... K - 2

L_y is softmax cross-entropy, or the supervised contrastive loss (Khosla et al., arXiv 2004.11362)
of the head's output z, normalised to length 1, P(i) being the other rows with the label of row i::

    L_y = - mean over i of  1/|P(i)| sum over p in P(i) of
              log( exp(z_i z_p / T) / sum over a != i of exp(z_i z_a / T) )

A row without a partner adds 0, as in the authors' code.

Defaults: `lambda-first`, the only pair of two blocks, is the authors' (5, 0.5) for two blocks.
`lambda-last` is the end, (0.5, 1), of theirs for 16 blocks, so that early blocks keep information
and late ones classify. Theirs for ResNet-110 on CIFAR-10: [1, 0] to [0, 1] with 4 blocks, [5, 0] to
[0.5, 1] with 16, and "contrast" at 1024 samples.

Invariant: the activations are those of the model alone, so the exported model is the trained one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import needs_labels
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import pooling
from dtrain.objectives.common.field_checks import check_temperature
from dtrain.objectives.common.reconstruction import Reconstruction
from dtrain.tasks.task import Task

MIN_SAMPLES_PER_CLASS = 4
"""Samples of a class in a micro-batch below which the contrastive loss teaches little."""


@final
@dataclass(frozen=True)
class InfoPro(Reconstruction):
    """Reconstruction and a classification loss. The last block predicts; the vote is the sum of the
    scores.

    Parameters
    ----------
    loss : str
        L_y: "ce", or "contrast", which couples the samples of a micro-batch and leaves an earlier
        block without class scores.
    temperature : float
        T of "contrast", above 0.
    features : int
        Length of z of "contrast".

    Raises
    ------
    ConfigError
        A pair of lambdas, `temperature` or `features` is out of range.
    """

    loss: Literal["ce", "contrast"] = "ce"
    temperature: float = 0.07
    features: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)
        pooling.check_limit(self.features)

    def serves(self, task: Task) -> str | None:
        """Return None, unless a contrastive loss needs labels."""
        return super().serves(task) if self.loss == "ce" else needs_labels(task)

    def feature_path(self, spec: BlockSpec) -> tuple[nn.Module, tuple[int, ...]]:
        """Return the identity: the features are the block's output."""
        return nn.Identity(), spec.output_shape

    def head_width(self, spec: BlockSpec) -> int:
        """Return the number of classes, or the length of z."""
        return spec.classes if self.loss == "ce" else self.features

    def classification_loss(
        self, spec: BlockSpec, head_output: Tensor, micro_batch: MicroBatch
    ) -> tuple[str, Tensor]:
        """Return L_y."""
        if self.loss == "ce":
            return super().classification_loss(spec, head_output, micro_batch)
        return "contrast", contrastive_loss(
            normalize(head_output), micro_batch.targets, self.temperature
        )

    def couples_samples(self, spec: BlockSpec) -> bool:
        """Whether the block has a contrastive loss."""
        return self._is_contrastive(spec)

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor | None:
        """Return the class scores (rows, classes), or None with a contrastive loss."""
        return None if self._is_contrastive(spec) else super().predict(spec, block, micro_batch)

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn of too few samples of a class in a micro-batch for the contrastive loss."""
        expected = rows / specs[0].classes
        contrastive = any(self._is_contrastive(spec) for spec in specs)
        if not contrastive or expected >= MIN_SAMPLES_PER_CLASS:
            return []
        return [
            f"contrasts between {rows} samples of {specs[0].classes} classes: {expected:.1f} per "
            f"class in a micro-batch, while {MIN_SAMPLES_PER_CLASS} or more teach better; use "
            f"micro-batches of {MIN_SAMPLES_PER_CLASS * specs[0].classes} samples, or set "
            'loss = "ce"'
        ]

    def _is_contrastive(self, spec: BlockSpec) -> bool:
        return self.loss == "contrast" and not spec.is_last and self.lambdas(spec)[1] > 0


def contrastive_loss(z: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss () of z (rows, features), each of length 1, with
    labels (rows,)."""
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_probabilities = logits.log_softmax(1).masked_fill(itself, 0)
    partners = (targets[:, None] == targets) & ~itself
    counts = partners.sum(1).clamp(min=1)
    return -((log_probabilities * partners).sum(1) / counts).mean()
