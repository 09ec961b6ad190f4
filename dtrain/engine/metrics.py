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
    loss_weight : float
        Samples, or counted positions, by which a mean loss divides.
    loss, loss_counts : dict of int to float
        Sum of the losses, and the number of samples or positions in it.
    left_out : dict of int to float
        Number of the samples or positions whose loss is not finite and is in no sum.
    positions : int
        Counted positions of class labels.
    correct : dict of int to int
        Positions that a block predicted rightly.
    vote_correct : int
        Positions that the vote predicted rightly.
    vote_loss : float
        Sum of the vote's losses.
    task_metrics : dict of str to list of float
        Sums of the task's metrics of the model's prediction, by name.
    metrics : dict of int to dict of str to float
        Sums of further quantities that objectives measure, by name.
    busy_s, wall_s : float
        Seconds of computation, and of all; the rest were waits.
    """

    rows: int = 0
    loss_weight: float = 0.0
    loss: dict[int, float] = field(default_factory=dict)
    loss_counts: dict[int, float] = field(default_factory=dict)
    left_out: dict[int, float] = field(default_factory=dict)
    positions: int = 0
    correct: dict[int, int] = field(default_factory=dict)
    vote_correct: int = 0
    vote_loss: float = 0.0
    task_metrics: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    busy_s: float = 0.0
    wall_s: float = 0.0

    def add_loss(self, block: int, total: float, count: float) -> None:
        """Add a sum of losses of a block over `count` samples or positions."""
        self.loss[block] = self.loss.get(block, 0.0) + total
        self.loss_counts[block] = self.loss_counts.get(block, 0.0) + count

    def leave_out(self, block: int, count: float) -> None:
        """Count samples or positions of a block whose loss is in no sum."""
        self.left_out[block] = self.left_out.get(block, 0.0) + count

    def continue_from(self, earlier: MetricSums) -> None:
        """Start the sums of losses and metrics at those of an earlier part of the segment.

        So they are added in the same order as without the interruption, and have the same bits.
        """
        self.loss |= earlier.loss
        self.loss_counts |= earlier.loss_counts
        self.metrics |= {block: dict(totals) for block, totals in earlier.metrics.items()}

    def mean_losses(self) -> dict[int, float]:
        """Return the mean loss so far, by block."""
        counts = self.loss_counts
        return {block: total / counts[block] for block, total in self.loss.items() if counts[block]}

    def add_metric(self, block: int, name: str, total: float) -> None:
        """Add a sum of another quantity of a block."""
        totals = self.metrics.setdefault(block, {})
        totals[name] = totals.get(name, 0.0) + total
