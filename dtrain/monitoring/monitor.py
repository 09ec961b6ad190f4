"""Monitor: what people see of a run while it trains, on the console and in its trackers.

Invariant: rank 0 alone prints and records, and no result of this module changes a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, final

from dtrain.comm.communicator import Comm
from dtrain.monitoring.progress import Progress
from dtrain.monitoring.records import RunRecords
from dtrain.monitoring.run_totals import RunTotals
from dtrain.planning.plan import Plan
from dtrain.tracking.base import RunFacts
from dtrain.tracking.recorder import Recorder

CLOSE_S = 1.0
"""Seconds that trackers have to close after a failure."""


@final
class Monitor:
    """Console and records of one start of a run; on the other ranks its methods do nothing.

    Parameters
    ----------
    comm : Comm
        All ranks of the run.
    out : Path
        The run folder.
    totals : RunTotals
        The totals of the run, read again for every line and every record.
    recorder : Recorder
        The trackers; used on rank 0 alone.
    """

    def __init__(
        self, plan: Plan, comm: Comm, out: Path, totals: RunTotals, recorder: Recorder
    ) -> None:
        self.enabled = comm.rank == 0
        self.totals = totals
        self._plan = plan
        self._out = out
        self._recorder = recorder
        self._console = Progress(plan, comm, out, totals)
        self._records = RunRecords(plan, comm, totals, recorder)

    def start(
        self,
        threads: int,
        merged_replicas: int = 0,
        copied_blocks: Sequence[int] = (),
        layer_notes: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Print and record what will run, on which software.

        Parameters
        ----------
        threads, merged_replicas, copied_blocks
            As in `Progress.start`.
        layer_notes, notes : sequence of str
            Notes on the layers, and all others that the plan alone does not give.
        """
        if not self.enabled:
            return
        self._console.start(threads, merged_replicas, copied_blocks, [*layer_notes, *notes])
        facts = RunFacts(
            self._out, self._out.resolve().name, self.totals.attempt, self.totals.update
        )
        self._recorder.start(self._plan.run.to_table(), facts)
        self._records.start(copied_blocks, layer_notes, notes)
        self._console.start_bar()

    def show(self, update: int) -> None:
        """Show that `update` has just ended."""
        self._console.show(update)

    def note(self, text: str) -> None:
        """Print a line while the run trains."""
        if self.enabled:
            self._console.note(text)

    def end_segment(self) -> None:
        """Record the end of a segment."""
        if self.enabled:
            self._records.end_segment()
            for row in first_per_update(self.totals.latest.get("skipped", ())):
                self._console.note(
                    f"update {row['update']} of block {row['block']} is skipped: {row['text']}"
                )

    def end_evaluation(self, eval_s: float) -> None:
        """Record and print an evaluation that took `eval_s` seconds."""
        if self.enabled:
            self._records.end_evaluation(eval_s)
            self._console.end_evaluation()

    def end_save(self, save_s: float, asynchronous: bool = False) -> None:
        """Record a checkpoint for which the training stood still for `save_s` seconds."""
        if self.enabled:
            self._records.end_save(save_s, asynchronous)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Pass the summary to the trackers, and print the result."""
        if self.enabled:
            self._recorder.finish(summary)
            self._recorder.close()
            self._console.finish(summary)

    def stop(self) -> None:
        """Remove the bar, and close the trackers of a run that ended early, within a second."""
        self._console.stop()
        if self.enabled:
            thread = Thread(target=self._recorder.close, daemon=True)
            thread.start()
            thread.join(CLOSE_S)  # a slow tracker must not keep the job from ending


def first_per_update(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the first of the rows of each update."""
    return [*{row["update"]: row for row in reversed(rows)}.values()][::-1]
