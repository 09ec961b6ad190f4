"""RunRecords: composes the records of a run from its totals, for `metrics.jsonl` and trackers.

Invariant: rank 0 alone records.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, final

from dtrain.checkpoint import ownership
from dtrain.comm.communicator import Comm
from dtrain.monitoring.figures import speed_figures
from dtrain.monitoring.progress import library_versions
from dtrain.monitoring.run_totals import RunTotals
from dtrain.monitoring.summary import skipped_updates
from dtrain.planning.plan import Plan
from dtrain.tracking.recorder import Recorder


@final
class RunRecords:
    """The records of one start of a run.

    Parameters
    ----------
    comm : Comm
        All ranks of the run.
    totals : RunTotals
        The totals of the run, read again for every record.
    recorder : Recorder
        The trackers.
    """

    def __init__(self, plan: Plan, comm: Comm, totals: RunTotals, recorder: Recorder) -> None:
        self.plan = plan
        self.comm = comm
        self.totals = totals
        self.recorder = recorder

    def start(
        self, copied_blocks: Sequence[int], layer_notes: Sequence[str], notes: Sequence[str]
    ) -> None:
        """Record a start, with hosts, nodes and versions."""
        self._record(
            "run",
            ranks=self.comm.size,
            hosts=list(self.comm.hosts),
            nodes=self.comm.topology.node_numbers,
            versions=f"dtrain {version('dtrain')}, {library_versions(self.comm)}",
            job=ownership.slurm_job_id(),
            resolved=self.plan.run.to_table(),
            copied_blocks=list(copied_blocks),
            layer_notes=list(layer_notes),
            notes=list(notes),
        )

    def end_segment(self) -> None:
        """Record the end of a segment."""
        totals = self.totals
        self._record(
            "train",
            loss=totals.losses(),
            samples_per_s=totals.rate,
            samples=totals.samples,
            **totals.metric_means(),
            **({"skipped_updates": skipped_updates(totals)} if totals.skips else {}),
            **totals.latest,
            slowest_host=self.comm.hosts[totals.latest["slowest_rank"]],
            **speed_figures(self.plan, totals.rate, totals.latest),
        )

    def end_save(self, save_s: float, asynchronous: bool) -> None:
        """Record a checkpoint for which the training stood still for `save_s` seconds."""
        how = {"asynchronous": True} if asynchronous else {}
        self._record("checkpoint", save_s=save_s, **how)

    def end_evaluation(self, eval_s: float) -> None:
        """Record an evaluation that took `eval_s` seconds."""
        others = self.totals.evaluations
        validation = _of_split("validation", others)
        if validation:
            self._record("eval", split="validation", **validation)
        test = self.totals.test | _of_split("test", others)
        self._record("eval", split="test", **test, eval_s=eval_s)

    def _record(self, kind: str, **values: Any) -> None:
        """Pass a record to the trackers, with its time and its position first."""
        totals = self.totals
        totals.tick()
        head = {
            "time_s": round(totals.wall_s, 3),
            "unix_s": round(time.time(), 3),
            "attempt": totals.attempt,
            "update": totals.update,
            "epoch": totals.update // self.plan.training_length.updates_per_epoch,
        }
        self.recorder.record(kind, head | values)


def _of_split(split: str, evaluations: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluations of a split, those of averaged weights included."""
    prefixes = f"{split}_", f"ema_{split}_"
    return {key: value for key, value in evaluations.items() if key.startswith(prefixes)}
