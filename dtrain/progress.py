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

from dtrain import folder
from dtrain.cautions import cautions
from dtrain.comm.comm import Comm
from dtrain.comm.launch import TERMINAL, launched
from dtrain.job import Plan
from dtrain.report import counted, percent
from dtrain.resume import followers
from dtrain.segments import Segment
from dtrain.totals import Totals

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

    def __init__(self, plan: Plan, comm: Comm, out: Path, totals: Totals) -> None:
        self.plan, self.comm, self.out, self.totals = plan, comm, out, totals
        self.speaks = comm.rank == 0
        self.first = totals.update
        self.began = self.spoke = time.monotonic()
        self.bar = _bar() if self.speaks else None

    def hello(self, threads: int, afresh: int = 0) -> None:
        """Say what will run, and on what; `afresh` replicas had trained apart, and are one now."""
        if not self.speaks:
            return
        print("\n".join(_introduction(self.plan, self.comm, threads)))
        if self.first:
            total = self.plan.calendar.total
            print(f"resumed   {self.first:,} of {total:,} updates were done before")
        if afresh:
            print(
                f"note      all start from the mean of {afresh} replicas that trained apart, "
                "their optimizers and syncs afresh"
            )
        print(flush=True)
        self._record(
            "run",
            ranks=self.comm.size,
            hosts=list(self.comm.hosts),
            versions=f"dtrain {version('dtrain')}, {versions(self.comm)}",
            job=folder.job(),
            resolved=self.plan.run.table(),
        )
        self.began = self.spoke = time.monotonic()
        if self.bar is not None and self.first < self.plan.calendar.total:
            self.bar.start()
            total = self.plan.calendar.total
            self.task = self.bar.add_task("training", total=total, completed=self.first)

    def show(self, update: int) -> None:
        """Move the bar, or say how far it is once per interval."""
        now = time.monotonic()
        every = REFRESH_S if self.bar is not None else self.plan.run.log.every_s
        if not self.speaks or now - self.spoke < every:
            return
        self.spoke = now
        if self.bar is not None:
            self.bar.update(self.task, completed=update + 1, refresh=True)
            return
        calendar = self.plan.calendar
        epoch = f"epoch {update // calendar.per_epoch + 1:>{len(str(calendar.epochs))}}"
        print(
            f"{epoch}/{calendar.epochs}  update {update + 1:,} of {calendar.total:,}"
            f"  {self._left(update + 1)}",
            flush=True,
        )

    def close(self, segment: Segment, eval_s: float | None, save_s: float | None) -> None:
        """Record a segment's end, and say what an evaluation found.

        Both times are in seconds; None: there was no evaluation, or no checkpoint.
        """
        if not self.speaks:
            return
        totals, calendar = self.totals, self.plan.calendar
        rate = totals.rate
        done = {"loss": totals.losses(), "samples_per_s": rate, "samples": totals.samples}
        host = self.comm.hosts[totals.latest["slowest_rank"]]
        measured = totals.measured()
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
        print(f"{told}  {rate:>8,.0f} samples/s  {self._left(segment.last)}", flush=True)

    def stop(self) -> None:
        """Take the bar off the terminal, and give the cursor back."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def goodbye(self, summary: dict[str, Any]) -> None:
        """Say how it ended, where it lies and what to try next."""
        if not self.speaks:
            return
        self.stop()
        calendar, out = self.plan.calendar, self.out.resolve()
        if self.first >= calendar.total:
            print(f"finished before: {self.first:,} updates are done, {calendar.total:,} asked for")
        tested = self.plan.data.test.size
        accuracy = summary["test_accuracy"]
        print()
        print(
            f"test accuracy {percent(accuracy)} ({round(accuracy * tested):,} of {tested:,}) "
            f"after {counted(summary['updates'], 'update')} "
            f"({counted(summary['epochs'], 'epoch')}), {summary['wall_s']:.1f} s"
        )
        if summary["low_rank"]:
            saved = summary["traffic_saved"]
            print(
                f"low rank {summary['compression']:.2f} : 1, "
                f"{counted(len(summary['low_rank']), 'matrix', 'matrices')} as factors"
                + ("" if saved is None else f"; {percent(saved)} of the means' traffic saved")
            )
        print(f"folder  {out}")
        print(f"next    {_next(self.plan, self.comm.size, out)}", flush=True)

    def _record(self, kind: str, **values: Any) -> None:
        totals = self.totals
        clock = {"attempt": totals.attempt, "update": totals.update}
        epoch = totals.update // self.plan.calendar.per_epoch
        totals.tick()
        folder.record(self.out, kind, totals.wall_s, **clock, epoch=epoch, **values)

    def _left(self, done: int) -> str:
        """Return how long the rest will take at the pace of this attempt."""
        spent = time.monotonic() - self.began
        rest = spent / max(done - self.first, 1) * (self.plan.calendar.total - done)
        hours, seconds = divmod(round(rest), 3600)
        minutes, seconds = divmod(seconds, 60)
        return (
            f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"
        )


def versions(comm: Comm) -> str:
    """Return which Python, torch and MPI run here, in one line."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, {comm.library}"


def _introduction(plan: Plan, comm: Comm, threads: int) -> list[str]:
    """Return the lines that open a run."""
    run, layout = plan.run, plan.layout
    train, test, mesh = plan.data.train, plan.data.test, layout.mesh
    heads = sum(part.head_parameters for part in layout.parts)
    settings = " ".join(f"{key} {value}" for key, value in run.optimizer.fields.items())
    shape = " x ".join(map(str, train.shape))
    lines = [
        f"dtrain {version('dtrain')}, {versions(comm)}",
        f"ranks     {mesh.ranks} = {counted(mesh.replicas, 'replica')} x "
        f"{counted(mesh.stages, 'stage')} on {counted(comm.nodes, 'host')}, "
        f"{counted(threads, 'thread')} each",
        f"data      {run.dataset.name}: {train.size:,} training and {test.size:,} test samples of "
        f"{shape}, {train.classes} classes",
        f"model     {run.model.name}: {sum(part.parameters for part in layout.parts):,} parameters"
        + (f", {heads:,} more in local heads" if heads else "")
        + ("; every rank builds it whole, then keeps its own" if layout.model.whole else ""),
        f"learning  {run.objective.name}, {run.schedule.name}, {run.sync.name}, "
        f"{run.optimizer.name} {settings}".rstrip(),
    ]
    if plan.blocks_assumed:
        count = counted(len(layout.parts), "block")
        lines.append(f"blocks    {count}, one per stage, since the run file names no number")
    frozen = [part for part in layout.parts if part.frozen]
    if frozen:
        lines.append(
            f"frozen    {'block' if len(frozen) == 1 else 'blocks'} "
            f"{', '.join(str(part.task.block) for part in frozen)}: "
            f"{sum(part.parameters for part in frozen):,} of the parameters keep their first values"
        )
    lines += [f"note      {line}" for line in cautions(plan)]
    for stage in range(mesh.stages):
        held = (
            f"block {block}: {' '.join(layout.specs[i].name for i in layout.parts[block].layers)}"
            for block in layout.blocks(stage)
        )
        lines.append(f"stage {stage:<3} {', '.join(held)}")
    return lines


def _next(plan: Plan, ranks: int, out: Path) -> str:
    """Return the command that goes on from here, runnable as it stands; or what tests the result,
    where the run was made for its length."""
    program = Path(sys.prefix) / "bin" / "dtrain"
    words = [str(program) if program.exists() else "dtrain"]
    if any(followers(plan.run)):
        return shlex.join([*words, "evaluate", str(out)])
    words += ["train", str(plan.run.path)]
    words += ["--ranks", str(ranks)] if ranks > 1 else []
    key, length = "epochs", plan.run.top.epochs
    if length is None:
        key, length = "updates", plan.calendar.total
    kept = [each for each in plan.run.overrides if each.partition("=")[0].strip() != key]
    sets = [word for each in [*kept, f"{key}={2 * length}"] for word in ("--set", each)]
    return shlex.join([*words, "--out", str(out), *sets])


def _bar() -> Bar | None:
    """Return a bar where the output ends on a terminal and rich is installed, not started."""
    columns = os.environ.get(TERMINAL)
    # Launchers give ranks terminals of their own, whatever their output ends on.
    alone = launched(os.environ) is None
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
