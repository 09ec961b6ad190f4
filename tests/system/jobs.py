"""Batch jobs of the test cluster: submit `jobs/slurm.sh` and wait for its end."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.conftest import ROOT
from tests.process import start

UNFINISHED = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED"}


def submit(options: Sequence[str], words: Sequence[str], env: Mapping[str, str], cwd: Path) -> str:
    """Submit the job script with options of sbatch and words for dtrain; return the job's id."""
    script = str(ROOT / "jobs" / "slurm.sh")
    ended = start(["sbatch", "--parsable", *options, script, *words], env=env, cwd=cwd)
    assert ended.code == 0, ended.err
    return ended.out.strip()


def wait_for_job(job: str, env: Mapping[str, str], limit_s: float = 120.0) -> tuple[str, int]:
    """Return the state in which a job ended, and its exit code.

    `sbatch --wait` looks only every 40 s.
    """
    deadline = time.monotonic() + limit_s
    while True:
        text = start(["scontrol", "--oneliner", "show", "job", job], env=env).out
        fields = dict(re.findall(r"(\w+)=(\S*)", text))
        if fields.get("JobState", "PENDING") not in UNFINISHED:
            return fields["JobState"], int(fields["ExitCode"].split(":")[0])
        assert time.monotonic() < deadline, f"job {job} is late: {text}"
        time.sleep(0.2)
