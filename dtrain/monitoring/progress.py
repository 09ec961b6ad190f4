"""What a person sees of a run: a bar on a terminal, one line per interval in a log.

Invariant: only rank 0 speaks and records, and nothing that it says decides anything.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dtrain.checkpoint import run_folder as folder
from dtrain.checkpoint.resume import length_dependent_parts
from dtrain.comm.communicator import Comm
from dtrain.comm.launcher import TERMINAL_VARIABLE, detect_launcher
from dtrain.monitoring.run_totals import RunTotals
from dtrain.planning.plan import Plan
from dtrain.planning.report import percent, pluralise
from dtrain.planning.warnings import plan_warnings
from dtrain.schedules.segments import Segment

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


REFRESH_S = 0.2


class Progress:
    """The voice of a run; silent on all ranks but the first.

    Parameters
    ----------
    totals : Totals
        What was done before; read again whenever something is said.
    """

    def __init__(self, plan: Plan, comm: Comm, out: Path, totals: RunTotals) -> None:
        self.plan, self.comm, self.out, self.totals = plan, comm, out, totals
        self.enabled = comm.rank == 0
        self.first_update = totals.update
        self.start_time = self.last_print_time = time.monotonic()
        self.bar = _make_bar() if self.enabled else None

    def start(self, threads: int, merged_replicas: int = 0) -> None:
        """Say what will run, and on what; `afresh` replicas had trained apart, and are one now."""
        if not self.enabled:
            return
        print("\n".join(_introduction(self.plan, self.comm, threads)))
        if self.first_update:
            total = self.plan.training_length.total_updates
            print(f"resumed   {self.first_update:,} of {total:,} updates were done before")
        if merged_replicas:
            print(
                f"note      all start from the mean of {merged_replicas} replicas that trained apart, "
                "their optimizers and syncs afresh"
            )
        print(flush=True)
        self._record(
            "run",
            ranks=self.comm.size,
            hosts=list(self.comm.hosts),
            versions=f"dtrain {version('dtrain')}, {library_versions(self.comm)}",
            job=folder.slurm_job_id(),
            resolved=self.plan.run.to_table(),
        )
        self.start_time = self.last_print_time = time.monotonic()
        if self.bar is not None and self.first_update < self.plan.training_length.total_updates:
            self.bar.start()
            total = self.plan.training_length.total_updates
            self.bar_task = self.bar.add_task("training", total=total, completed=self.first_update)

    def show(self, update: int) -> None:
        """Move the bar, or say how far it is once per interval."""
        now = time.monotonic()
        every = REFRESH_S if self.bar is not None else self.plan.run.log.every_s
        if not self.enabled or now - self.last_print_time < every:
            return
        self.last_print_time = now
        if self.bar is not None:
            self.bar.update(self.bar_task, completed=update + 1, refresh=True)
            return
        calendar = self.plan.training_length
        epoch = f"epoch {update // calendar.updates_per_epoch + 1:>{len(str(calendar.epochs))}}"
        print(
            f"{epoch}/{calendar.epochs}  update {update + 1:,} of {calendar.total_updates:,}"
            f"  {self._time_left(update + 1)}",
            flush=True,
        )

    def end_segment(self, segment: Segment, eval_s: float | None, save_s: float | None) -> None:
        """Record a segment's end, and say what an evaluation found.

        Both times are in seconds; None: there was no evaluation, or no checkpoint.
        """
        if not self.enabled:
            return
        totals, calendar = self.totals, self.plan.training_length
        rate = totals.rate
        done = {"loss": totals.losses(), "samples_per_s": rate, "samples": totals.samples}
        host = self.comm.hosts[totals.latest["slowest_rank"]]
        measured = totals.metric_means()
        self._record("train", **done, **measured, **totals.latest, slowest_host=host)
        if save_s is not None:
            self._record("checkpoint", save_s=save_s)
        if eval_s is None:
            return
        self._record("eval", **totals.test, eval_s=eval_s)
        epoch = f"epoch {segment.epoch + 1:>{len(str(calendar.epochs))}}/{calendar.epochs}"
        loss = "-" if totals.train_loss is None else f"{totals.train_loss:.4f}"
        told = f"{epoch}  loss {loss}  test {percent(totals.test['test_accuracy'])}"
        if sum(each is not None for each in totals.test["accuracy_per_block"]) > 1:
            told += f"  vote {percent(totals.test['test_accuracy_vote'])}"
        print(f"{told}  {rate:>8,.0f} samples/s  {self._time_left(segment.stop)}", flush=True)

    def stop(self) -> None:
        """Take the bar off the terminal, and give the cursor back."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def finish(self, summary: dict[str, Any]) -> None:
        """Say how it ended, where it lies and what to try next."""
        if not self.enabled:
            return
        self.stop()
        calendar, out = self.plan.training_length, self.out.resolve()
        if self.first_update >= calendar.total_updates:
            print(
                f"finished before: {self.first_update:,} updates are done, {calendar.total_updates:,} asked for"
            )
        tested = self.plan.data.test.size
        accuracy = summary["test_accuracy"]
        print()
        print(
            f"test accuracy {percent(accuracy)} ({round(accuracy * tested):,} of {tested:,}) "
            f"after {pluralise(summary['updates'], 'update')} "
            f"({pluralise(summary['epochs'], 'epoch')}), {summary['wall_s']:.1f} s"
        )
        if summary["low_rank"]:
            saved = summary["traffic_saved"]
            print(
                f"low rank {summary['compression']:.2f} : 1, "
                f"{pluralise(len(summary['low_rank']), 'matrix', 'matrices')} as factors"
                + ("" if saved is None else f"; {percent(saved)} of the means' traffic saved")
            )
        print(f"folder  {out}")
        print(f"next    {_next_command(self.plan, self.comm.size, out)}", flush=True)

    def _record(self, kind: str, **values: Any) -> None:
        totals = self.totals
        clock = {"attempt": totals.attempt, "update": totals.update}
        epoch = totals.update // self.plan.training_length.updates_per_epoch
        totals.tick()
        folder.append_record(self.out, kind, totals.wall_s, **clock, epoch=epoch, **values)

    def _time_left(self, updates_done: int) -> str:
        """Return how long the rest will take at the pace of this attempt."""
        spent = time.monotonic() - self.start_time
        rest = (
            spent
            / max(updates_done - self.first_update, 1)
            * (self.plan.training_length.total_updates - updates_done)
        )
        hours, seconds = divmod(round(rest), 3600)
        minutes, seconds = divmod(seconds, 60)
        return (
            f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"
        )


def library_versions(comm: Comm) -> str:
    """Return which Python, torch and MPI run here, in one line."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, {comm.library}"


def _introduction(plan: Plan, comm: Comm, threads: int) -> list[str]:
    """Return the lines that open a run."""
    run, layout = plan.run, plan.layout
    train, test, mesh = plan.data.train, plan.data.test, layout.mesh
    heads = sum(part.head_parameters for part in layout.block_layouts)
    settings = " ".join(f"{key} {value}" for key, value in run.optimizer.fields.items())
    shape = " x ".join(map(str, train.shape))
    lines = [
        f"dtrain {version('dtrain')}, {library_versions(comm)}",
        f"ranks     {mesh.ranks} = {pluralise(mesh.replicas, 'replica')} x "
        f"{pluralise(mesh.stages, 'stage')} on {pluralise(comm.node_count, 'host')}, "
        f"{pluralise(threads, 'thread')} each",
        f"data      {run.dataset.name}: {train.size:,} training and {test.size:,} test samples of "
        f"{shape}, {train.classes} classes",
        f"model     {run.model.name}: {sum(part.parameters for part in layout.block_layouts):,} parameters"
        + (f", {heads:,} more in local heads" if heads else "")
        + (
            "; every rank builds it whole, then keeps its own"
            if layout.model.builds_all_layers
            else ""
        ),
        f"learning  {run.objective.name}, {run.schedule.name}, {run.sync.name}, "
        f"{run.optimizer.name} {settings}".rstrip(),
    ]
    if plan.blocks_assumed:
        count = pluralise(len(layout.block_layouts), "block")
        lines.append(f"blocks    {count}, one per stage, since the run file names no number")
    frozen = [part for part in layout.block_layouts if part.frozen]
    if frozen:
        lines.append(
            f"frozen    {'block' if len(frozen) == 1 else 'blocks'} "
            f"{', '.join(str(part.spec.index) for part in frozen)}: "
            f"{sum(part.parameters for part in frozen):,} of the parameters keep their first values"
        )
    lines += [f"note      {line}" for line in plan_warnings(plan)]
    for stage in range(mesh.stages):
        held = (
            f"block {block}: {' '.join(layout.layer_specs[i].name for i in layout.block_layouts[block].layers)}"
            for block in layout.blocks_of_stage(stage)
        )
        lines.append(f"stage {stage:<3} {', '.join(held)}")
    return lines


def _next_command(plan: Plan, ranks: int, out: Path) -> str:
    """Return the command that goes on from here, runnable as it stands; or what tests the result,
    where the run was made for its length."""
    program = Path(sys.prefix) / "bin" / "dtrain"
    words = [str(program) if program.exists() else "dtrain"]
    if any(length_dependent_parts(plan.run)):
        return shlex.join([*words, "evaluate", str(out)])
    words += ["train", str(plan.run.path)]
    words += ["--ranks", str(ranks)] if ranks > 1 else []
    key, length = "epochs", plan.run.settings.epochs
    if length is None:
        key, length = "updates", plan.training_length.total_updates
    kept = [each for each in plan.run.overrides if each.partition("=")[0].strip() != key]
    sets = [word for each in [*kept, f"{key}={2 * length}"] for word in ("--set", each)]
    return shlex.join([*words, "--out", str(out), *sets])


def _make_bar() -> Bar | None:
    """Return a bar where the output ends on a terminal and rich is installed, not started."""
    columns = os.environ.get(TERMINAL_VARIABLE)
    # Launchers give ranks terminals of their own, whatever their output ends on.
    alone = detect_launcher(os.environ) is None
    if columns is None and not (alone and sys.stdout.isatty()):
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        return None
    width = int(columns) if columns and columns.isdigit() else None
    console = Console(force_terminal=True, width=width)
    return Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,  # a thread of its own would take its turns from the training
    )
