"""Detection of a plateau of the training loss, by which DASO sends more often."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import final


@final
@dataclass
class PlateauDetector:
    """Fires on the third epoch in a row that does not improve on the best loss.

    Attributes
    ----------
    threshold : float
        The part of the best loss by which another has to be lower to be an improvement.
    best : float
        The loss of the last epoch that was an improvement.
    bad_epochs : int
        Epochs since then, or since it fired.
    """

    threshold: float
    best: float = inf
    bad_epochs: int = 0

    def observe(self, loss: float) -> bool:
        """Record the loss of an epoch, and return whether a plateau is reached."""
        factor = 1 - self.threshold if self.best >= 0 else 1 + self.threshold
        if loss < self.best * factor:
            self.best = loss
            self.bad_epochs = 0
            return False
        self.bad_epochs += 1
        if self.bad_epochs <= 2:
            return False
        self.bad_epochs = 0
        return True
