"""Worker processes of one rank that read micro-batches ahead.

Invariant: results are in the order of the micro-batches. At most two micro-batches per worker are
on their way or unread. All work of the rank is done in the caller's thread, on calls of `start` and
`result`. A worker that ends raises an error on the rank; a rank that ends ends its workers.

::

    rank      Read 0 -> worker 0, Read 1 -> worker 1, Read 2 -> worker 0, Read 3 -> worker 1
    worker 0  0 into slot 0 -> rank copies it          2 into slot 1 ...
    worker 1  1 into slot 0 -> rank copies it          3 into slot 1 ...
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, final

import dtrain
from dtrain.data.batch_readers import Preparation, Prepared
from dtrain.data.held_rows import HeldRows
from dtrain.data.row_groups import BUFFERS, BatchRead, GroupReader
from dtrain.data.shared_memory import SharedMemory
from dtrain.data.worker_process import Answer, Failure, Group, Read, Setup
from dtrain.errors import ConfigError, DataError, DtrainError

READS_PER_WORKER = 2
"""Micro-batches of a worker that are on their way or unread."""


END_S = 2.0
"""Seconds in which a worker may end by itself."""


LAUNCHER_PREFIXES = (
    *("OMPI_", "PMIX_", "PMI_", "PMI2_", "PRTE_", "PRRTE_", "MPI_", "MPICH_", "I_MPI_", "MV2_"),
    *("HYDRA_", "HYDI_", "SLURM_", "PALS_", "MPIEXEC_"),
)
"""Environment variables by which MPI would take a worker for a rank."""


THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


COMMAND = (
    "import sys; sys.path.append({root!r}); from dtrain.data.worker_process import main; "
    "main({parent}, {connection}, {slots}, {buffers})"
)


class RemoteTracebackError(Exception):
    """The traceback of a worker process, as the cause of the exception."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@final
class WorkerProcess:
    """One worker, as its rank sees it.

    Parameters
    ----------
    number : int
        From 0.
    buffers : sequence of SharedMemory
        Memory of the groups.
    """

    def __init__(self, number: int, buffers: Sequence[SharedMemory]) -> None:
        self.number = number
        self.slots = [SharedMemory() for _ in range(READS_PER_WORKER)]
        self.unanswered: deque[PendingWorkerRead] = deque()
        self.known_preparations: set[int] = set()
        self.known_groups: dict[int, object] = {}
        self._next_slot = 0
        ours, theirs = socket.socketpair()
        descriptors = [memory.file_descriptor for memory in (*self.slots, *buffers)]
        with theirs:
            command = COMMAND.format(
                root=str(Path(dtrain.__file__).parents[1]),
                parent=os.getpid(),
                connection=theirs.fileno(),
                slots=descriptors[:READS_PER_WORKER],
                buffers=descriptors[READS_PER_WORKER:],
            )
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", command],
                stdin=subprocess.DEVNULL,
                env=worker_environment(),
                pass_fds=[theirs.fileno(), *descriptors],
            )
        self.connection = Connection(ours.detach())

    def take_slot(self) -> int:
        """Return the slot of the next read."""
        slot = self._next_slot
        self._next_slot = (slot + 1) % READS_PER_WORKER
        return slot

    def send(self, message: Setup | Group | Read) -> None:
        """Send a message.

        Raises
        ------
        DataError
            The worker has ended.
        """
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> Answer | Failure:
        """Wait for the answer to the oldest read.

        Raises
        ------
        DataError
            The worker has ended.
        """
        try:
            answer: Answer | Failure = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        return answer

    def end(self) -> None:
        """Close the connection, which ends a worker that waits."""
        self.connection.close()

    def _lost(self) -> DataError:
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            code = None
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        return DataError(
            "data.worker-lost",
            f"worker process {self.number} of [data] workers (process {self.process.pid}) ended by "
            f"{how}: if memory ran out, lower workers or batch-size; workers = 0 reads in a thread "
            "of the rank and shows errors of the data set there",
        )


@final
class WorkerPool:
    """The worker processes of one rank; they start on the first read and serve all its loaders.

    Parameters
    ----------
    count : int
        Number of processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.buffers = [SharedMemory() for _ in range(BUFFERS)]
        self.workers: list[WorkerProcess] = []
        self._setups: list[Setup] = []
        self._reads = 0
        self._unsent: deque[PendingWorkerRead] = deque()
        self._finalizer = weakref.finalize(self, _end_workers, self.workers, self.buffers)

    def reader(self, preparation: Preparation, held: HeldRows | None) -> WorkerReader:
        """Return a reader of micro-batches.

        Parameters
        ----------
        preparation : Preparation
            The workers call copies of it.
        held : HeldRows or None
            The source of its samples; it is read in groups, by the rank.

        Raises
        ------
        ConfigError
            The data set or its augmentation cannot be sent to other processes.
        """
        number = len(self._setups)
        try:
            payload = pickle.dumps((preparation, held))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                "data.workers-not-picklable",
                f"[data] workers = {self.count} sends the data set to other processes, and it "
                f"cannot be pickled ({error}): define its classes and functions at the top of a "
                "module, without lambda, and open files on the first read; or set workers = 0",
            ) from error
        process = process_description(needs_main=b"__main__" in payload)
        self._setups.append(Setup(number, payload, process))
        groups = None if held is None else GroupReader(held, self.buffers)
        return WorkerReader(self, number, groups)

    def start(self) -> None:
        """Start the processes, if they are not started."""
        while len(self.workers) < self.count:
            self.workers.append(WorkerProcess(len(self.workers), self.buffers))

    def submit(self, read: PendingWorkerRead) -> None:
        """Add a read to the queue."""
        self.start()
        read.worker = self.workers[self._reads % self.count]
        self._reads += 1
        self._unsent.append(read)
        self.progress()

    def progress(self) -> None:
        """Take answers that are there, and send reads that can be sent."""
        for worker in self.workers:
            while worker.unanswered and worker.connection.poll():
                self._receive(worker)
        while self._unsent:
            read = self._unsent[0]
            if len(read.worker.unanswered) == READS_PER_WORKER or not read.is_ready():
                return
            self._send()

    def complete(self, read: PendingWorkerRead) -> None:
        """Wait for the oldest read that is not done."""
        if self._unsent and self._unsent[0] is read:
            read.wait_for_groups()
            while len(read.worker.unanswered) == READS_PER_WORKER:
                self._receive(read.worker)
            self._send()
        while not read.is_done:
            self._receive(read.worker)

    def drop(self) -> None:
        """Forget the queue; answers to reads that are sent are ignored."""
        self._unsent.clear()
        for worker in self.workers:
            for read in worker.unanswered:
                read.is_dropped = True

    def stop(self) -> None:
        """End the processes."""
        self._finalizer()

    def _send(self) -> None:
        read = self._unsent.popleft()
        worker, number = read.worker, read.number
        if number not in worker.known_preparations:
            worker.send(self._setups[number])
            worker.known_preparations.add(number)
        for group in read.batch.groups:
            if worker.known_groups.get(group.buffer) is not group:
                worker.send(Group(number, group.buffer, group.indices))
                worker.known_groups[group.buffer] = group
        buffers = tuple(group.buffer for group in read.batch.groups)
        read.slot = worker.take_slot()
        worker.send(Read(number, read.batch.indices, read.batch.epoch, buffers, read.slot))
        worker.unanswered.append(read)

    def _receive(self, worker: WorkerProcess) -> None:
        """Take one answer."""
        answer = worker.receive()
        read = worker.unanswered.popleft()
        if not read.is_dropped:
            read.finish(answer)


@final
class PendingWorkerRead:
    """A read by a worker.

    Parameters
    ----------
    pool : WorkerPool
        It sends the read.
    number : int
        Number of the preparation.
    batch : BatchRead
        The micro-batch.
    groups : GroupReader or None
        It reads the rows.
    """

    worker: WorkerProcess
    slot: int

    def __init__(
        self, pool: WorkerPool, number: int, batch: BatchRead, groups: GroupReader | None
    ) -> None:
        self.number, self.batch = number, batch
        self.is_dropped = self.is_done = False
        self._pool, self._groups = pool, groups
        self._prepared: Prepared | None = None
        self._error: BaseException | None = None

    def is_ready(self) -> bool:
        """Return whether the rows are in memory."""
        return all(group.rows is not None for group in self.batch.groups)

    def wait_for_groups(self) -> None:
        """Wait for the rows."""
        if self._groups is not None:
            self._groups.wait(self.batch)

    def finish(self, answer: Answer | Failure) -> None:
        """Take the answer of the worker."""
        self.is_done = True
        if self._groups is not None:
            self._groups.release(self.batch)
        if isinstance(answer, Failure):
            self._error = _exception(answer)
            return
        inputs, *rest = self.worker.slots[self.slot].read(answer.places)
        targets = rest.pop(0) if answer.has_targets else None
        self._prepared = Prepared(inputs, tuple(rest) if answer.has_others else None, targets)

    def result(self) -> Prepared:
        """Wait for the micro-batch and return it, or raise the exception of the read."""
        if not self.is_done:
            self._pool.complete(self)
        self._pool.progress()
        if self._error is not None:
            raise self._error
        assert self._prepared is not None
        return self._prepared


@final
class WorkerReader:
    """Reads the micro-batches of one loader in the workers of a pool."""

    def __init__(self, pool: WorkerPool, number: int, groups: GroupReader | None) -> None:
        self.groups = groups
        self._pool, self._number = pool, number

    def start(self, batch: BatchRead) -> PendingWorkerRead:
        read = PendingWorkerRead(self._pool, self._number, batch, self.groups)
        self._pool.submit(read)
        return read

    def close(self) -> None:
        self._pool.drop()
        if self.groups is not None:
            self.groups.close()


def worker_environment() -> dict[str, str]:
    """Return the environment of a worker: that of the rank, without its launcher."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    return kept | dict.fromkeys(THREAD_VARIABLES, "1")


def process_description(needs_main: bool) -> dict[str, Any]:
    """Return path, arguments and main module of this process for `multiprocessing.spawn.prepare`.

    Parameters
    ----------
    needs_main : bool
        Whether objects of the script are sent; only then a worker imports the script.
    """
    description: dict[str, Any] = {
        "sys_path": [os.getcwd() if path == "" else path for path in sys.path],
        "sys_argv": sys.argv,
        "dir": os.getcwd(),
    }
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    path = getattr(main, "__file__", None)
    if needs_main and name is not None:
        description["init_main_from_name"] = name
    elif needs_main and path is not None:
        description["init_main_from_path"] = os.path.abspath(path)
    return description


def _exception(failure: Failure) -> BaseException:
    """Return the exception of a worker, with its traceback as the cause."""
    error: BaseException
    if failure.record is not None:
        error = DtrainError.from_record(failure.record)
        assert isinstance(error, DtrainError)
        error.on_all_ranks = False
    elif failure.pickled is not None:
        error = pickle.loads(failure.pickled)
    else:
        error = RuntimeError("a worker process of [data] workers failed")
    error.__cause__ = RemoteTracebackError(failure.text)
    return error


def _end_workers(workers: list[WorkerProcess], buffers: list[SharedMemory]) -> None:
    for worker in workers:
        worker.end()
    for worker in workers:
        try:
            worker.process.wait(END_S if not worker.unanswered else 0)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
    for memory in (*buffers, *(slot for worker in workers for slot in worker.slots)):
        memory.close()
    workers.clear()
