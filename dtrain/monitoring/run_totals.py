"""Totals of a run over all ranks and all attempts.

Invariant: totals change only at the end of a segment, are the same on all ranks, and are plain
values, so that a checkpoint stores them as JSON.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtrain.monitoring.figures import rank_figures
from dtrain.schedules.segments import Segment
from dtrain.tasks.task import Task

UNFINISHED_SUMS = ("loss", "loss_counts", "metrics")
"""Fields of `MetricSums` that are added in the order of the samples."""


MAX_SKIPPED = 20
"""Skipped updates of a segment that are recorded with their reasons."""


RankRecord = Mapping[str, Any]
"""Counters of one rank over one segment or one evaluation."""


TEST_KEYS = (
    *("test_loss", "test_accuracy", "test_accuracy_vote", "accuracy_per_block"),
    "metrics",
)
"""Keys of an evaluation in `summary.json`."""


@dataclass
class RunTotals:
    """Counters over all attempts, sums over the current epoch, and the latest evaluation.

    Attributes
    ----------
    update, samples : int
        Updates done, and samples trained on.
    attempt : int
        Number of this start of the run, from 1.
    wall_s, train_s : float
        Seconds of all attempts, and seconds in training segments, each by its slowest rank.
    bytes_intra_node, bytes_inter_node : int
        Payload sent inside and between nodes.
    rate : float
        Samples per second of the latest segment.
    latest : dict
        Seconds of the latest segment, its slowest rank, the spread over the ranks, and learning
        rates and norms per block.
    loss : list of float or None
        Sum of losses per block over the samples of the current epoch; None where a block has no
        loss.
    figures : dict of str to list of float or None
        Sums of the objective's other metrics, by name.
    rows, loss_weight : float
        Samples of the current epoch so far, and the number by which mean losses divide: the
        samples, or their counted positions.
    left_out : list of float
        The samples or positions in `loss_weight` whose loss is not finite and not in `loss`, per
        block; empty without such.
    skips : dict of str to list of int
        Skipped updates of each block, in all and since the last step, if the run may skip some.
    busy_s, stage_s : list of float
        Seconds without waits, and all seconds, per stage, summed over replicas.
    peak_live : list of int
        Micro-batches between forward and backward at most, per stage, in the latest segment.
    peak_bytes, rss_bytes : list of int
        Peak of counted memory and of resident memory, per rank.
    weights : dict of str to dict
        Rank and traffic of each low-rank weight, by its name.
    test : dict
        The latest evaluation of the test split.
    evaluations : dict
        Those of the validation split and of averaged weights, under keys with prefixes.
    tested : int
        The number of updates before the latest evaluation, -1 without one.
    history : list of dict
        Losses, speed and tests of every epoch.
    unfinished : dict of str to dict
        Sums of losses and metrics in the part of a segment that was trained before it ended early,
        by replica. `loss` and `figures` have them when the rest of the segment is trained.
    evaluation_pending : bool
        Whether the run was stopped at the end of a segment, before an evaluation that may be
        due there.
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
    loss_weight: float = 0.0
    left_out: list[float] = field(default_factory=list)
    skips: dict[str, list[int]] = field(default_factory=dict)
    busy_s: list[float] = field(default_factory=list)
    stage_s: list[float] = field(default_factory=list)
    peak_live: list[int] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, Any] = field(default_factory=dict)
    tested: int = -1
    history: list[dict[str, Any]] = field(default_factory=list)
    unfinished: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation_pending: bool = False

    def __post_init__(self) -> None:
        self._last_tick = time.perf_counter()

    def tick(self) -> None:
        """Add the time since the last tick to `wall_s`."""
        now = time.perf_counter()
        self.wall_s += now - self._last_tick
        self._last_tick = now

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RunTotals:
        """Return the totals of a checkpoint, whose state may hold other facts of the run, too."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in state.items() if name in names})

    def state(self) -> dict[str, Any]:
        """Return the totals as plain values, for a checkpoint."""
        return dataclasses.asdict(self)

    def add_segment(
        self,
        records: Sequence[RankRecord],
        segment: Segment,
        blocks: int,
        stages: int,
        ended_early: bool = False,
    ) -> None:
        """Add the records of all ranks for one segment, or the part of it that was trained, in
        rank order."""
        self.update = segment.stop
        if segment.offset == 0 or len(self.loss) != blocks:
            self.loss, self.figures = [None] * blocks, {}
            self.rows, self.loss_weight, self.left_out = 0, 0.0, []
        if len(self.busy_s) != stages:
            self.busy_s, self.stage_s = [0.0] * stages, [0.0] * stages
        self.peak_live = [0] * stages
        self.peak_bytes = [record["peak_bytes"] for record in records]
        self.rss_bytes = [record["rss_bytes"] for record in records]
        self.weights = {
            name: stats for record in records for name, stats in record["weights"].items()
        }
        previous_samples, segment_s = self.samples, max(record["wall_s"] for record in records)
        self.unfinished = {}
        for record in records:
            self._add_record(record)
            if ended_early:
                self._add_unfinished(record)
            else:
                self._add_losses(record)
        self.train_s += segment_s
        self.rate = (self.samples - previous_samples) / segment_s if segment_s else 0.0
        updates = segment.stop - segment.start
        self.latest = {
            "train_s": segment_s,
            **slowest_rank(records),
            **rank_figures(records, updates),
            **block_values(records, blocks),
            **_skip_values(records),
        }

    def _add_record(self, record: RankRecord) -> None:
        stage = record["stage"]
        if stage == 0:
            self.rows += record["rows"]
            self.loss_weight += record["loss_weight"]
            self.samples += record["rows"]
        for block, count in record["left_out"].items():
            self.left_out = self.left_out or [0.0] * len(self.loss)
            self.left_out[int(block)] += count
        self.skips |= {str(block): counts for block, counts in record["skips"].items()}
        self.busy_s[stage] += record["busy_s"]
        self.stage_s[stage] += record["wall_s"]
        self.peak_live[stage] = max(self.peak_live[stage], record["peak_live"])
        self.bytes_intra_node += record["bytes_intra_node"]
        self.bytes_inter_node += record["bytes_inter_node"]

    def _add_losses(self, record: RankRecord) -> None:
        for block, total in record["loss"].items():
            self.loss[int(block)] = (self.loss[int(block)] or 0.0) + total
        for block, sums in record["metrics"].items():
            for name, total in sums.items():
                per_block = self.figures.setdefault(name, [None] * len(self.loss))
                per_block[int(block)] = (per_block[int(block)] or 0.0) + total

    def _add_unfinished(self, record: RankRecord) -> None:
        sums = self.unfinished.setdefault(str(record["replica"]), {})
        for name in UNFINISHED_SUMS:
            own = {str(block): value for block, value in record[name].items()}
            sums[name] = {**sums.get(name, {}), **own}

    def earlier_sums(self, replica: int, replicas: int, blocks: Container[int]) -> dict[str, Any]:
        """Return the sums of `unfinished` that a rank continues, as fields of `MetricSums`.

        Replicas are as many as before, or the first one continues the sums of all.
        """
        rows = [sums for name, sums in self.unfinished.items() if name == str(replica)]
        if len(self.unfinished) != replicas:
            rows = [] if replica else [*self.unfinished.values()]
        sums: dict[str, Any] = {name: {} for name in UNFINISHED_SUMS}
        for row in rows:
            for block in (block for block in row["loss_counts"] if int(block) in blocks):
                for part in ("loss", "loss_counts"):
                    value = sums[part].get(int(block), 0.0) + row[part][block]
                    sums[part][int(block)] = value
            for block, values in row["metrics"].items():
                if int(block) in blocks:
                    metrics = sums["metrics"].setdefault(int(block), {})
                    for name, value in values.items():
                        metrics[name] = metrics.get(name, 0.0) + value
        return sums

    def losses(self) -> list[float | None]:
        """Return the mean loss of the current epoch, per block."""
        weight, totals = self.loss_weight or self.rows, list(self.loss)
        for sums in self.unfinished.values():
            for block, value in sums["loss"].items():
                totals[int(block)] = (totals[int(block)] or 0.0) + value
        weights = [weight - left_out for left_out in self.left_out] or [weight] * len(totals)
        return [
            None if total is None or not block_weight else total / block_weight
            for total, block_weight in zip(totals, weights, strict=True)
        ]

    def metric_means(self) -> dict[str, list[float | None]]:
        """Return the means of the objective's other metrics in the current epoch, by name and
        block."""
        figures = {name: list(sums) for name, sums in self.figures.items()}
        for unfinished in self.unfinished.values():
            for block, values in unfinished["metrics"].items():
                for name, value in values.items():
                    per_block = figures.setdefault(name, [None] * len(self.loss))
                    per_block[int(block)] = (per_block[int(block)] or 0.0) + value
        return {
            name: [None if total is None else total / self.rows for total in sums]
            for name, sums in sorted(figures.items())
        }

    def add_history(self, segment: Segment) -> None:
        """Record an epoch that ends with this segment, or the last one of the run."""
        if segment.ends_epoch or segment.ends_run:
            if self.history and self.history[-1]["epoch"] == segment.epoch:  # of a shorter run
                self.history.pop()
            self.history.append(
                {
                    "epoch": segment.epoch,
                    "update": self.update,
                    "samples": self.samples,
                    "wall_s": self.wall_s,
                    "samples_per_s": self.rate,
                    "train_loss": self.train_loss,
                    "train_loss_per_block": self.losses(),
                }
            )

    def add_history_test(self) -> None:
        """Add an evaluation to the record of the epoch that it follows."""
        if self.history and self.history[-1]["update"] == self.update:
            self.history[-1] |= self.test | self.evaluations

    @property
    def train_loss(self) -> float | None:
        """Mean loss of the last block over the current epoch."""
        return self.losses()[-1] if self.loss and self.rows else None

    @property
    def samples_per_s(self) -> float:
        """Samples per second of training segments, over all attempts."""
        return self.samples / self.train_s if self.train_s else 0.0


def block_values(records: Sequence[RankRecord], blocks: int) -> dict[str, list[float | None]]:
    """Return learning rates, and norms if they are recorded, per block by name; None where one is
    not finite."""
    rows = {int(block): row for record in records for block, row in record["block_values"].items()}
    names = dict.fromkeys(name for row in rows.values() for name in row)
    values = {name: [rows[block][name] for block in range(blocks)] for name in names}
    return {
        name: [value if math.isfinite(value) else None for value in row]
        for name, row in values.items()
    }


def _skip_values(records: Sequence[RankRecord]) -> dict[str, Any]:
    """Return the skipped updates of a segment with their reasons; nothing without such."""
    skipped = [row for record in records for row in record["skip_reasons"]]
    skipped.sort(key=lambda row: (row["update"], row["kind"] != "loss", row["block"]))
    return {"skipped": skipped[:MAX_SKIPPED]} if skipped else {}


def slowest_rank(records: Sequence[RankRecord]) -> dict[str, Any]:
    """Return the rank with the most busy seconds, its seconds, and the median of its stage.

    A rank far above the median is on a slow node. A rank near it is in the costliest stage.
    """
    rank = max(range(len(records)), key=lambda rank: float(records[rank]["busy_s"]))
    stage, busy_s = records[rank]["stage"], records[rank]["busy_s"]
    same_stage = [record["busy_s"] for record in records if record["stage"] == stage]
    return {
        "slowest_rank": rank,
        "slowest_busy_s": busy_s,
        "stage_median_busy_s": statistics.median(same_stage),
    }


def evaluation_metrics(
    records: Sequence[RankRecord], blocks: int, votes: bool, task: Task
) -> dict[str, Any]:
    """Return the means over the samples of all ranks, per block and by vote.

    Parameters
    ----------
    records : sequence of mapping
        One per micro-batch and stage, in the order of the samples.
    votes : bool
        Whether the vote of all blocks is the model's prediction, instead of the last block's.
    """
    loss, correct = [0.0] * blocks, [0] * blocks
    predicting = {int(block) for record in records for block in record["correct"]}
    for record in records:
        for block, count in record["correct"].items():
            correct[int(block)] += count
        for block, total in record["loss"].items():
            loss[int(block)] += total
    positions = sum(record["positions"] for record in records)  # those of the last block
    weight = sum(record["loss_weight"] for record in records)  # likewise
    by_vote = votes and task.has_classes
    vote_loss = sum(record["vote_loss"] for record in records)
    mean_loss = (vote_loss if by_vote else loss[-1]) / weight if weight else math.nan
    metrics = task.compute_metrics(
        [record["task_metrics"] for record in records if record["task_metrics"]]
    )
    predicting = predicting if positions else set()
    accuracy = [correct[b] / positions if b in predicting else None for b in range(blocks)]
    votes_right = sum(record["vote_correct"] for record in records)
    vote = votes_right / positions if positions else None
    prediction = vote if by_vote else accuracy[-1]
    return {
        "test_loss": mean_loss if math.isfinite(mean_loss) else None,
        "test_accuracy": prediction if task.has_classes else metrics.get("accuracy"),
        "test_accuracy_vote": vote,
        "accuracy_per_block": accuracy,
        "metrics": metrics,
    }
