"""JobLimit: when the job of this process ends, by the variables of the job or by Slurm.

Invariant: asking Slurm never delays the training: a thread of its own does, with a time limit, and
at most once every ten minutes.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import final

from dtrain.checkpoint.ownership import slurm_job_id
from dtrain.errors import ConfigError

END_VARIABLES = ("DTRAIN_JOB_END_TIME", "SLURM_JOB_END_TIME")
"""Seconds since 1970 at which the job ends; the first is for other schedulers, and for ranks that
`--ranks` starts in a Slurm job."""


ASK_S = 600.0
"""Seconds between two questions: `scontrol update` may change the limit."""


ANSWER_S = 20.0
"""Seconds in which `squeue` has to answer."""


@final
class JobLimit:
    """The end of the job.

    Parameters
    ----------
    end_unix : float
        Seconds since 1970; infinite where it is not known yet.
    job : str or None
        The Slurm job that is asked for; None: the end stays as it is.

    Attributes
    ----------
    end : float
        The end on the clock of `time.monotonic`.
    """

    def __init__(self, end_unix: float, job: str | None) -> None:
        self.end = _monotonic(end_unix)
        self._stopped = threading.Event()
        if job is not None:
            delay_s = 0.0 if math.isinf(end_unix) else ASK_S
            threading.Thread(target=self._follow, args=(job, delay_s), daemon=True).start()

    def _follow(self, job: str, delay_s: float) -> None:
        while not self._stopped.wait(delay_s):
            end_unix = ask_squeue(job)
            if end_unix is not None:
                self.end = _monotonic(end_unix)
            delay_s = ASK_S

    def close(self) -> None:
        """Ask no more."""
        self._stopped.set()


def find_limit(setting: bool | str, environ: Mapping[str, str] = os.environ) -> JobLimit | None:
    """Return the limit that `[checkpoint] stop-before-limit` has the run observe; None: none.

    Raises
    ------
    ConfigError
        The key is true, and nothing says when the job ends.
    """
    if setting is False:
        return None
    end = next((float(environ[name]) for name in END_VARIABLES if _is_number(environ, name)), None)
    job = slurm_job_id() if shutil.which("squeue") else None
    if end is None and job is None:
        if setting is True:
            raise ConfigError(
                "checkpoint.no-limit-known",
                "[checkpoint] stop-before-limit = true, but nothing says when the job ends: export "
                f"{END_VARIABLES[0]} (seconds since 1970, `date +%s -d '+2 hours'`), or leave the "
                "key out",
            )
        return None
    return JobLimit(math.inf if end is None else end, job)


def ask_squeue(job: str) -> float | None:
    """Return when a Slurm job ends, in seconds since 1970; None where Slurm does not say."""
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        words = ["squeue", "-h", "-j", job, "-o", "%e"]
        result = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_S, check=True)
        return datetime.fromisoformat(result.stdout.split()[0]).timestamp()
    return None


def _is_number(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").isdigit()


def _monotonic(unix_s: float) -> float:
    """Return a time of the wall clock as one of `time.monotonic`."""
    return unix_s - time.time() + time.monotonic()
