"""What a run has done so far, over all ranks and all attempts.

Invariant: totals change at segment ends only, are the same on all ranks, and are plain values, so
a checkpoint keeps them as JSON.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtrain.schedules.segments import Segment

RankRecord = Mapping[str, Any]


@dataclass
class RunTotals:
    """Counters over all attempts, sums of the present epoch, and the latest evaluation.

    Attributes
    ----------
    update, samples : int
        Updates done and samples learnt from.
    wall_s, train_s : float
        Seconds of all attempts, and those spent in training segments, each segment's
        slowest rank deciding.
    rate, latest : float, dict
        Samples per second of the latest segment, its seconds, and the rank that was at work
        longest in it.
    loss, rows : list of float, int
        Sum of losses per block (None: it has none) over `rows` samples of the present epoch.
    figures : dict of str to list of float
        The same of what else the objective measures, by name.
    busy_s, stage_s : list of float
        Seconds at work and in all, per stage, summed over replicas.
    weights : dict of str to dict
        Rank and traffic of each weight by its name, where a sync makes products of some.
    test, tested : dict, int
        The latest evaluation, and the update after which it was made.
    """

    update: int = 0
    samples: int = 0
    attempt: int = 1
    wall_s: float = 0.0
    train_s: float = 0.0
    bytes_intra_node: int = 0
    bytes_inter_node: int = 0
    rate: float = 0.0
    latest: dict[str, Any] = field(default_factory=dict)
    loss: list[float | None] = field(default_factory=list)
    figures: dict[str, list[float | None]] = field(default_factory=dict)
    rows: int = 0
    busy_s: list[float] = field(default_factory=list)
    stage_s: list[float] = field(default_factory=list)
    peak_live: list[int] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    tested: int = -1

    def __post_init__(self) -> None:
        self._last_tick = time.perf_counter()

    def tick(self) -> None:
        """Add the time since the last tick to `wall_s`."""
        now = time.perf_counter()
        self.wall_s += now - self._last_tick
        self._last_tick = now

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RunTotals:
        """Return the totals that a checkpoint kept."""
        return cls(**state)

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return dataclasses.asdict(self)

    def add_segment(
        self, records: Sequence[RankRecord], segment: Segment, blocks: int, stages: int
    ) -> None:
        """Add one segment: one row per rank, as `train` gathers them."""
        self.update = segment.stop
        if segment.offset == 0 or len(self.loss) != blocks:
            self.loss, self.rows, self.figures = [None] * blocks, 0, {}
        if len(self.busy_s) != stages:
            self.busy_s, self.stage_s = [0.0] * stages, [0.0] * stages
        self.peak_live = [0] * stages
        self.peak_bytes = [row["peak_bytes"] for row in records]
        self.rss_bytes = [row["rss_bytes"] for row in records]
        self.weights = {name: each for row in records for name, each in row["weights"].items()}
        before, spent = self.samples, max(row["wall_s"] for row in records)
        for row in records:
            self._add_record(row)
        self.train_s += spent
        self.rate = (self.samples - before) / spent if spent else 0.0
        self.latest = {"train_s": spent, **slowest_rank(records)}

    def _add_record(self, record: RankRecord) -> None:
        stage = record["stage"]
        if stage == 0:
            self.rows += record["rows"]
            self.samples += record["rows"]
        self.busy_s[stage] += record["busy_s"]
        self.stage_s[stage] += record["wall_s"]
        self.peak_live[stage] = max(self.peak_live[stage], record["peak_live"])
        self.bytes_intra_node += record["bytes_intra_node"]
        self.bytes_inter_node += record["bytes_inter_node"]
        for block, total in record["loss"].items():
            self.loss[int(block)] = (self.loss[int(block)] or 0.0) + total
        for block, sums in record["metrics"].items():
            for name, total in sums.items():
                own = self.figures.setdefault(name, [None] * len(self.loss))
                own[int(block)] = (own[int(block)] or 0.0) + total

    def losses(self) -> list[float | None]:
        """Return the mean loss of the present epoch, per block."""
        return self._means(self.loss)

    def metric_means(self) -> dict[str, list[float | None]]:
        """Return the means of what else was measured in the present epoch, by name, per block."""
        return {name: self._means(sums) for name, sums in sorted(self.figures.items())}

    def _means(self, sums: Sequence[float | None]) -> list[float | None]:
        return [None if total is None else total / self.rows for total in sums]

    @property
    def train_loss(self) -> float | None:
        """Mean loss of the last block over the present epoch."""
        return self.losses()[-1] if self.loss and self.rows else None

    @property
    def samples_per_s(self) -> float:
        """Samples learnt from per second of training segments."""
        return self.samples / self.train_s if self.train_s else 0.0


def slowest_rank(records: Sequence[RankRecord]) -> dict[str, Any]:
    """Return which rank was at work longest, how long, and the median of its stage.

    A slow node shows as a rank far above its median; where stages are uneven the costliest has the
    slowest rank, which then is near it.
    """
    rank = max(range(len(records)), key=lambda rank: float(records[rank]["busy_s"]))
    row = records[rank]
    peers = [each["busy_s"] for each in records if each["stage"] == row["stage"]]
    return {
        "slowest_rank": rank,
        "slowest_busy_s": row["busy_s"],
        "stage_median_busy_s": statistics.median(peers),
    }


def evaluation_metrics(records: Sequence[RankRecord], blocks: int, votes: bool) -> dict[str, Any]:
    """Return the evaluation over all ranks' rows: means over samples, per block and by vote.

    `votes` says whether the model's own prediction is the vote, not the last block's.
    """
    samples = sum(row["rows"] for row in records if row["stage"] == 0)
    loss, correct = [0.0] * blocks, [0] * blocks
    can = {int(block) for row in records for block in row["correct"]}
    for row in records:
        for block, count in row["correct"].items():
            correct[int(block)] += count
            loss[int(block)] += row["loss"][block]
    accuracy = [correct[b] / samples if b in can else None for b in range(blocks)]
    vote = sum(row["vote_correct"] for row in records) / samples
    mean = (sum(row["vote_loss"] for row in records) if votes else loss[-1]) / samples
    return {
        "test_loss": mean if math.isfinite(mean) else None,
        "test_accuracy": vote if votes else accuracy[-1],
        "test_accuracy_vote": vote,
        "accuracy_per_block": accuracy,
    }
