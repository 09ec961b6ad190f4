"""The command `dtrain submit`.

Invariant: it imports no MPI and works on a login node.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(commands: Commands) -> None:
    """Add the command to those of `dtrain`."""
    parser = commands.add_parser(
        "submit",
        help="write, check and submit a job script for Slurm",
        description="Check a run against a site, write its job script into the run folder, and "
        "submit it. The job saves before its time ends, requeues itself, and resumes.",
    )
    add = parser.add_argument
    add("run_file", type=Path, metavar="RUN.toml", help="run file")
    add("--site", default="generic", help="profile of the site, or a TOML file of your own")
    add("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    add("--time", metavar="T", help="time limit of one start: 30, 2:00:00, 1-12 (default: 1:00:00)")
    add("--out", type=Path, metavar="DIR", help="run folder (default: runs/<run file>)")
    add(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="override a key",
    )
    add("--array", metavar="KEY=A..B", help="one job per value: seed=0..3, optimizer.lr=0.1,0.01")
    add("--ranks-per-node", type=int, metavar="N", help="default: by the site and [mesh] stages")
    add("--account", default="", metavar="NAME", help="account of the job")
    add("--partition", default="", metavar="NAME", help="partition, if not that of the profile")
    add("--after", default="", metavar="RULE", help="--dependency of sbatch: afterany:123")
    add("--container", default="", metavar="IMAGE", help="run inside this Apptainer image")
    add(
        "--environment",
        default="",
        dest="environment_archive",
        metavar="TAR",
        help="packed environment, broadcast to the disks of the nodes",
    )
    add("--dry-run", action="store_true", help="print the script; write and submit nothing")
    parser.set_defaults(command=_submit)


def _submit(options: argparse.Namespace) -> int:
    """Submit the job; print its number, its folder and how to follow it."""
    from dataclasses import fields

    from dtrain.slurm.submit import SubmitOptions, submit

    words = {field.name: getattr(options, field.name) for field in fields(SubmitOptions)}
    done = submit(options.run_file, SubmitOptions(**words))
    for note in done.notes:  # a script that is printed may be piped
        print(f"note    {note}", file=sys.stderr if options.dry_run else sys.stdout)
    if options.dry_run:
        print(done.text, end="")
        return 0
    job = done.job
    folders = [job.out_of(value) for value in job.array_values] or [job.out]
    if job.array_settings:  # a sweep
        folders = [job.out.parent]
    limit = f", {job.minutes} minutes" if job.minutes else ""
    print(f"job     {done.job_id}: {job.nodes} x {job.ranks_per_node} ranks{limit}")
    for folder in folders:
        print(f"folder  {folder}")
    print(f"script  {done.script}")
    print(f"follow  dtrain status {folders[0]}")
    return 0
