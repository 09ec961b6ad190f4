"""StartLog: the head of the log, and the steps of a start that take long.

Invariant: rank 0 alone prints. A start whose steps are short prints the head with its first lines,
and a start that is refused prints nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from threading import Lock, Timer
from typing import final

from dtrain.checkpoint import ownership
from dtrain.comm.communicator import Comm
from dtrain.monitoring.host_list import hosts_text

SLOW_STEP_S = 2.0
"""Seconds after which a step of the start is named."""


@final
class StartLog:
    """The head of the log of one start.

    Parameters
    ----------
    comm : Comm
        All ranks of the run.
    """

    def __init__(self, comm: Comm) -> None:
        self.enabled = comm.rank == 0
        self._hosts = comm.hosts
        self._flight = comm.flight
        self._lock = Lock()
        self._has_head = False

    def print_head(self) -> None:
        """Print date, job and hosts, once."""
        with self._lock:
            if self.enabled and not self._has_head:
                self._has_head = True
                print(self._head_text(), flush=True)

    def _head_text(self) -> str:
        date = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
        job = ownership.slurm_job_id()
        job_text = f"process {os.getpid()}" if job is None else f"job {job}"
        return f"started   {date}, {job_text}, {hosts_text(self._hosts)}"

    def note(self, text: str) -> None:
        """Print a line about the present step."""
        if self.enabled:
            self.print_head()
            print(f"start     {text}", flush=True)

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """Print a line if the work inside takes more than `SLOW_STEP_S`, and its time at the end.

        Parameters
        ----------
        description : str
            The work as a participle: "reading data".
        """
        self._flight.note("start", description)
        if not self.enabled:
            yield
            return
        announced: list[str] = []

        def announce() -> None:
            announced.append(description)
            self.print_head()
            print(f"start     {description} ...", flush=True)

        timer = Timer(SLOW_STEP_S, announce)
        timer.daemon = True
        start = time.monotonic()
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            if announced:
                print(f"start     {description}: {time.monotonic() - start:.1f} s", flush=True)
