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

from dtrain.block import Block
from dtrain.errors import Refusal
from dtrain.live import Live
from dtrain.objectives.parts.informed import Informed
from dtrain.objectives.task import Task

PARTNERS = 4
"""Samples of a class in a micro-batch below which contrasts teach little."""


@final
@dataclass(frozen=True)
class InfoPro(Informed):
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
            raise Refusal(f"[objective] temperature = {self.temperature}: give more than 0")
        if self.features < 1:
            raise Refusal(f"[objective] features = {self.features}: give at least 1")

    def path(self, task: Task) -> tuple[nn.Module, tuple[int, ...]]:
        """Features are what leaves the block."""
        return nn.Identity(), task.outputs

    def scores(self, task: Task) -> int:
        """Return the classes, or the length of what is contrasted."""
        return task.classes if self.loss == "ce" else self.features

    def classification(self, task: Task, made: Tensor, live: Live) -> tuple[str, Tensor]:
        """Return L_y."""
        if self.loss == "ce":
            return super().classification(task, made, live)
        return "contrast", contrast(normalize(made), live.targets, self.temperature)

    def couples(self, task: Task) -> bool:
        """Contrasts are between samples."""
        return self._contrasts(task)

    def predict(self, task: Task, block: Block, live: Live) -> Tensor | None:
        """Return the class scores (rows, classes), None where there are contrasts instead."""
        return None if self._contrasts(task) else super().predict(task, block, live)

    def cautions(self, tasks: Sequence[Task], rows: int) -> list[str]:
        """Tell of classes with too few samples to be contrasted."""
        contrasted = [task.block for task in tasks if self._contrasts(task)]
        expected = rows / tasks[0].classes
        if not contrasted or expected >= PARTNERS:
            return []
        return [
            f"contrasts between {rows} samples of {tasks[0].classes} classes: {expected:.1f} of a "
            f"class expected in a micro-batch, {PARTNERS} or more teach better: give micro-batches "
            f'of {PARTNERS * tasks[0].classes} samples, or loss = "ce"'
        ]

    def _contrasts(self, task: Task) -> bool:
        return self.loss == "contrast" and not task.last and self.lambdas(task)[1] > 0


def contrast(z: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss of z (rows, features), each of length 1."""
    alone = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(alone, -torch.inf)
    chances = logits.log_softmax(1).masked_fill(alone, 0)
    partners = (targets[:, None] == targets) & ~alone
    number = partners.sum(1).clamp(min=1)
    return -((chances * partners).sum(1) / number).mean()
