"""Profiles of computing sites: nodes, partitions and the flags that their Slurm needs.

A profile is a TOML file. Those of `sites/` come with dtrain; a path names a user's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.errors import ConfigError, unknown_name
from dtrain.paths import expand_path
from dtrain.schema import from_table, load_toml

SITES = Path(__file__).parent / "sites"


SCHEDULERS = ("slurm", "none")


@dataclass(frozen=True)
class Site:
    """One site, or one partition of it.

    Attributes
    ----------
    description : str
        Name of the machine.
    tested : str
        What of this profile was tested, and where.
    cores_per_node : int
        Cores that a job may use on a node; 0: all of this machine, without a scheduler only.
    memory_per_node_gb : float
        Memory that a job may use on a node, in 10^9 bytes; 0: unknown.
    gpus_per_node : int
        0: the ranks compute on CPUs.
    gpu_memory_gb : float
        Memory of one GPU, in 10^9 bytes; 0: unknown.
    ranks_per_node : int
        0: one rank per GPU, or on CPUs one replica per node.
    max_hours : float
        Longest job; 0: unknown.
    partition : str
        "": the default one of the site.
    options : tuple of str
        Further lines of `#SBATCH`.
    account_required : bool
        Whether a job needs `--account`.
    modules : tuple of str
        Modules to load, in order.
    setup : tuple of str
        Lines of bash after the modules.
    environment : dict of str to str
        Variables to export.
    mpi : str
        Value of `srun --mpi`; "": no such option.
    srun : tuple of str
        Further options of `srun`: binding, GPUs.
    container : tuple of str
        Options of `apptainer exec` on this machine.
    scheduler : str
        "slurm", or "none": the job runs on this machine, and its script starts it again.
    signal_lead_s : int
        Seconds before the time limit at which Slurm sends the signal to save.
    node_disk : str
        A folder on a disk of the node, for a broadcast environment; may hold variables.
    """

    description: str
    tested: str
    cores_per_node: int
    memory_per_node_gb: float = 0.0
    gpus_per_node: int = 0
    gpu_memory_gb: float = 0.0
    ranks_per_node: int = 0
    max_hours: float = 0.0
    partition: str = ""
    options: tuple[str, ...] = ()
    account_required: bool = False
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    mpi: str = "pmix"
    srun: tuple[str, ...] = ()
    container: tuple[str, ...] = ()
    scheduler: str = "slurm"
    signal_lead_s: int = 180
    node_disk: str = "/tmp"

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise unknown_name("scheduler", self.scheduler, SCHEDULERS)
        if self.cores_per_node < self.has_slurm:
            raise ConfigError(
                "site.cores", f"cores-per-node = {self.cores_per_node}: give a number from 1"
            )

    @property
    def has_slurm(self) -> bool:
        """Whether Slurm starts the jobs."""
        return self.scheduler == "slurm"

    @property
    def cores(self) -> int:
        """Cores that a job may use on a node."""
        return self.cores_per_node or len(os.sched_getaffinity(0))


def site_names() -> list[str]:
    """Return the names of the profiles that come with dtrain."""
    return sorted(path.stem for path in SITES.glob("*.toml"))


def read_site(name: str) -> Site:
    """Return the profile of a name, or of the path of a TOML file.

    Raises
    ------
    ConfigError
        There is no such profile, or it is not valid.
    """
    path = expand_path(name, "--site")
    if path.suffix != ".toml":
        path = SITES / f"{name}.toml"
        if name not in site_names():
            raise unknown_name("site", name, [*site_names(), "PATH/TO/SITE.toml"])
    return from_table(Site, load_toml(path, "site profile"), f"{path.name}: ")
