"""Sums over the rows that one rank has seen: what becomes losses and accuracies.

Invariant: sums, never means, so that adding over ranks, segments and parts is exact in kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MetricSums:
    """Sums over rows, by block where blocks differ.

    Attributes
    ----------
    rows : int
        Samples.
    loss : dict of int to float
        Sum of the losses over rows.
    correct, voted : dict of int to int, int
        Rows that a block, and that the vote, predicted rightly.
    figures : dict of int to dict of str to float
        Sums over rows of what else objectives measure, by name.
    voted_loss : float
        Sum over rows of the vote's cross-entropy.
    busy_s, wall_s : float
        Seconds at work, and seconds in all; the rest was spent in waits.
    """

    rows: int = 0
    loss: dict[int, float] = field(default_factory=dict)
    correct: dict[int, int] = field(default_factory=dict)
    vote_correct: int = 0
    vote_loss: float = 0.0
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    busy_s: float = 0.0
    wall_s: float = 0.0

    def add_loss(self, block: int, total: float) -> None:
        """Add a sum of losses over rows."""
        self.loss[block] = self.loss.get(block, 0.0) + total

    def add_metric(self, block: int, name: str, total: float) -> None:
        """Add a sum of another measure over rows."""
        own = self.metrics.setdefault(block, {})
        own[name] = own.get(name, 0.0) + total
