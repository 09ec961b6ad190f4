"""InfoPro: an earlier block keeps what it knows of the sample, and tells classes apart.

Wang, Ni, Song, Yang and Huang, "Revisiting locally supervised learning: an alternative to
end-to-end training", ICLR 2021, arXiv 2101.10832::

    loss_k = lambda1 reconstruction(decoder(h_k)) + lambda2 L_y(head(h_k)),   k = 0 ... K - 2

L_y is softmax cross-entropy, or supervised contrastive (Khosla et al., arXiv 2004.11362) on the
head's output z, normalised to length 1, P(i) being the other rows with the label of row i::

    L_y = - mean over i of  1/|P(i)| sum over p in P(i) of
              log( exp(z_i z_p / T) / sum over a != i of exp(z_i z_a / T) )

A row without a partner adds 0, as in the authors' code.

Defaults: `lambda-first`, which two blocks have alone, is the authors' (5, 0.5) for two blocks;
`lambda-last` is the end, (0.5, 1), of theirs for 16, so that early blocks keep information and late
ones classify. Theirs for ResNet-110 on CIFAR-10: [1, 0] to [0, 1] with 4 blocks, [5, 0] to
[0.5, 1] with 16, and "contrast" at 1024 samples.

Invariant: nothing is added to the stream, so the net that is exported is the net that was trained.
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
from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.reconstruction import Reconstruction

MIN_SAMPLES_PER_CLASS = 4
"""Samples of a class in a micro-batch below which contrasts teach little."""


@final
@dataclass(frozen=True)
class InfoPro(Reconstruction):
    """Reconstruction and a loss of the label; prediction: last block, and the vote (sum).

    Parameters
    ----------
    loss : str
        L_y: "ce", or "contrast", which couples the samples of a micro-batch and leaves an earlier
        block without class scores.
    temperature : float
        T, of "contrast".
    features : int
        Of "contrast": length of z.
    """

    loss: Literal["ce", "contrast"] = "ce"
    temperature: float = 0.07
    features: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(
                "todo.key", f"[objective] temperature = {self.temperature}: give more than 0"
            )
        if self.features < 1:
            raise ConfigError(
                "todo.key", f"[objective] features = {self.features}: give at least 1"
            )

    def feature_path(self, spec: BlockSpec) -> tuple[nn.Module, tuple[int, ...]]:
        """Features are what leaves the block."""
        return nn.Identity(), spec.output_shape

    def head_width(self, spec: BlockSpec) -> int:
        """Return the classes, or the length of what is contrasted."""
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
        """Contrasts are between samples."""
        return self._is_contrastive(spec)

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor | None:
        """Return the class scores (rows, classes), None where there are contrasts instead."""
        return None if self._is_contrastive(spec) else super().predict(spec, block, micro_batch)

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Tell of classes with too few samples to be contrasted."""
        contrasted = [task.index for task in specs if self._is_contrastive(task)]
        expected = rows / specs[0].classes
        if not contrasted or expected >= MIN_SAMPLES_PER_CLASS:
            return []
        return [
            f"contrasts between {rows} samples of {specs[0].classes} classes: {expected:.1f} of a "
            f"class expected in a micro-batch, {MIN_SAMPLES_PER_CLASS} or more teach better: give micro-batches "
            f'of {MIN_SAMPLES_PER_CLASS * specs[0].classes} samples, or loss = "ce"'
        ]

    def _is_contrastive(self, spec: BlockSpec) -> bool:
        return self.loss == "contrast" and not spec.is_last and self.lambdas(spec)[1] > 0


def contrastive_loss(z: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss of z (rows, features), each of length 1."""
    alone = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(alone, -torch.inf)
    chances = logits.log_softmax(1).masked_fill(alone, 0)
    partners = (targets[:, None] == targets) & ~alone
    number = partners.sum(1).clamp(min=1)
    return -((chances * partners).sum(1) / number).mean()
