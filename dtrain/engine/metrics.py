"""MetricSums: sums of losses and metrics over the samples that one rank has processed.

Invariant: sums, never means, so that ranks, segments and parts can be added.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MetricSums:
    """Sums over samples, by block where blocks differ.

    Attributes
    ----------
    rows : int
        Samples.
    loss : dict of int to float
        Sum of the losses.
    correct : dict of int to int
        Samples that a block predicted rightly.
    vote_correct : int
        Samples that the vote predicted rightly.
    vote_loss : float
        Sum of the vote's cross-entropy.
    metrics : dict of int to dict of str to float
        Sums of further quantities that objectives measure, by name.
    busy_s, wall_s : float
        Seconds of computation, and of all; the rest were waits.
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
        """Add a sum of losses of a block."""
        self.loss[block] = self.loss.get(block, 0.0) + total

    def add_metric(self, block: int, name: str, total: float) -> None:
        """Add a sum of another quantity of a block."""
        totals = self.metrics.setdefault(block, {})
        totals[name] = totals.get(name, 0.0) + total
