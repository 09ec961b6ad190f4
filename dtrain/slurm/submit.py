"""Check a run against a site, write its job script into the run folder, and submit it.

Invariant: a run that the plan or the site refuses is refused before anything is queued. MPI is not
imported, so this works on a login node.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.checkpoint.files import replacing
from dtrain.config.out_folder import fill_keys
from dtrain.config.parse import read_run
from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.planning.data_memory import PROCESS_BYTES
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.placement_warnings import planned_warnings
from dtrain.planning.plan import Plan, make_plan
from dtrain.slurm.job_script import SlurmJob, render_script
from dtrain.slurm.site import Site, read_site
from dtrain.slurm.sweep import array_of_sweep, sweep_of_job

SCRIPT_NAME = "job.sh"


DEFAULT_MINUTES = 60


@dataclass(frozen=True)
class Submission:
    """A job that was written, and submitted unless it was a dry run.

    Attributes
    ----------
    job : SlurmJob
        What it asks for.
    script : Path or None
        Where the script lies; None in a dry run.
    text : str
        The script.
    job_id : str or None
        Slurm's number, without a scheduler that of the process; None in a dry run.
    notes : tuple of str
        What the user should know.
    """

    job: SlurmJob
    script: Path | None
    text: str
    job_id: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SubmitOptions:
    """Options of `submit`.

    Attributes
    ----------
    site : str
        Name of a profile, or path of a TOML file.
    nodes : int
        Number of nodes.
    time : str, optional
        Limit of one start as Slurm writes it: "30" (minutes), "2:00:00", "1-12". Default: one hour,
        without a scheduler none.
    out : Path, optional
        Run folder; default `runs/` and the name of the run file. In an array the values of its key
        are added, unless `out` holds the key in braces.
    settings : sequence of str
        ``KEY=VALUE`` as of `dtrain train --set`.
    array : str, optional
        ``KEY=A..B`` (whole numbers) or ``KEY=A,B,C``: one task per value.
    ranks_per_node : int, optional
        Default: that of the site; without it one per GPU, or one replica on each node.
    account, partition, after : str
        Options of sbatch; `after` is that of ``--dependency``.
    container, environment_archive : str
        As in `SlurmJob`.
    dry_run : bool
        Write and submit nothing.
    """

    site: str = "generic"
    nodes: int = 1
    time: str | None = None
    out: Path | None = None
    settings: Sequence[str] = ()
    array: str | None = None
    ranks_per_node: int | None = None
    account: str = ""
    partition: str = ""
    after: str = ""
    container: str = ""
    environment_archive: str = ""
    dry_run: bool = False


def submit(run_file: Path, options: SubmitOptions) -> Submission:
    """Write the job script of a run into its run folder, and submit it.

    Raises
    ------
    ConfigError
        The run does not fit the ranks or the site, or sbatch refuses the job.
    DataError
        The data are missing or damaged.
    """
    site = read_site(options.site)
    key, values = parse_array(options.array)
    sweep = sweep_of_job(run_file, options.settings, options.array, options.out)
    own = list(options.settings)
    tasks = [[*own, f"{key}={value}"] for value in values] or [own]
    tasks = [[*own, *run.settings] for run in sweep] or tasks
    runs = [read_run(run_file, task) for task in tasks]  # every key is checked before one queues
    job = _make_job(run_file, runs[0], site, options)
    job = array_of_sweep(job, sweep, runs[0], options.out) if sweep else job
    plans = [make_plan(run, job.ranks) for run in runs]
    notes = tuple(dict.fromkeys(n for plan in plans for n in check_job(job, site, plan)))
    text = render_script(job, site)
    if options.dry_run:
        return Submission(job, None, text, None, notes)
    script = _write_script(job, text)
    job_id = _sbatch(script) if site.has_slurm else _start(script)
    return Submission(job, script, text, job_id, notes)


def _make_job(run_file: Path, run: RunConfig, site: Site, options: SubmitOptions) -> SlurmJob:
    key, values = parse_array(options.array)
    per_node = options.ranks_per_node or _ranks_per_node(run, site, options.nodes)
    return SlurmJob(
        name=run_file.stem,
        dtrain=_program(),
        run_file=run_file.resolve(),
        out=_run_folder(run, options.out, key),
        settings=tuple(options.settings),
        nodes=options.nodes,
        ranks_per_node=per_node,
        cpus_per_rank=max(1, site.cores // per_node),
        minutes=parse_minutes(options.time, DEFAULT_MINUTES if site.has_slurm else 0),
        account=options.account,
        partition=options.partition,
        array_key=key,
        array_values=tuple(values),
        after=options.after,
        container=options.container,
        environment_archive=options.environment_archive,
    )


def check_job(job: SlurmJob, site: Site, plan: Plan) -> tuple[str, ...]:
    """Refuse a job that cannot run on a site; return notes.

    Raises
    ------
    ConfigError
        It names the first thing that does not fit, with the cure.
    """
    for_slurm = job.account or job.partition or job.after or job.environment_archive
    if not site.has_slurm and (job.nodes > 1 or for_slurm):
        raise ConfigError(
            "submit.no-scheduler",
            f"{site.description}: leave --nodes, --account, --partition, --after and --environment "
            "out, or name a --site with Slurm",
        )
    if site.account_required and not job.account:
        raise ConfigError(
            "submit.account", f"{site.description} needs an account: add --account PROJECT"
        )
    if site.max_hours and job.minutes > 60 * site.max_hours:
        raise ConfigError(
            "submit.time",
            f"--time asks for {job.minutes / 60:g} hours; {site.description} allows "
            f"{site.max_hours:g}: ask for less, the job requeues itself",
        )
    if site.gpus_per_node and job.ranks_per_node > site.gpus_per_node:
        raise ConfigError(
            "submit.gpus",
            f"{job.ranks_per_node} ranks per node share {site.gpus_per_node} GPUs: start at most "
            f"{site.gpus_per_node} ranks per node",
        )
    interval = plan.run.checkpoint.every_minutes
    if job.minutes and interval >= job.minutes:
        raise ConfigError(
            "submit.checkpoint-interval",
            f"[checkpoint] every-minutes = {interval:g}, and the job ends after {job.minutes}: set "
            "fewer minutes, or ask for more --time",
        )
    _check_memory(job, site, plan)
    notes = []
    if site.tested.startswith("rendered"):
        notes.append(f"the profile of {site.description} was never run there: {site.tested}")
    length = plan.training_length
    if plan.run.checkpoint.every == 0 and length.epochs == 1:
        notes.append(
            "the run has one epoch and no [checkpoint] every: a job that ends inside it saves at "
            "its signal only"
        )
    return (*notes, *planned_warnings(plan, job.ranks_per_node))


def parse_minutes(text: str | None, default: int = DEFAULT_MINUTES) -> int:
    """Return the minutes of a time limit as Slurm writes it, rounded up; without text, `default`.

    Raises
    ------
    ConfigError
        The text is no time.
    """
    if text is None:
        return default
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ConfigError(
            "submit.time-invalid",
            f"--time {text}: write minutes (30), hours (2:00:00) or days and hours (1-12)",
        )
    days, *numbers = (0 if group is None else int(group) for group in match.groups())
    first, second, third = numbers
    if match[1] is not None:  # days-hours:minutes:seconds
        seconds = ((24 * days + first) * 60 + second) * 60 + third
    elif match[4] is not None:  # hours:minutes:seconds
        seconds = (first * 60 + second) * 60 + third
    else:  # minutes:seconds
        seconds = 60 * first + second
    if seconds == 0:
        raise ConfigError("submit.time-invalid", f"--time {text}: give more than no time")
    return -(-seconds // 60)


def parse_array(text: str | None) -> tuple[str, list[str]]:
    """Return key and values of ``KEY=A..B`` or ``KEY=A,B,C``; without text, none.

    Raises
    ------
    ConfigError
        The text names no key or no values.
    """
    if text is None:
        return "", []
    key, _, values = text.partition("=")
    bounds = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", values)
    if bounds is not None:
        found = [str(value) for value in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        found = [value.strip() for value in values.split(",") if value.strip()]
    if not key or not found:
        raise ConfigError(
            "submit.array", f"--array {text}: write KEY=0..3 or KEY=0.1,0.01, with a key of the run"
        )
    return key, found


def _check_memory(job: SlurmJob, site: Site, plan: Plan) -> None:
    """Refuse a plan that needs more memory than a node or a GPU has."""
    largest = max(memory.peak for memory in MemoryPlan(plan).rank_memory())
    if site.gpus_per_node and site.gpu_memory_gb and largest > site.gpu_memory_gb * 1e9:
        raise ConfigError(
            "submit.gpu-memory",
            f"a rank needs {largest / 1e9:.1f} GB and a GPU of {site.description} has "
            f"{site.gpu_memory_gb:g} GB: set more [mesh] stages, micro-batches, or [partition] "
            "recompute",
        )
    node = job.ranks_per_node * (largest + PROCESS_BYTES)
    if site.memory_per_node_gb and node > site.memory_per_node_gb * 1e9:
        raise ConfigError(
            "submit.memory",
            f"{job.ranks_per_node} ranks of a node need {node / 1e9:.1f} GB and a node of "
            f"{site.description} has {site.memory_per_node_gb:g} GB: set fewer --ranks-per-node, "
            "or more --nodes",
        )


def _ranks_per_node(run: RunConfig, site: Site, nodes: int) -> int:
    if site.ranks_per_node:
        return site.ranks_per_node
    if site.gpus_per_node:
        return site.gpus_per_node
    stages = run.mesh.stages or 1
    return stages if stages % nodes or nodes > stages else stages // nodes


def _run_folder(run: RunConfig, out: Path | None, key: str) -> Path:
    """Return the absolute run folder; that of an array holds `{value}`."""
    folder = Path("runs") / run.path.stem if out is None else out
    if key:
        braces = f"{{{key}}}"
        text = str(folder)
        text = text.replace(braces, "{value}") if braces in text else f"{text}-{key}={{value}}"
        before, _, after = text.partition("{value}")
        return Path(f"{fill_keys(Path(before), run).absolute()}{{value}}{after}")
    return fill_keys(folder, run).absolute()


def _program() -> str:
    """Return the path of `dtrain` of this environment."""
    beside = Path(sys.executable).with_name("dtrain")
    return str(beside) if beside.exists() else (shutil.which("dtrain") or "dtrain")


def _write_script(job: SlurmJob, text: str) -> Path:
    folder = job.out.parent if job.array_values else job.out
    name = f"{job.name}-{SCRIPT_NAME}" if job.array_values else SCRIPT_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for value in job.array_values:
            job.out_of(value).mkdir(parents=True, exist_ok=True)
        path = folder / name
        with replacing(path) as draft:
            draft.write_text(text, encoding="utf-8")
            mode = draft.stat().st_mode
            draft.chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may run it
    except OSError as error:
        raise ConfigError(
            "submit.unwritable", f"cannot write the job script into {folder}: {error.strerror}"
        ) from error
    return path


def _sbatch(script: Path) -> str:
    """Submit a script; return the number of the job."""
    command = ["sbatch", "--parsable", str(script)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            "submit.no-slurm",
            f"there is no sbatch here: the script is {script}; submit it on a login node by "
            f"`{shlex.join(command)}`",
        ) from error
    if result.returncode:
        reason = " ".join((result.stderr or result.stdout).split())
        raise ConfigError("submit.refused", f"sbatch refuses {script}: {reason}")
    return result.stdout.strip().partition(";")[0]


def _start(script: Path) -> str:
    """Start a script on this machine, apart from this terminal; return the number of the process.

    Its output is appended to a file beside it.
    """
    with script.with_suffix(".log").open("ab") as log:
        child = subprocess.Popen(
            [str(script)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return str(child.pid)
