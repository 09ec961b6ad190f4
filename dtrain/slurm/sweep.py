"""Sweeps under Slurm: one task of an array for each run, in one folder, with one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dtrain.config.out_folder import sweep_folder
from dtrain.config.run import RunConfig
from dtrain.config.sweep import SweepRun, read_sweep
from dtrain.errors import ConfigError
from dtrain.slurm.job_script import SlurmJob


def sweep_of_job(
    run_file: Path, settings: Sequence[str], array: str | None, out: Path | None
) -> Sequence[SweepRun]:
    """Return the runs of a run file's sweep; none where it describes a single run.

    Raises
    ------
    ConfigError
        `--array` is given, too.
    """
    runs = read_sweep(run_file, settings, out)
    if runs and array is not None:
        raise ConfigError(
            "submit.array-and-sweep",
            f"{run_file} has a [sweep] of {len(runs)} runs: leave --array {array} out, or add its "
            "key to the table [sweep]",
        )
    return runs


def array_of_sweep(
    job: SlurmJob, runs: Sequence[SweepRun], config: RunConfig, out: Path | None
) -> SlurmJob:
    """Return the job with one task for each run of a sweep.

    Parameters
    ----------
    config : RunConfig
        One of the runs.
    out : Path or None
        The folder of the sweep; default: `runs/` and the name of the run file.
    """
    folder = sweep_folder(out or Path("runs") / config.path.stem, config, runs).absolute()
    return dataclasses.replace(
        job,
        out=folder / "{value}",
        array_values=tuple(run.name for run in runs),
        array_settings=tuple(run.settings for run in runs),
    )
