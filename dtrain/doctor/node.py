"""Checks of the node: cores, threads, GPUs, and names and clocks of several nodes."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from dtrain.doctor.finding import Finding

CLOCK_NOTE_S, CLOCK_PROBLEM_S = 1.0, 60.0
"""Skew of clocks that is worth a note, and that misleads readers of logs and make-like tools."""


@final
@dataclass(frozen=True)
class NodeFacts:
    """One rank, or this process, on its node.

    Attributes
    ----------
    boot : str
        Identifies the running kernel, so that two nodes of one name are told apart.
    cores : sequence of int
        Cores that the process may use.
    cores_of_node : int
        Cores of the node.
    siblings : sequence of (sequence of int)
        Cores that share one physical core, each group once.
    gpus : int
        GPUs that torch sees.
    has_gpu_driver : bool
        Whether the kernel has a driver for GPUs.
    torch_build : str
        "cuda", "rocm" or "cpu".
    """

    host: str
    boot: str
    cores: Sequence[int]
    cores_of_node: int
    siblings: Sequence[Sequence[int]] = ()
    gpus: int = 0
    has_gpu_driver: bool = False
    torch_build: str = "cpu"


def node_facts(root: Path = Path("/")) -> NodeFacts:
    """Return the facts of this process; imports torch. `root` holds `proc` and `sys`."""
    import torch

    affinity = getattr(os, "sched_getaffinity", None)
    count = os.cpu_count() or 1
    cores = sorted(affinity(0)) if affinity else list(range(count))
    build = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"
    return NodeFacts(
        host=platform.node(),
        boot=_read(root / "proc/sys/kernel/random/boot_id"),
        cores=cores,
        cores_of_node=count,
        siblings=read_siblings(cores, root),
        gpus=torch.cuda.device_count(),
        has_gpu_driver=(root / "proc/driver/nvidia/version").exists()
        or (root / "sys/module/amdgpu/version").exists(),
        torch_build=build,
    )


def read_siblings(cores: Sequence[int], root: Path = Path("/")) -> list[list[int]]:
    """Return the usable cores by physical core; empty where the kernel does not tell."""
    groups = {
        _read(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        for core in cores
    }
    usable = set(cores)
    return sorted(sorted(usable & set(parse_cores(text))) for text in groups if text)


def parse_cores(text: str) -> list[int]:
    """Return the numbers of a list of the kernel's, such as "0,4" or "0-3,8"."""
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return cores


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def check_cores(
    ranks: Sequence[NodeFacts], environ: Mapping[str, str], ranks_here: int | None = None
) -> list[Finding]:
    """Return the findings about the cores of one node.

    Parameters
    ----------
    ranks : sequence of NodeFacts
        The ranks of the node, or this process alone.
    ranks_here : int, optional
        Ranks that shall run on the node; default: those of `ranks`.
    """
    count = ranks_here or len(ranks)
    union = {core for rank in ranks for core in rank.cores}
    host = ranks[0].host
    return [
        *_check_binding(ranks, union, host),
        *_check_threads(ranks, environ, count, len(union), host),
        *_check_smt(ranks, environ, host),
        *_check_srun_cpus(environ),
    ]


def _check_binding(ranks: Sequence[NodeFacts], union: set[int], host: str) -> list[Finding]:
    """Return the finding of ranks that are bound to the same few cores of a larger node."""
    if len(ranks) < 2 or len(union) >= min(len(ranks), ranks[0].cores_of_node):
        return []
    return [
        Finding(
            "node.bound-together",
            "problem",
            f"{len(ranks)} ranks of {host} are bound to {_cores_text(len(union))}, of "
            f"{ranks[0].cores_of_node} that it has",
            "give each rank cores of its own: `srun --cpus-per-task=C --cpu-bind=cores`, or mpirun "
            "with `--bind-to none`",
        )
    ]


def _check_threads(
    ranks: Sequence[NodeFacts], environ: Mapping[str, str], count: int, cores: int, host: str
) -> list[Finding]:
    """Return the finding of more threads, or more ranks, than cores."""
    setting = environ.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = int(setting) if setting.isdigit() else None
    own = min(len(rank.cores) for rank in ranks)
    if threads is not None and (threads > own or threads * count > cores):
        best = max(1, min(own, cores // count))
        return [
            Finding(
                "node.too-many-threads",
                "problem",
                f"OMP_NUM_THREADS is {threads}, and {host} has {_cores_text(cores)} for "
                f"{count} x {threads} threads ({own} for a rank)",
                f"set OMP_NUM_THREADS={best}, or ask for more cores per rank "
                "(`--cpus-per-task`, `export SRUN_CPUS_PER_TASK`)",
            )
        ]
    if count > cores:
        return [
            Finding(
                "node.oversubscribed",
                "note",
                f"{host} has {_cores_text(cores)} for {count} ranks: they take turns, and times "
                "are those of a test",
                "start at most as many ranks as cores where speed matters",
            )
        ]
    return []


def _check_smt(ranks: Sequence[NodeFacts], environ: Mapping[str, str], host: str) -> list[Finding]:
    """Return the finding of compute threads on both halves of physical cores."""
    shared = [rank for rank in ranks if any(len(group) > 1 for group in rank.siblings)]
    if not shared:
        return []
    physical, logical = len(shared[0].siblings), len(shared[0].cores)
    setting = environ.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = int(setting) if setting.isdigit() else logical // len(ranks)
    if threads <= physical:
        return []
    return [
        Finding(
            "node.smt",
            "note",
            f"{host} counts {logical} cores on {physical} physical ones: two threads of dense "
            "arithmetic on one physical core are no faster than one",
            f"set OMP_NUM_THREADS={physical}, or `--hint=nomultithread` in the job",
        )
    ]


def _check_srun_cpus(environ: Mapping[str, str]) -> list[Finding]:
    """Return the finding of a batch job whose `--cpus-per-task` does not reach srun."""
    cpus = environ.get("SLURM_CPUS_PER_TASK", "1")
    in_step = "SLURM_STEP_NUM_TASKS" in environ
    if cpus == "1" or in_step or environ.get("SRUN_CPUS_PER_TASK"):
        return []
    return [
        Finding(
            "node.srun-cpus",
            "note",
            f"the job has --cpus-per-task={cpus}, which srun does not inherit since Slurm 22.05",
            f"export SRUN_CPUS_PER_TASK={cpus} before srun",
        )
    ]


def _cores_text(count: int) -> str:
    return f"{count} core" if count == 1 else f"{count} cores"


def check_gpus(
    ranks: Sequence[NodeFacts], environ: Mapping[str, str], ranks_here: int | None = None
) -> list[Finding]:
    """Return the findings about the GPUs of one node."""
    first, count = ranks[0], ranks_here or len(ranks)
    if first.has_gpu_driver and not first.gpus:
        return [_unseen_gpus(first, environ)]
    if first.gpus and (count > first.gpus or count % first.gpus) and count > 1:
        bound = first.gpus == 1 and "SLURM_GPUS_PER_TASK" in environ
        if not bound:
            return [
                Finding(
                    "node.gpus-unequal",
                    "note",
                    f"{first.host} has {count} ranks and {first.gpus} GPUs that torch sees: GPUs "
                    "are shared unequally, or some idle",
                    f"start {first.gpus} ranks on the node, one per GPU",
                )
            ]
    return []


def _unseen_gpus(facts: NodeFacts, environ: Mapping[str, str]) -> Finding:
    """Return the finding of GPUs that torch does not see."""
    hidden = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES"))
    if facts.torch_build == "cpu":
        cause, cure = "torch is a build for CPUs", "install a torch for this driver (pytorch.org)"
    elif hidden == "":
        cause = "CUDA_VISIBLE_DEVICES is empty"
        cure = "ask the job for GPUs (`--gres=gpu:N`), or unset it"
    else:
        cause = "the job has none, or the driver is too old for this torch"
        cure = "ask the job for GPUs (`--gres=gpu:N`), and compare `nvidia-smi` with torch's CUDA"
    return Finding(
        "node.gpu-unseen",
        "problem",
        f"{facts.host} has GPUs that torch does not see: {cause}",
        cure,
    )


def check_host_names(ranks: Sequence[NodeFacts]) -> list[Finding]:
    """Return the finding of different nodes with one name."""
    boots: dict[str, set[str]] = {}
    for rank in ranks:
        boots.setdefault(rank.host, set()).add(rank.boot)
    return [
        Finding(
            "node.same-host-name",
            "note",
            f"{len(kernels)} different nodes are named {host}: dtrain groups ranks by what shares "
            "memory, but its log and `dtrain flight` name hosts",
            "give each node or container its own host name (`--hostname`)",
        )
        for host, kernels in boots.items()
        if len(kernels - {""}) > 1
    ]


def check_clocks(hosts: Sequence[str], offsets_s: Sequence[float]) -> list[Finding]:
    """Return the finding of clocks that differ from that of rank 0."""
    worst = max(range(len(hosts)), key=lambda rank: abs(offsets_s[rank]))
    skew = abs(offsets_s[worst])
    if skew < CLOCK_NOTE_S:
        return []
    return [
        Finding(
            "node.clock-skew",
            "problem" if skew >= CLOCK_PROBLEM_S else "note",
            f"the clock of {hosts[worst]} differs by {skew:.1f} s from that of {hosts[0]}: times "
            "in logs and file times mislead",
            "let the administrator start NTP or chrony on the node",
        )
    ]


def node_summary(ranks: Sequence[NodeFacts], environ: Mapping[str, str]) -> str:
    """Return the line of the nodes of these ranks."""
    hosts = list(dict.fromkeys(rank.host for rank in ranks))
    union = {core for rank in ranks if rank.host == hosts[0] for core in rank.cores}
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    threads = environ.get("OMP_NUM_THREADS")
    parts = [
        f"{shown}: {_cores_text(len(union))} of {ranks[0].cores_of_node}",
        f"OMP_NUM_THREADS {threads}" if threads else "threads by cores",
        f"{ranks[0].gpus} GPUs" if ranks[0].gpus else "no GPU",
    ]
    return ", ".join(parts)
