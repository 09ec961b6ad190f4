"""Progress of a run on the console: a bar on a terminal, or one line per interval in a log.

Invariant: only rank 0 prints, and no result of this module changes a run.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dtrain.checkpoint.same_run import length_dependent_parts
from dtrain.comm.communicator import Comm
from dtrain.comm.launcher import TERMINAL_VARIABLE
from dtrain.comm.launcher_detection import detect_launcher
from dtrain.monitoring.run_totals import RunTotals
from dtrain.monitoring.summary import metric_text
from dtrain.planning.data_memory import plan_data_memory
from dtrain.planning.formatting import percent, pluralise
from dtrain.planning.plan import Plan
from dtrain.planning.warnings import plan_warnings
from dtrain.user_code import ARRAYS

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


REFRESH_S = 0.2
"""Seconds between two refreshes of the bar."""


LARGE_DATA_BYTES = 16 << 20
"""Bytes of data from which a run prints where they are."""


class Progress:
    """The console (rank 0 only).

    Parameters
    ----------
    comm : Comm
        All ranks of the run.
    out : Path
        The run folder.
    totals : RunTotals
        The totals of the run, read again for every line.
    """

    def __init__(self, plan: Plan, comm: Comm, out: Path, totals: RunTotals) -> None:
        self.plan = plan
        self.comm = comm
        self.out = out
        self.totals = totals
        self.enabled = comm.rank == 0
        self.first_update = totals.update
        self.start_time = self.last_print_time = time.monotonic()
        self.bar = _make_bar() if self.enabled else None

    @property
    def total_updates(self) -> int:
        """Updates of the whole run."""
        return self.plan.training_length.total_updates

    def start(
        self,
        threads: int,
        merged_replicas: int = 0,
        copied_blocks: Sequence[int] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Print what will run, on which software.

        Parameters
        ----------
        threads : int
            Threads per rank.
        merged_replicas : int
            Number of replicas of a checkpoint that were averaged to start from; 0 for none.
        copied_blocks : sequence of int
            Blocks whose initial weights were copied from the first replica.
        notes : sequence of str
            Notes that the plan alone does not give.
        """
        if not self.enabled:
            return
        print("\n".join(_introduction(self.plan, self.comm, threads)))
        if self.first_update:
            done = f"{self.first_update:,} of {self.total_updates:,}"
            print(f"resumed   {done} updates were done before")
        if merged_replicas:
            print(
                f"note      all replicas start from the mean of {merged_replicas} replicas that "
                "were trained with local updates; optimizers and syncs start anew"
            )
        if copied_blocks:
            noun = "block" if len(copied_blocks) == 1 else "blocks"
            print(
                f"note      the initial weights of {noun} {', '.join(map(str, copied_blocks))} "
                "differed between replicas: all replicas start from those of the first one; the "
                "result depends on that draw, so seed it (torch's generator is seeded)"
            )
        for note in notes:
            print(f"note      {note}")
        print(flush=True)

    def start_bar(self) -> None:
        """Start the clock, and the bar where there is one."""
        self.start_time = self.last_print_time = time.monotonic()
        if self.bar is not None and self.first_update < self.total_updates:
            self.bar.start()
            self.bar_task = self.bar.add_task(
                "training", total=self.total_updates, completed=self.first_update
            )

    def show(self, update: int) -> None:
        """Move the bar, or print a line once per interval; `update` has just ended."""
        now = time.monotonic()
        interval_s = REFRESH_S if self.bar is not None else self.plan.run.log.every_s
        if not self.enabled or now - self.last_print_time < interval_s:
            return
        self.last_print_time = now
        if self.bar is not None:
            self.bar.update(self.bar_task, completed=update + 1, refresh=True)
            return
        epoch = self._epoch_text(update // self.plan.training_length.updates_per_epoch)
        print(
            f"{epoch}  update {update + 1:,} of {self.total_updates:,}"
            f"  {self._time_left(update + 1)}",
            flush=True,
        )

    def note(self, text: str) -> None:
        """Print a line while the run trains."""
        print(f"note      {text}", flush=True)

    def end_evaluation(self) -> None:
        """Print the latest evaluation."""
        if not self.enabled:
            return
        totals = self.totals
        loss = "-" if totals.train_loss is None else f"{totals.train_loss:.4f}"
        result = f"loss {loss}"
        if "validation_metrics" in totals.evaluations:
            result += f"  validation {metric_text(totals.evaluations['validation_metrics'])}"
        result += f"  test {metric_text(totals.test['metrics'])}"
        if sum(accuracy is not None for accuracy in totals.test["accuracy_per_block"]) > 1:
            result += f"  vote {percent(totals.test['test_accuracy_vote'])}"
        epoch = max(0, totals.update - 1) // self.plan.training_length.updates_per_epoch
        print(
            f"{self._epoch_text(epoch)}  {result}  {totals.rate:>8,.0f} samples/s"
            f"  {self._time_left(totals.update)}",
            flush=True,
        )

    def stop(self) -> None:
        """Remove the bar and show the cursor again."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the result, the run folder and the command to try next."""
        if not self.enabled:
            return
        self.stop()
        if self.first_update >= self.total_updates:
            print(self._already_finished_text())
        print()
        if summary["stop_reason"] is not None:
            print(f"stopped   {summary['stop_reason']}")
        if summary["status"] == "stopped" and summary["stop_reason"] is not None:
            print(f"folder  {self.out.resolve()}")
            done = f"update {summary['updates']:,} of {self.total_updates:,}"
            done = f"saved at {done}" if summary["updates"] else "nothing was trained yet"
            print(f"{done}; start the same command again to continue", flush=True)
            return
        result = f"test {self._result_text(summary)}" if summary["metrics"] else summary["status"]
        print(
            f"{result} after {pluralise(summary['updates'], 'update')} "
            f"({pluralise(summary['epochs'], 'epoch')}), {summary['wall_s']:.1f} s"
        )
        if summary["low_rank"]:
            saved = summary["traffic_saved"]
            print(
                f"low rank: {summary['compression']:.2f} x smaller, "
                f"{pluralise(len(summary['low_rank']), 'matrix', 'matrices')} as factors"
                + (
                    ""
                    if saved is None
                    else f"; {percent(saved)} less traffic between nodes than every-step"
                )
            )
        folder = self.out.resolve()
        print(f"folder  {folder}")
        is_final = summary["stop_reason"] is not None or any(length_dependent_parts(self.plan.run))
        command = _next_command(self.plan, self.comm.size, folder, is_final)
        print(f"next    {command}", flush=True)

    def _result_text(self, summary: Mapping[str, Any]) -> str:
        """Return the accuracy with its counts, or the first metric."""
        accuracy, samples = summary["test_accuracy"], self.plan.data.test.size
        if not self.plan.layout.task.counts_samples or accuracy is None:
            return metric_text(summary["metrics"] or {})
        return f"accuracy {percent(accuracy)} ({round(accuracy * samples):,} of {samples:,})"

    def _already_finished_text(self) -> str:
        text = (
            f"Nothing to do: this run already finished ({self.first_update:,} of "
            f"{self.total_updates:,} updates). Use "
        )
        if not any(length_dependent_parts(self.plan.run)):
            text += "--set epochs=... to extend it, or "
        return f"{text}--out DIR for a new run."

    def _epoch_text(self, epoch: int) -> str:
        """Return "epoch  3/10" for epoch 2, which is the third."""
        epochs = self.plan.training_length.epochs
        return f"epoch {epoch + 1:>{len(str(epochs))}}/{epochs}"

    def _time_left(self, updates_done: int) -> str:
        """Return the time of the remaining updates at the speed of this attempt."""
        elapsed_s = time.monotonic() - self.start_time
        per_update_s = elapsed_s / max(updates_done - self.first_update, 1)
        left_s = round(per_update_s * (self.total_updates - updates_done))
        hours, seconds = divmod(left_s, 3600)
        minutes, seconds = divmod(seconds, 60)
        clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"{clock} left"


def library_versions(comm: Comm) -> str:
    """Return the versions of Python, torch and MPI, in one line."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, {comm.library}"


def _place_text(plan: Plan) -> str:
    """Return where large data are; empty for small ones."""
    data = plan_data_memory(plan)
    return f"; {data.to_text()}" if data.node + data.disk >= LARGE_DATA_BYTES else ""


def _introduction(plan: Plan, comm: Comm, threads: int) -> list[str]:
    """Return the lines that open a run."""
    run, layout = plan.run, plan.layout
    train, test, mesh = plan.data.train, plan.data.test, layout.mesh
    parameters = sum(block.parameters for block in layout.block_layouts)
    head_parameters = sum(block.head_parameters for block in layout.block_layouts)
    settings = " ".join(f"{key} {value}" for key, value in run.optimizer.fields.items())
    shape = " x ".join(map(str, train.shape))
    held_out = plan.data.validation
    validation = "" if held_out is None else f", {held_out.size:,} validation"
    builds_all = "; every rank builds all layers, then keeps its own"
    return [
        f"dtrain {version('dtrain')}, {library_versions(comm)}",
        f"ranks     {mesh.ranks} = {pluralise(mesh.replicas, 'replica')} x "
        f"{pluralise(mesh.stages, 'stage')} on {pluralise(comm.node_count, 'host')}, "
        f"{pluralise(threads, 'thread')} each",
        f"data      {run.dataset.name}: {train.size:,} training{validation} and {test.size:,} test "
        f"samples of {shape}, {_target_text(plan)}{_place_text(plan)}",
        f"model     {run.model.name}: {parameters:,} parameters"
        + (f", {head_parameters:,} more in local heads" if head_parameters else "")
        + (builds_all if layout.model.builds_all_layers else ""),
        f"learning  {run.objective.name}, {run.schedule.name}, {run.sync.name}, "
        f"{run.optimizer.name} {settings}".rstrip()
        + ("" if run.optimizer_rest is None else f" and {run.optimizer_rest.name}"),
        *_partition_lines(plan),
        *(f"note      {line}" for line in plan_warnings(plan)),
        *(f"stage {stage:<3} {_stage_text(plan, stage)}" for stage in range(mesh.stages)),
    ]


def _target_text(plan: Plan) -> str:
    """Return the classes, or the shape of the targets."""
    task, train = plan.layout.task, plan.data.train
    if task.has_classes:
        return f"{train.classes} classes"
    return f"targets of {' x '.join(map(str, train.target_shape)) or '1'}, loss {task.loss_name}"


def _partition_lines(plan: Plan) -> list[str]:
    """Return the lines of assumed and frozen blocks."""
    lines, blocks = [], plan.layout.block_layouts
    if plan.blocks_assumed:
        count = pluralise(len(blocks), "block")
        lines.append(f"blocks    {count}, one per stage (the run file sets no number)")
    frozen = [block for block in blocks if block.frozen]
    if frozen:
        lines.append(
            f"frozen    {'block' if len(frozen) == 1 else 'blocks'} "
            f"{', '.join(str(block.spec.index) for block in frozen)}: "
            f"{sum(block.parameters for block in frozen):,} parameters keep their initial values"
        )
    return lines


def _stage_text(plan: Plan, stage: int) -> str:
    """Return the blocks of a stage with their layers."""
    layout = plan.layout
    names = {
        block: " ".join(layout.layer_specs[i].name for i in layout.block_layouts[block].layers)
        for block in layout.blocks_of_stage(stage)
    }
    return ", ".join(f"block {block}: {layers}" for block, layers in names.items())


def _next_command(plan: Plan, ranks: int, out: Path, is_final: bool) -> str:
    """Return a command that trains the run twice as long, or evaluates it where that is not
    possible (`is_final`), or exports it where no other process can import its objects; it can be
    pasted into a shell."""
    program = Path(sys.prefix) / "bin" / "dtrain"
    command = [str(program) if program.exists() else "dtrain"]
    is_run_file = plan.run.path.suffix == ".toml"
    parts = (plan.run.dataset, plan.run.model, plan.run.objective, plan.run.schedule, plan.run.sync)
    has_only_objects = plan.run.dataset.name == ARRAYS or not plan.run.path.exists()
    if has_only_objects or any(part.fingerprint for part in parts):
        return shlex.join([*command, "export", str(out), "model.pt"])
    if is_final or not is_run_file:
        return shlex.join([*command, "evaluate", str(out)])
    command += ["train", str(plan.run.path)]
    command += ["--ranks", str(ranks)] if ranks > 1 else []
    key, length = "epochs", plan.run.settings.epochs
    if length is None:
        key, length = "updates", plan.training_length.total_updates
    overrides = [text for text in plan.run.overrides if text.partition("=")[0].strip() != key]
    command += ["--out", str(out)]
    for override in [*overrides, f"{key}={2 * length}"]:
        command += ["--set", override]
    return shlex.join(command)


def _make_bar() -> Bar | None:
    """Return a bar, not started, where the output is a terminal and rich is installed."""
    columns = os.environ.get(TERMINAL_VARIABLE)
    # Launchers give ranks terminals of their own, whatever the output of the launcher is.
    is_launched = detect_launcher(os.environ) is not None
    if columns is None and (is_launched or not sys.stdout.isatty()):
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
        auto_refresh=False,  # its thread would take time from the training
    )
