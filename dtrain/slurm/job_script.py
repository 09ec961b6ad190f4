"""Job scripts, made by one template from a job and a site.

Invariant: `render_script` is a pure function.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from dtrain.slurm.site import Site

TEMPLATES = {"slurm": "job.sh.jinja", "none": "local.sh.jinja"}
"""By the scheduler of the site."""


REQUEUE_BUDGET = 3
"""Starts in a row without a further update after which a job is not started again."""


@dataclass(frozen=True)
class SlurmJob:
    """One job: what is trained, and on which resources.

    Attributes
    ----------
    name : str
        Name of the job.
    dtrain : str
        Path of the program `dtrain` on the nodes.
    run_file, out : Path
        Absolute paths of the run file and of the run folder. In an array, `{value}` in `out` stands
        for the task's value.
    settings : tuple of str
        `--set KEY=VALUE` for all tasks.
    nodes, ranks_per_node, cpus_per_rank : int
        Resources.
    minutes : int
        Time limit of one start; 0: none.
    account, partition : str
        "": not given.
    array_key : str
        Dotted key that the tasks of an array set; "": no array.
    array_values : tuple of str
        The value of each task; in a sweep the name of its run.
    array_settings : tuple of tuple of str
        ``KEY=VALUE`` of each task, in a sweep.
    after : str
        A dependency of `sbatch --dependency`; "": none.
    container : str
        Path of an Apptainer image in which the ranks run, with its own `dtrain`; "": none.
    environment_archive : str
        A packed environment (tar), broadcast to the disks of the nodes; "": none.
    """

    name: str
    dtrain: str
    run_file: Path
    out: Path
    settings: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    cpus_per_rank: int
    minutes: int
    account: str = ""
    partition: str = ""
    array_key: str = ""
    array_values: tuple[str, ...] = ()
    array_settings: tuple[tuple[str, ...], ...] = ()
    after: str = ""
    container: str = ""
    environment_archive: str = ""

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def task_settings(self) -> tuple[tuple[str, ...], ...]:
        """``KEY=VALUE`` of each task of an array."""
        return self.array_settings or tuple(
            (f"{self.array_key}={value}",) for value in self.array_values
        )

    @property
    def table(self) -> Path:
        """The table of a sweep, as CSV."""
        return self.out.parent / "sweep.csv"

    def out_of(self, value: str) -> Path:
        """Return the run folder of a task of an array."""
        return Path(str(self.out).replace("{value}", value))


def render_script(job: SlurmJob, site: Site) -> str:
    """Return the job script.

    Parameters
    ----------
    job : SlurmJob
        What is trained, and on which resources.
    site : Site
        The profile of the site.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    hours, minutes = divmod(job.minutes, 60)
    return environment.get_template(TEMPLATES[site.scheduler]).render(
        job=job,
        site=site,
        lead=min(site.signal_lead_s, 20 * job.minutes),  # a third of a short limit
        time=f"{hours:02}:{minutes:02}:00",
        log=_log_pattern(job),
        budget=REQUEUE_BUDGET,
        sets=lambda settings: shlex.join(word for text in settings for word in ("--set", text)),
    )


def _log_pattern(job: SlurmJob) -> str:
    """Return the path of the log; the tasks of an array share a folder."""
    if job.array_values:
        return str(job.out.parent / f"{job.name}-%A_%a.log")
    return str(job.out / "slurm-%j.log")
