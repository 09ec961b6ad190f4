"""SegmentTraining: the updates of one segment after the other, and their records.

Invariant: a segment that ended early has no record of its own. The next start trains the rest of it
and records the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import final

from dtrain.engine.metrics import MetricSums
from dtrain.errors import ConfigError
from dtrain.schedules.segments import Segment
from dtrain.session.checkpoint_writer import CheckpointWriter
from dtrain.session.end_requests import EndRequests
from dtrain.session.opening import OpenRun
from dtrain.session.segment_record import segment_record


@final
class SegmentTraining:
    """Trains segments on this rank. Methods are collective over all ranks.

    Parameters
    ----------
    run : OpenRun
        The run.
    requests : EndRequests
        What the ranks are asked for.
    checkpoints : CheckpointWriter
        Its memory is part of the records.
    save_if_requested : callable
        Saves, between two parts of a segment.
    before_part : callable
        Called before the blocks are trained on.

    Attributes
    ----------
    segment : Segment or None
        The segment that is not finished, or the rest of it.
    """

    def __init__(
        self,
        run: OpenRun,
        requests: EndRequests,
        checkpoints: CheckpointWriter,
        save_if_requested: Callable[[], None],
        before_part: Callable[[], None],
    ) -> None:
        self._run = run
        self._requests = requests
        self._checkpoints = checkpoints
        self._save_if_requested = save_if_requested
        self._before_part = before_part
        self.segment: Segment | None = None
        self._updates: Iterator[int] = iter(())
        self._ended_early = False
        self._order_size = 0
        self._bytes_before = 0, 0

    def updates(self, segment: Segment) -> Iterator[int]:
        """Train the updates of a segment; yield the number of each, from 0 in the run.

        A run that was stopped early yields fewer.
        """
        if self.segment is not None:
            raise ConfigError(
                "session.segment-unfinished",
                f"segment {self.segment.start} to {self.segment.stop} is not finished: call "
                "session.finish(segment) before the next one",
            )
        self.segment, self._ended_early = segment, False
        self._updates = self._train_segment(segment)
        return self._updates

    def refuse_open(self, method: str) -> None:
        """Refuse a call of a session's method inside a segment."""
        if self.segment is not None:
            raise ConfigError(
                "session.segment-open",
                f"session.{method}() inside a segment, where blocks are at different updates: call "
                "session.finish(segment) first, or set `segment` or [checkpoint] every in the run "
                "for shorter segments",
            )

    def _train_segment(self, segment: Segment) -> Iterator[int]:
        """Train a segment, in parts where a checkpoint was asked for; yield the updates."""
        early_end, part = self._requests.early_end, segment
        assert early_end is not None
        while True:
            yield from self._train_part(part)
            stop = early_end.end_of(part.stop)
            if stop == part.stop:
                return
            self._requests.act_on(self._add_records(replace(part, stop=stop), ended_early=True))
            if self._requests.interrupted:
                self._ended_early = True
                return
            self.segment = None
            self._save_if_requested()
            offset = part.offset + stop - part.start
            self.segment = part = replace(part, offset=offset, start=stop)

    def _train_part(self, segment: Segment) -> Iterator[int]:
        """Train a segment, or the rest of one; yield the number of each update."""
        self._before_part()
        job, plan, position = self._run.job, self._run.job.plan, self._run.job.position
        order = plan.epoch_order(segment.epoch)
        end = segment.offset + segment.stop - segment.start
        batches = [
            plan.batch_splitter.batch(order, offset, position.replica)
            for offset in range(segment.offset, end)
        ]
        self._order_size = len(order)
        traffic = job.groups.control.traffic
        self._bytes_before = traffic.bytes_intra, traffic.bytes_inter
        early_end = self._requests.early_end
        assert early_end is not None
        earlier = self._run.totals.earlier_sums(
            position.replica, plan.layout.mesh.replicas, job.engine.blocks
        )
        return job.engine.run(
            job.train_loader,
            batches,
            segment.start,
            segment.epoch,
            early_end if early_end.in_segments else None,
            MetricSums(**earlier),
        )

    def finish(self, segment: Segment) -> tuple[Segment, int] | None:
        """End a segment: syncs settle, and the records of all ranks are added up.

        Returns
        -------
        Segment
            The segment, or the rest of it after a checkpoint inside.
        int
            What the ranks have agreed to do now.

        None where the segment ended early.
        """
        for _ in self._updates:  # those that the caller has not taken
            pass
        totals = self._run.totals
        if self._ended_early:
            self.segment = None
            totals.tick()
            return None
        segment = self.segment or segment
        request = self._add_records(segment)
        if segment.ends_epoch:
            for sync in self._run.job.engine.syncs.values():
                sync.end_epoch(totals.train_loss or 0.0)
        self.segment = None
        totals.tick()
        totals.add_history(segment)
        return segment, request

    def _add_records(self, segment: Segment, ended_early: bool = False) -> int:
        """Add up the records of all ranks; return what the ranks have agreed to do now."""
        run, job, early_end = self._run, self._run.job, self._requests.early_end
        assert early_end is not None
        if job.engine.trace is not None:
            end = segment.offset + segment.stop - segment.start
            splitter = job.plan.batch_splitter
            job.engine.trace.write_segment(
                splitter.count_micro_batches(self._order_size, segment.offset, end)
            )
        for sync in job.engine.syncs.values():
            sync.finish_pending()
        kept_bytes = self._checkpoints.nbytes + (0 if run.ema is None else run.ema.nbytes)
        record = segment_record(job, self._bytes_before, kept_bytes, run.peak_flops)
        request = early_end.announce(segment.stop)
        rows = job.groups.control.allgather_object([record, request])
        run.totals.add_segment(
            [record for record, _ in rows],
            segment,
            len(job.engine.block_specs),
            job.plan.layout.mesh.stages,
            ended_early,
        )
        return early_end.settle(max(request for _, request in rows), segment.stop + ended_early)
