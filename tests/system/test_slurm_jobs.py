"""Jobs of `dtrain submit` on four Slurm hosts survive time limits, signals and dead nodes.

All cases run at the same time, each in a thread; a test asks for the result of its case.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import SAVED_CODE, HangError
from dtrain.slurm.job_script import REQUEUE_BUDGET, render_script
from dtrain.slurm.site import read_site
from tests import cluster as hosts
from tests.conftest import ROOT
from tests.need import lack
from tests.outcome import summary
from tests.process import carriers, command, start
from tests.rule.test_submit import SITES, VARIANTS
from tests.rule.test_submit import job as job_on_site
from tests.system.slurm_bench import (
    CHECKPOINT,
    UPDATES,
    VERY_SLOW_S,
    Bench,
    Job,
    bench_environment,
    dtrain_path,
    host_link,
    program,
    set_pace,
)

pytestmark = pytest.mark.timeout(900)

FULL = os.environ.get("DTRAIN_FULL") == "1"

LINK_DOWN_S = 60 if FULL else 8
"""Slurm calls a node down that is silent for 20 s here, by default for 300 s."""


WITHOUT_MPI = """
import sys
sys.modules["mpi4py"] = None
from dtrain.cli import main
sys.exit(main(sys.argv[1:]))
"""

Case = Callable[[Bench], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register a case by its name."""
    CASES[function.__name__] = function
    return function


@case
def time_limit(bench: Bench) -> None:
    """The generic profile with a limit of two minutes, from a login node without MPI."""
    out, pace = bench.folder / "generic", bench.pace("generic")
    words = ["submit", bench.run_file, "--nodes", "4", "--ranks-per-node", "1", "--time", "2"]
    words += ["--out", out, "--set", f"model.pace={pace}"]
    out_text = submit_command([sys.executable, "-c", WITHOUT_MPI, *words], cwd=ROOT)
    number = re.search(r"^job +(\d+):", out_text, re.MULTILINE)
    assert number is not None
    job = Job(number[1], out, pace)
    bench.wait_until_it_trains(job)
    set_pace(job.pace, VERY_SLOW_S)
    bench.wait(lambda: "saved at" in job.log(), job)
    assert summary(out)["stop_reason"] in ("stopped by SIGUSR1", "the time limit of the job")
    bench.assert_finished(job, replicas=2, lost=1)


def submit_command(words: Sequence[str | Path], **options: Any) -> str:
    """Run a command that submits jobs; return its output.

    `tests.process.start` would kill the jobs, which inherit its mark.
    """
    words = [str(word) for word in words]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@case
def signal_usr1(bench: Bench) -> None:
    """`scancel --signal=USR1`."""
    stop_by_signal(bench, "USR1")


@case
def signal_term(bench: Bench) -> None:
    """`scancel --signal=TERM`."""
    stop_by_signal(bench, "TERM")


def stop_by_signal(bench: Bench, name: str) -> None:
    job = bench.submit(name, bench.site("--exclude=n4"))
    bench.wait_until_it_trains(job)
    bench.command("scancel", f"--signal={name}", job.number)
    bench.assert_finished(job)
    assert f"stopped by SIG{name}" in job.log()


@case
def requeued(bench: Bench) -> None:
    """`scontrol requeue`: SIGTERM, and SIGKILL after KillWait."""
    job = bench.submit("requeued", bench.site("--exclude=n4"))
    bench.wait_until_it_trains(job)
    bench.command("scontrol", "requeue", job.number)
    bench.assert_finished(job)


@case
def preempted(bench: Bench) -> None:
    """A job of a higher partition takes the cores: SIGTERM, and SIGKILL after GraceTime."""
    site = bench.site("--exclude=n3,n4", cores=100, partition="idle-time")
    job = bench.submit("preempted", site)
    bench.wait_until_it_trains(job)
    wanted = ["--partition=main", "--nodelist=n1", "--cpus-per-task=100", "--output=/dev/null"]
    bench.command("sbatch", *wanted, "--wrap", "sleep 1")
    bench.assert_finished(job)
    assert "stopped by SIGTERM" in job.log()


@case
def drained_node(bench: Bench) -> None:
    """A node is drained; the job is told to stop, and goes on without that node."""
    job = bench.submit("drained", bench.site("--exclude=n4"))
    bench.wait_until_it_trains(job)
    drained = bench.nodes(job)[-1]
    node = f"nodename=n{drained}"
    bench.command("scontrol", "update", node, "state=drain", "reason=test")
    try:
        bench.command("scancel", "--signal=USR1", job.number)
        bench.wait(lambda: bench.state(job.number)["Restarts"] == "1", job)
        bench.wait(lambda: bench.state(job.number)["JobState"] == "RUNNING", job)
        assert drained not in bench.nodes(job)
    finally:
        bench.command("scontrol", "update", node, "state=resume")
    bench.assert_finished(job)


@case
def killed_rank(bench: Bench) -> None:
    """SIGKILL of one rank: the job starts again, and takes its own folder over."""
    job = bench.submit("killed", bench.site("--exclude=n4"))
    bench.wait_until_it_trains(job, CHECKPOINT + 2)
    signal_rank(job, 1, signal.SIGKILL)
    bench.assert_finished(job, lost=CHECKPOINT)


@case
def stopped_rank(bench: Bench) -> None:
    """SIGSTOP of one rank: the run ends as one that hangs, and the job starts again."""
    sections = "update", "collective", "evaluation", "checkpoint"
    limits = [f"timeouts.{section}=20" for section in sections]
    job = bench.submit("stopped", bench.site("--exclude=n4"), *limits)
    bench.wait_until_it_trains(job, CHECKPOINT + 2)
    signal_rank(job, 1, signal.SIGSTOP)
    bench.wait(lambda: bench.state(job.number)["Restarts"] != "0", job)
    assert f"code {HangError.code} " in job.log()
    bench.assert_finished(job, lost=CHECKPOINT)


def signal_rank(job: Job, rank: int, number: int) -> None:
    """Send a signal to one rank of a job."""
    for pid in carriers(f"SLURM_JOB_ID={job.number}"):
        with suppress(OSError):
            if b"SLURM_PROCID=%d" % rank in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(pid, number)


@case
def link_down(bench: Bench) -> None:
    """A node loses its link: the job goes on, or is requeued where Slurm gives the node up."""
    job = bench.submit("link", bench.site("--nodelist=n3,n4"))
    bench.wait_until_it_trains(job)
    set_pace(job.pace, VERY_SLOW_S)
    if FULL:
        bench.others_ended.wait()  # all jobs of the node are ended
    else:
        wait([bench.cases["time_limit"]])  # it cannot start while the link is down
    host_link(4, "down")
    try:
        time.sleep(LINK_DOWN_S)
    finally:
        host_link(4, "up")
    if FULL:
        bench.assert_finished(job, lost=CHECKPOINT)
    else:
        bench.assert_finished(job, starts=1)


@case
def chain_over_a_killed_job(bench: Bench) -> None:
    """`jobs/slurm-chain.sh`: the first job is killed, and the next one runs on other nodes."""
    out, pace = bench.folder / "chain", bench.pace("chain")
    chain = ROOT / "jobs" / "slurm-chain.sh"
    env = os.environ | {"DTRAIN": dtrain_path(), "JOB_SCRIPT": wide_script(bench)}
    words = ["bash", chain, "3", bench.run_file, "--out", out, "--set", f"model.pace={pace}"]
    numbers = submit_command(words, cwd=bench.folder, env=env).split()
    job = Job(numbers[0], out, pace)
    bench.wait_until_it_trains(job, CHECKPOINT + 2)
    first = f"n{bench.nodes(job)[0]}"
    bench.command("scontrol", "update", f"jobid={numbers[1]}", f"excnodelist={first},n4")
    for pid in carriers(f"SLURM_JOB_ID={numbers[0]}"):
        os.kill(pid, signal.SIGKILL)
    owner = json.loads((out / "owner.json").read_text())  # hosts of the bench share their processes
    (out / "owner.json").write_text(json.dumps(owner | {"machine": "another"}))
    job.hurry()
    states = [bench.wait_for_end(number) for number in numbers]
    log = "".join(path.read_text() for path in bench.folder.glob("dtrain-*.log"))
    assert states[0][0] == "FAILED", log
    assert "taken over" in log
    assert "Sorry" not in log  # Open MPI's help texts
    assert states[1:] == [("COMPLETED", 0)] * 2, log
    bench.assert_trained(job, lost=CHECKPOINT)


def wide_script(bench: Bench) -> str:
    """Return a copy of `jobs/slurm.sh`, edited for two nodes."""
    path = bench.folder / "slurm.sh"
    text = (ROOT / "jobs" / "slurm.sh").read_text()
    text = text.replace("--nodes=1", "--nodes=2").replace("--ntasks=3", "--ntasks=2")
    path.write_text(text.replace("#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --exclude=n4"))
    return str(path)


@case
def array_of_seeds(bench: Bench) -> None:
    """Four seeds in four folders, in a container whose runtime is a stand-in."""
    site, options = bench.site("--exclude=n4"), {"nodes": 1, "container": "image.sif"}
    job = bench.submit("array", site, "mesh.stages=1", array="seed=0..3", **options)
    job.hurry()
    tasks = bench.wait(lambda: found if len(found := bench.tasks(job.number)) == 4 else [])
    assert [bench.wait_for_end(task) for task in tasks] == [("COMPLETED", 0)] * 4
    for seed in range(4):
        result = summary(bench.folder / f"array-seed={seed}")
        assert (result["status"], result["updates"]) == ("finished", UPDATES)
        assert result["digest"] == bench.digest(stages=1, seed=seed)
    assert (
        len(
            re.findall(
                r"^exec image\.sif .*dtrain train ",
                (bench.folder / "apptainer.log").read_text(),
                re.M,
            )
        )
        == 4
    )


@case
def no_progress(bench: Bench) -> None:
    """A packed environment on the disks of three nodes; its dtrain stops and gets no further."""
    ranks, together = 6, bench.folder / "together"
    together.mkdir()
    body = f"""
        echo "$0 on $(hostname)"
        start=${{SLURM_RESTART_COUNT:-0}}
        touch {together}/$start-$SLURM_PROCID
        until [ $(ls {together} | grep -c "^$start-") = {ranks} ]; do sleep 0.1; done
        exit {SAVED_CODE}"""  # the first code that is not 0 ends all ranks
    stand_in = program(bench.folder / "packed", "dtrain", body)
    archive = bench.folder / "environment.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(stand_in, "bin/dtrain")
    options = {"nodes": 3, "ranks_per_node": 2, "environment_archive": str(archive)}
    job = bench.submit("idle", bench.site("--exclude=n4"), **options)
    assert bench.wait_for_end(job.number) == ("FAILED", SAVED_CODE), job.log()
    copies = re.findall(r"^(/tmp/\S+/bin/dtrain on n\d)$", job.log(), re.M)
    assert len(set(copies)) == 3
    assert len(copies) == ranks * (REQUEUE_BUDGET + 1)
    assert not Path(copies[0].split("/bin/")[0]).exists()


@case
def workstation(bench: Bench) -> None:
    """Without a scheduler: told to stop, started again, stopped by its limit, and done."""
    options = {"nodes": 1, "ranks_per_node": 2}
    job = bench.submit("workstation", "workstation", **options)
    bench.wait_until_it_trains(job)
    os.kill(int(job.number), signal.SIGTERM)
    bench.wait(lambda: not command(int(job.number)), job)
    assert summary(job.out)["stop_reason"] == "stopped by SIGTERM"
    job = bench.submit("workstation", "workstation", time="1", **options)
    bench.wait(lambda: "starts again" in job.log(), job)
    assert summary(job.out)["stop_reason"] == "the time limit of the job"
    job.hurry()
    bench.wait(lambda: not command(int(job.number)), job)
    bench.assert_trained(job, starts=3)


@case
def killed_slurmd(bench: Bench) -> None:
    """Slurm gives the node up after SlurmdTimeout, and the job goes on on other nodes."""
    job = bench.submit("slurmd", bench.site())
    bench.wait_until_it_trains(job)
    set_pace(job.pace, VERY_SLOW_S)
    bench.others_ended.wait()
    wait([bench.cases["link_down"]])
    host = bench.nodes(job)[-1]
    os.kill(int((hosts.FOLDER / "run" / f"slurmd.n{host}.pid").read_text()), signal.SIGKILL)
    bench.assert_finished(job, lost=CHECKPOINT)


# ---- the tests


@pytest.fixture(scope="module")
def running(turn: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """All cases, started."""
    try:
        cluster = hosts.up(4)
    except hosts.Lacking as why:
        lack("cluster", str(why))
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(CASES) + 1) as pool:
        for name, value in bench_environment(cluster, folder).items():
            patch.setenv(name, value)
        bench = Bench(cluster, folder)
        futures = bench.cases
        futures |= {name: pool.submit(run, bench) for name, run in CASES.items()}
        last = ("link_down", "killed_slurmd") if FULL else ("killed_slurmd",)
        others = [future for name, future in futures.items() if name not in last]
        pool.submit(lambda: (wait(others), bench.others_ended.set()))
        try:
            yield bench
        finally:
            bench.closed.set()
            bench.others_ended.set()
        if not all(future.done() for future in futures.values()):  # a test was interrupted
            start(["scancel", "--user=root"], env=cluster.env)


def test_slurm_accepts_the_scripts_of_all_sites(running: Bench, tmp_path: Path) -> None:
    """As they are: the cluster has the partitions, features and GPUs of the sites."""
    scripts = [path for path in (ROOT / "jobs").glob("*.sh") if "#SBATCH" in path.read_text()]
    assert len(scripts) == 3
    for name in SITES:
        site = read_site(name)
        ranks = max(site.gpus_per_node, 1)
        facts = {"account": "acc", "ranks_per_node": ranks, "cpus_per_rank": site.cores // ranks}
        for variant in VARIANTS if site.has_slurm else ():
            job = job_on_site(**(VARIANTS[variant] | facts | {"partition": "", "after": ""}))
            scripts.append(tmp_path / f"{name}-{variant}.sh")
            scripts[-1].write_text(render_script(job, site))
    refused = []
    for path in scripts:
        ended = start(["sbatch", "--test-only", path, "run.toml"], env=running.cluster.env)
        if ended.code or "to start at" not in ended.err:
            refused.append(f"{path.name}: {ended.err}")
    assert refused == []


@pytest.mark.parametrize("name", CASES)
def test_a_job_survives(name: str, running: Bench) -> None:
    """What the case says, and the run is the undisturbed one, bit for bit."""
    running.cases[name].result()
