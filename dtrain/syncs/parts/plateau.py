"""Plateau: whether a loss has stopped to fall, as heat's `DetectMetricPlateau` tells it.

Invariant: a pure function of the losses heard so far; the best one is kept when it fires.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import final


@final
@dataclass
class Plateau:
    """Fires on the third epoch in a row that does not improve on the best.

    Attributes
    ----------
    level : float
        By which part of the best a loss has to be lower to be an improvement.
    best : float
        The last loss that was one.
    bad : int
        Epochs since then, or since it fired.
    """

    level: float
    best: float = inf
    bad: int = 0

    def fires(self, loss: float) -> bool:
        """Hear the loss of an epoch; say whether the plateau is reached."""
        less = 1 - self.level if self.best >= 0 else 1 + self.level
        if loss < self.best * less:
            self.best, self.bad = loss, 0
            return False
        self.bad += 1
        if self.bad <= 2:
            return False
        self.bad = 0
        return True
