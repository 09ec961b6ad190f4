"""A small net that guesses the gradient at a block's output, and remembers what it guessed from.

::

    y (rows, ...) , one-hot label  ---- hidden layers ---- last layer, at first zero ---- guess

Invariant: what it remembers is asked for again inside its segment or never, so no checkpoint holds
it; it is as much as the outputs of `lag` updates.
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from dtrain.live import Live


class Past(NamedTuple):
    """What is kept of a micro-batch: its output, its labels, the samples of its whole update."""

    y: Tensor
    targets: Tensor
    rows: int


@final
class Synthesiser(nn.Module):
    """Guesses gradients (rows, ...) from outputs of the same shape; 3x3 convolutions for images.

    Parameters
    ----------
    outputs : tuple of int
        Shape of one sample.
    classes : int
        Label inputs; 0: it does not look at labels.
    hidden : int
        Layers, each as wide as the output, before the last one.
    """

    draws = False

    def __init__(self, outputs: tuple[int, ...], classes: int, hidden: int) -> None:
        super().__init__()
        self.outputs, self.classes, self.past = outputs, classes, dict[tuple[int, int], Past]()
        image = len(outputs) == 3
        width = outputs[0] if image else math.prod(outputs)
        layers: list[nn.Module] = []
        for inner in range(hidden + 1):
            wide = width + (0 if inner else classes)
            layer = nn.Conv2d(wide, width, 3, padding=1) if image else nn.Linear(wide, width)
            layers += [layer, nn.ReLU()]
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, y: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the guess for outputs `y` of samples with labels `targets`, by default none."""
        h = y if len(self.outputs) == 3 else y.flatten(1)
        if self.classes:
            known = h.new_zeros(len(h), self.classes)
            if targets is not None:
                known = one_hot(targets, self.classes).to(h.dtype)
            known = known.reshape(*known.shape, *[1] * (h.dim() - 2))
            h = torch.cat([h, known.expand(-1, -1, *h.shape[2:])], 1)
        made: Tensor = self.layers(h)
        return made.view_as(y)

    @property
    def kept(self) -> list[Tensor]:
        """What it keeps from update to update, beside its parameters."""
        return [past.y for past in self.past.values()]

    def recall(self, live: Live, lag: int) -> Past | None:
        """Keep a micro-batch, and return the one of that number `lag` updates ago, if any."""
        now = Past(live.y.detach(), live.targets, live.draws.rows)
        update, micro = (*live.draw, 0, 0)[:2]
        self.past[update, micro] = now
        for key in [key for key in self.past if key[0] < update - lag]:  # nobody asked for it
            del self.past[key]
        # A plan that counts memory asks before there is a past; a run does not.
        return self.past.pop((update - lag, micro), now if update < lag else None)
