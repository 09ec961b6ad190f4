"""The examination of this process, and of several ranks: facts, then checks, then areas."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.comm.launch_refusals import pmi_variables, start_advice
from dtrain.comm.launcher import find_mpirun, rank_environment, start_ranks
from dtrain.comm.launcher_detection import Launch, detect_launcher, is_pty_shell
from dtrain.doctor import files, launch, mpi, node
from dtrain.doctor.finding import Area, Finding, area_from_table, finding_of, report_text
from dtrain.doctor.library import library_files
from dtrain.doctor.node import NodeFacts
from dtrain.doctor.probe import mpi_facts, probe_mpi
from dtrain.errors import ConfigError

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm

RANKS_LIMIT_S = 150
"""Seconds that the examination of several ranks may take."""


FAST_NETWORKS = ("sys/class/infiniband", "sys/class/cxi")
"""Where the kernel lists InfiniBand, Omni-Path and Slingshot devices."""


DISPLAY_VARIABLE = "OMPI_MCA_ompi_display_comm"
"""Lets Open MPI print its table of transports when it starts."""


WATCHER = """
import os, select, signal, sys
parent, late = os.getppid(), not select.select([0], [], [], float(sys.argv[1]))[0]
if late or os.read(0, 1) != b".":
    sys.stderr.write(sys.argv[2] if late else sys.argv[3])
    sys.stderr.flush()
if late:
    os.kill(parent, signal.SIGKILL)
"""
"""Program that kills its parent after a time, unless the parent has written a dot before."""


def is_one_of_several_ranks(environ: Mapping[str, str], started_by_shell: bool) -> bool:
    """Return whether a launcher started this process among others."""
    found = detect_launcher(environ)
    return found is not None and found.size > 1 and not is_pty_shell(found, started_by_shell)


def examine_process(
    environ: Mapping[str, str], folder: Path, started_by_shell: bool, ranks: int | None = None
) -> list[Area]:
    """Return the areas MPI, node and run folder of this process, which is no rank.

    Parameters
    ----------
    ranks : int, optional
        Ranks that shall run on this host.
    """
    own = node.node_facts()
    return [
        examine_mpi(environ, started_by_shell, own.gpus),
        _node_area([own], environ, ranks),
        folder_area(folder),
    ]


def examine_mpi(environ: Mapping[str, str], started_by_shell: bool, gpus: int = 0) -> Area:
    """Return the area of MPI; the library starts in a subprocess.

    A shell with the variables of a process manager is a task of it. The library starts without
    them there: a task that ends without a farewell would end its whole Slurm step.
    """
    found, clean_environ = detect_launcher(environ), rank_environment(environ)
    variables = pmi_variables(environ)
    facts = clean = probe_mpi(clean_environ if found or variables else environ)
    if facts.outcome in ("failed", "hangs"):
        clean = probe_mpi(clean_environ)
    library = clean.library
    findings = [
        *(mpi.check_environment(clean, facts) or mpi.check_library(facts, environ)),
        *mpi.check_files(clean.files, library_files()),
        *mpi.check_gpu_awareness(clean, gpus),
        *mpi.check_wheels(installed_wheels(), environ),
        *(launch.check_pty_shell(environ, started_by_shell) or launch.check_leftovers(environ)),
        *launch.check_mpirun(environ, library),
        *launch.check_slurm(environ, library),
    ]
    summary = f"{mpi.library_summary(clean)}, {launch.launch_summary(found)}"
    return Area("MPI", summary, findings, asdict(clean))


def installed_wheels() -> list[str]:
    """Return the MPI wheels of this Python."""
    names = []
    for name in mpi.MPI_WHEELS:
        with suppress(PackageNotFoundError):
            distribution(name)
            names.append(name)
    return names


def _node_area(
    ranks: list[NodeFacts],
    environ: Mapping[str, str],
    ranks_here: int | None = None,
    further: tuple[Finding, ...] = (),
) -> Area:
    """Return the area of the nodes of these ranks."""
    findings = list(further)
    for node_key in dict.fromkeys((rank.host, rank.boot) for rank in ranks):
        here = [rank for rank in ranks if (rank.host, rank.boot) == node_key]
        findings += node.check_cores(here, environ, ranks_here)
        findings += node.check_gpus(here, environ, ranks_here)
    findings += node.check_host_names(ranks)
    facts = {"ranks": [asdict(rank) for rank in ranks]}
    return Area("node", node.node_summary(ranks, environ), findings, facts)


def folder_area(folder: Path, further: tuple[Finding, ...] = ()) -> Area:
    """Return the area of the run folder."""
    facts = files.facts_within_limit(folder)
    findings = [*files.check_folder(facts), *further]
    return Area("run folder", files.folder_summary(facts), findings, asdict(facts))


# ---- several ranks


@contextmanager
def time_limit(limit_s: float, late: str, ended: str) -> Iterator[None]:
    """Kill this process if what is inside takes longer; print `ended` if it ends the process.

    Python's signal handlers do not run while a library blocks, so another process watches.
    """
    argv = [sys.executable, "-I", "-S", "-c", WATCHER, str(limit_s), late, ended]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True) as watcher:
        assert watcher.stdin is not None
        try:
            yield
        finally:
            watcher.stdin.write(b".")
            watcher.stdin.close()


@contextmanager
def captured_output() -> Iterator[list[str]]:
    """While inside, collect what the process prints on stdout; afterwards the list has it."""
    texts: list[str] = []
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield texts
        finally:
            ctypes.CDLL(None).fflush(None)  # MPI prints through a buffer of the C library
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))


def examine_ranks(comm: Comm, display: str, environ: Mapping[str, str], folder: Path) -> list[Area]:
    """Return all areas of the ranks of a world. Collective over the group."""
    from dtrain.doctor import network

    facts, own = mpi_facts(), node.node_facts()
    findings = [
        *mpi.check_library(facts, environ),
        *mpi.check_files(facts.files, library_files()),
        *mpi.check_gpu_awareness(facts, own.gpus),
        *mpi.check_wheels(installed_wheels(), environ),
        *launch.check_ranks(environ, comm.size, comm.library),
    ]
    found = detect_launcher(environ)
    summary = f"{mpi.library_summary(facts)}, {launch.launch_summary(found)}"
    areas = [Area("MPI", summary, findings, asdict(facts))]

    rows = comm.allgather_object(asdict(own))
    offsets = network.measure_clock_offsets(comm)
    clocks = tuple(node.check_clocks(comm.hosts, offsets))
    areas.append(_node_area([NodeFacts(**row) for row in rows], environ, further=clocks))

    blind = tuple(_check_visible(comm, folder))
    areas.append(folder_area(folder, blind) if comm.rank == 0 else Area("run folder", ""))

    links = network.measure_links(comm)
    transports = network.parse_transports(display)
    findings = network.check_links(links, transports, _has_fast_network())
    table: dict[str, Any] = {"links": network.links_table(links), "transports": transports}
    table |= {"nodes": comm.node_count, "clock_offsets_s": offsets}
    areas.append(Area("network", network.network_summary(links, transports), findings, table))
    return areas


def _has_fast_network(root: Path = Path("/")) -> bool:
    """Return whether the kernel lists a device of a fast network."""
    return any((root / place).is_dir() and any((root / place).iterdir()) for place in FAST_NETWORKS)


def _check_visible(comm: Comm, folder: Path) -> list[Finding]:
    """Return the finding of a folder that some ranks do not see. Collective over the group."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    name = ""
    if comm.rank == 0:
        with suppress(OSError):
            name = f".dtrain-doctor-{uuid.uuid4().hex}"
            (place / name).touch()
    place, name = comm.allgather_object([str(place), name])[0]
    file = Path(place) / name
    sees = comm.allgather_object(_appears(file) if name else True)
    if comm.rank == 0 and name:
        with suppress(OSError):
            file.unlink()
    return files.check_visible(Path(place), comm.hosts, sees)


def _appears(file: Path) -> bool:
    """Return whether a file of another host is visible within some seconds."""
    deadline = time.monotonic() + 5.0
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def end_texts(found: Launch) -> tuple[str, str]:
    """Return the texts for a rank that does not answer, and for one that MPI ends at its start."""
    findings = (
        Finding(
            "mpi.start-hangs",
            "problem",
            f"MPI, or one of {found.size} ranks, does not answer within {RANKS_LIMIT_S} s",
            "run `dtrain doctor` without a launcher on each node, then on two ranks of one node",
        ),
        Finding(
            "mpi.start-fails",
            "problem",
            f"the MPI library ended this rank of {found.launcher} when it started",
            start_advice(found, find_mpirun(os.environ)),
        ),
    )
    late, ended = (report_text([Area("MPI", "", [finding])]) + "\n" for finding in findings)
    return late, ended


def start_findings(error: ConfigError, environ: Mapping[str, str]) -> list[Finding]:
    """Return the findings of ranks that dtrain refuses to start."""
    return launch.check_ranks(environ, None, "") or [finding_of(error)]


def examine_own_ranks(ranks: int, folder: Path, environ: Mapping[str, str]) -> Area:
    """Start ranks on this host and return the area of their network."""
    with tempfile.TemporaryDirectory(prefix="dtrain-doctor-") as place:
        file = Path(place) / "report.json"
        argv = [sys.executable, "-P", "-m", "dtrain", "doctor", "--out", str(folder)]
        try:
            code = start_ranks(ranks, [*argv, "--report-file", str(file)], environ)
        except ConfigError as error:
            return Area("network", "", [finding_of(error)])
        if not file.exists():
            finding = Finding(
                "network.ranks-fail",
                "problem",
                f"{ranks} ranks on this host end with exit code {code} before they report",
                "read their messages above; try `dtrain doctor` without --full",
            )
            return Area("network", "", [finding])
        areas = json.loads(file.read_text(encoding="utf-8"))["areas"]
    return replace(area_from_table(areas[-1]), name="network")  # of refused ranks it is MPI's
