"""Many jobs at once on the test cluster: each is submitted, disturbed, and followed to its end.

A case is a function that runs in a thread of its own, so that the waits of all cases overlap.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dtrain.config.parse import read_run
from dtrain.slurm.submit import SubmitOptions, submit
from tests.cluster import Cluster, net
from tests.conftest import ROOT
from tests.harness import train_in_threads
from tests.outcome import summary
from tests.process import Ended, carriers, command, start
from tests.system.jobs import UNFINISHED
from tests.system.programs import write_run

LIMIT_S = 300.0
"""Seconds in which everything that a case waits for has to happen, on a busy machine."""


RESUMED_S = 180.0
"""Seconds from the disturbance of a job to its next start, on a busy machine."""


LEFT_S = 20.0
"""Seconds after the end of a job in which its last process ends."""


UPDATES, CHECKPOINT = 120, 10


SLOW_S, VERY_SLOW_S = 0.4, 5.0
"""Seconds of an update before a job is disturbed; the second ones where that comes late."""


RUN = f"""
updates = {UPDATES}
batch-size = 128
threads = 1
[data]
name = "blobs:blobs"
[model]
name = "paced:paced"
pace = "none"
[mesh]
stages = 2
[partition]
cuts = [3]
[objective]
name = "backprop"
[optimizer]
name = "adam"
[checkpoint]
every = {CHECKPOINT}
[log]
every-s = 1
"""


SITE = """
description = "the test cluster"
tested = "here"
cores-per-node = {cores}
environment = {{ OMP_NUM_THREADS = "1" }}
options = {options}
partition = "{partition}"
"""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Job:
    """A job of the bench.

    Parameters
    ----------
    number : str
        Slurm's.
    out : Path
        Run folder.
    pace : Path
        The folder of `paced.py`.
    """

    number: str
    out: Path
    pace: Path

    def log(self) -> str:
        """Return the output of all starts."""
        return "".join(path.read_text() for path in sorted(self.out.glob("*.log")))

    def trained(self) -> dict[str, int]:
        """Return the updates that each rank of the last stage has computed, in all starts."""
        return {path.name: path.stat().st_size for path in self.pace.glob("rank-*")}

    def starts(self) -> list[float]:
        """Return the times at which training began, in seconds since 1970."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [record["unix_s"] for record in records if record["kind"] == "run"]

    def hurry(self) -> None:
        """Let updates take no longer than they need."""
        (self.pace / "slow").unlink(missing_ok=True)


class Bench:
    """The cluster, a run file, and what Slurm knows of the jobs.

    Parameters
    ----------
    cluster : Cluster
        Four hosts.
    folder : Path
        Of run file and run folders.

    Attributes
    ----------
    cases : dict of str to Future
        The cases that were started.
    others_ended : threading.Event
        Set when no case is left but those that wait for this.
    closed : threading.Event
        Set when no more is asked; every wait then fails.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run_file = write_run(folder, RUN, "paced")
        self.cases: dict[str, Future[None]] = {}
        self.others_ended, self.closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()  # dtrain runs in one thread of this process at a time
        self._asking = threading.Lock()
        self._digests: dict[tuple[int, int, int], str] = {}
        self._jobs: dict[str, dict[str, str]] = {}
        self._asked_at = 0.0

    # ---- jobs

    def pace(self, name: str) -> Path:
        """Return the folder that sets the speed of a job, which starts slowly."""
        pace = self.folder / "pace" / name
        pace.mkdir(parents=True, exist_ok=True)
        set_pace(pace, SLOW_S)
        return pace

    def submit(self, name: str, site: str, *sets: str, **options: Any) -> Job:
        """Submit a job from this process: two ranks on two nodes, unless the options say more."""
        pace = self.pace(name)
        wanted: dict[str, Any] = {"nodes": 2, "ranks_per_node": 1, "out": self.folder / name}
        settings = [f"model.pace={pace}", *sets]
        with self._lock:
            done = submit(
                self.run_file, SubmitOptions(site, settings=settings, **(wanted | options))
            )
        assert done.job_id is not None
        return Job(done.job_id, self.folder / name, pace)

    def site(self, *options: str, cores: int = 1, partition: str = "") -> str:
        """Return the path of a site profile with these options of sbatch."""
        text = SITE.format(options=json.dumps(options), cores=cores, partition=partition)
        path = self.folder / f"site-{zlib.crc32(text.encode())}.toml"
        with self._lock:  # another case may read it
            path.write_text(text)
        return str(path)

    # ---- Slurm

    def command(self, *words: str) -> Ended:
        """Run a command of Slurm; assert that it succeeds."""
        ended = start(words, env=self.cluster.env, limit_s=60)
        assert ended.code == 0, ended.err
        return ended

    def jobs(self) -> Mapping[str, Mapping[str, str]]:
        """Return the fields of all jobs, at most half a second old."""
        with self._asking:
            if time.monotonic() - self._asked_at > 0.5:
                lines = self.command("scontrol", "--oneliner", "show", "jobs").out.splitlines()
                rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
                self._jobs = {row["JobId"]: row for row in rows if "JobId" in row}
                self._asked_at = time.monotonic()
            return self._jobs

    def state(self, number: str) -> Mapping[str, str]:
        """Return the fields of a job."""
        return self.jobs().get(number, {})

    def tasks(self, number: str) -> list[str]:
        """Return the numbers of the tasks of an array that have started."""
        rows = self.jobs().items()
        return [job for job, row in rows if row.get("ArrayJobId") == number]

    def nodes(self, job: Job) -> list[int]:
        """Return the hosts of a running job."""
        text = self.state(job.number)["NodeList"]
        names = self.command("scontrol", "show", "hostnames", text).out.split()
        return [int(name.removeprefix("n")) for name in names]

    # ---- waits

    def wait(self, question: Callable[[], Value | None], job: Job | None = None) -> Value:
        """Wait until a question has a true answer, and return it."""
        deadline = time.monotonic() + LIMIT_S
        while not (answer := question()):
            if self.closed.wait(0.3) or time.monotonic() > deadline:
                fields = {} if job is None else dict(self.state(job.number))
                raise AssertionError(f"too late: {fields}\n{'' if job is None else job.log()}")
        return answer

    def wait_until_it_trains(self, job: Job, updates: int = 3) -> None:
        """Wait until a rank has trained some updates."""
        self.wait(lambda: max([0, *job.trained().values()]) >= updates, job)

    def wait_for_end(self, number: str) -> tuple[str, int]:
        """Return the state in which a job ended, and its exit code; nothing of it is left."""
        fields = self.wait(lambda: self._ended(number))
        end = time.monotonic() + LEFT_S
        while left := carriers(f"SLURM_JOB_ID={number}"):
            assert time.monotonic() < end, [command(pid) for pid in left]
            time.sleep(0.2)
        return fields["JobState"], int(fields["ExitCode"].split(":")[0])

    def _ended(self, number: str) -> Mapping[str, str] | None:
        fields = self.state(number)
        return None if fields.get("JobState", "PENDING") in UNFINISHED else fields

    # ---- results

    def digest(self, replicas: int = 1, stages: int = 2, seed: int = 0) -> str:
        """Return the digest of a run that nothing disturbs."""
        key = replicas, stages, seed
        with self._lock:
            if key not in self._digests:
                run = read_run(self.run_file, [f"seed={seed}", f"mesh.stages={stages}"])
                out = self.folder / "undisturbed-{}-{}-{}".format(*key)
                self._digests[key] = train_in_threads(run, out, stages, replicas)["digest"]
            return self._digests[key]

    def assert_finished(self, job: Job, replicas: int = 1, lost: int = 0, starts: int = 2) -> None:
        """Follow a job that was just disturbed to its end, and assert that it trained well.

        Parameters
        ----------
        lost : int
            Updates that may be trained twice.
        starts : int
            Its starts at least.
        """
        disturbed_at = time.time()
        if starts > 1:
            self.wait(lambda: self.state(job.number)["Restarts"] != "0", job)
        job.hurry()
        assert self.wait_for_end(job.number) == ("COMPLETED", 0), job.log()
        self.assert_trained(job, replicas, lost, starts)
        later = [start - disturbed_at for start in job.starts() if start > disturbed_at]
        assert all(seconds < RESUMED_S for seconds in later[:1])
        print(f"{job.out.name}: trains again after {later[0] if later else 0:.0f} s")

    def assert_trained(self, job: Job, replicas: int = 1, lost: int = 0, starts: int = 2) -> None:
        """Assert that a finished job has the bits of an undisturbed run, and lost little."""
        result = summary(job.out)
        assert (result["status"], result["updates"]) == ("finished", UPDATES)
        assert result["attempts"] >= starts, job.log()
        assert not (job.out / "owner.json").exists()
        assert "Traceback" not in job.log()
        counts = job.trained().values()
        assert len(counts) == replicas
        assert UPDATES <= min(counts) <= max(counts) <= UPDATES + lost, (counts, job.log())
        assert result["digest"] == self.digest(replicas)


def set_pace(pace: Path, update_s: float) -> None:
    """Set the seconds of an update."""
    draft = pace / "draft"
    draft.write_text(str(update_s))
    draft.replace(pace / "slow")


def host_link(host: int, state: str) -> None:
    """Set the link of a host up or down."""
    net.call("ip", "link", "set", net.link(host), state)


def program(folder: Path, name: str, body: str) -> Path:
    """Write an executable bash script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def dtrain_path() -> str:
    """Return the program `dtrain` beside this Python."""
    beside = Path(sys.executable).with_name("dtrain")
    return str(beside) if beside.exists() else shutil.which("dtrain") or "dtrain"


def bench_environment(cluster: Cluster, folder: Path) -> dict[str, str]:
    """Return the variables that submitted jobs inherit: this source, and a stand-in of Apptainer.

    An image has a `dtrain` of its own, here the one beside this Python. The stand-in is
    written before a thread starts a process, which would hold the file open for a moment.
    """
    image = Path(dtrain_path()).parent
    body = f'echo "$*" >> {folder}/apptainer.log; shift 2; PATH={image}:$PATH; exec "$@"'
    program(folder / "bin", "apptainer", body)
    path = f"{folder / 'bin'}:{cluster.env['PATH']}"
    return {"SLURM_CONF": cluster.env["SLURM_CONF"], "PYTHONPATH": str(ROOT), "PATH": path}
