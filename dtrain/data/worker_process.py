"""The process of one worker: it reads micro-batches for a rank.

Invariant: it inherits neither MPI, nor signal handlers, nor open files of the rank, and ends with
the rank. It never trains: a script that is imported here is refused if it starts a training.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.spawn import prepare
from typing import Any, NamedTuple, cast, final

import numpy as np
import torch

from dtrain.data.batch_readers import Preparation
from dtrain.data.held_rows import HeldRows, RowGroup
from dtrain.data.sampler import Indices
from dtrain.data.shared_memory import SharedMemory, TensorPlace
from dtrain.errors import DtrainError
from dtrain.user_code import importing

PR_SET_PDEATHSIG = 1
"""Option of Linux's `prctl`: the signal that a process gets when its parent ends."""


class Setup(NamedTuple):
    """Makes a preparation known to a worker.

    Attributes
    ----------
    number : int
        Its number in later messages.
    payload : bytes
        The pickled `Preparation` and its `HeldRows` or None.
    process : dict
        Path, arguments and main module of the rank, as `multiprocessing.spawn.prepare` takes them.
    """

    number: int
    payload: bytes
    process: dict[str, Any]


class Group(NamedTuple):
    """Makes rows in a group buffer known to a worker."""

    number: int
    buffer: int
    indices: Indices


class Read(NamedTuple):
    """Asks a worker for a micro-batch.

    Attributes
    ----------
    number : int
        That of the preparation.
    indices : array of int
        Its samples.
    epoch : int
        From 0.
    buffers : tuple of int
        The group buffers that hold its rows.
    slot : int
        The memory for the result.
    """

    number: int
    indices: Indices
    epoch: int
    buffers: tuple[int, ...]
    slot: int


class Answer(NamedTuple):
    """The places of a micro-batch in its slot: the samples, the targets and the further inputs, if
    it has them."""

    places: list[TensorPlace]
    has_targets: bool
    has_others: bool


class Failure(NamedTuple):
    """An exception of a worker: a record of a `DtrainError`, or the pickled exception, or neither;
    and its traceback."""

    record: tuple[str, str, str] | None
    pickled: bytes | None
    text: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        """Return what a rank needs to raise the error."""
        text = "".join(traceback.format_exception(error))
        if isinstance(error, DtrainError):
            return Failure(error.to_record(), None, text)
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:
            return Failure(None, None, text)
        return Failure(None, pickled, text)


@final
class Worker:
    """Answers the messages of a rank, one after another.

    Parameters
    ----------
    slots, buffers : sequence of SharedMemory
        Memory of the results and of the groups.
    """

    def __init__(self, slots: Sequence[SharedMemory], buffers: Sequence[SharedMemory]) -> None:
        self._slots, self._buffers = slots, buffers
        self._preparations: dict[int, tuple[Preparation, HeldRows | None] | Failure] = {}
        self._groups: dict[int, RowGroup] = {}

    def answer(self, message: Setup | Group | Read) -> Answer | Failure | None:
        """Carry out a message; return the answer to a `Read`."""
        if isinstance(message, Setup):
            self._set_up(message)
        elif isinstance(message, Group):
            self._add_group(message)
        else:
            return self._read(message)
        return None

    def _set_up(self, message: Setup) -> None:
        try:
            with importing("the script of a run (by a worker process of [data] workers)"):
                prepare(message.process)
                self._preparations[message.number] = pickle.loads(message.payload)
        except Exception as error:
            self._preparations[message.number] = Failure.of(error)
        _ignore_signals()

    def _add_group(self, message: Group) -> None:
        entry = self._preparations[message.number]
        if isinstance(entry, Failure) or entry[1] is None:
            return
        held, count = entry[1], len(message.indices)
        memory = self._buffers[message.buffer]
        rows = memory.array((count, *held.shape[1:]), held.dtype)
        self._groups[message.buffer] = RowGroup(message.indices, rows=rows)

    def _read(self, message: Read) -> Answer | Failure:
        entry = self._preparations[message.number]
        if isinstance(entry, Failure):
            return entry
        preparation, held = entry
        try:
            if held is not None:
                held.release_all()
                for buffer in message.buffers:
                    held.hold(self._groups[buffer])
            prepared = preparation(message.indices, message.epoch)
            targets = () if prepared.targets is None else (prepared.targets,)
            tensors = [prepared.inputs, *targets, *(prepared.others or ())]
            places = self._slots[message.slot].write(tensors)
            return Answer(places, prepared.targets is not None, prepared.others is not None)
        except Exception as error:
            return Failure.of(error)


def _end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the rank ends, however that happens."""
    if sys.platform == "linux":
        prctl = cast(Callable[[int, int], int], ctypes.CDLL(None).prctl)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _ignore_signals() -> None:
    """Leave it to the rank to end this process: launchers and terminals signal both."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def main(parent: int, connection: int, slots: Sequence[int], buffers: Sequence[int]) -> None:
    """Answer messages until the rank closes the connection.

    Parameters
    ----------
    parent : int
        Process id of the rank.
    connection : int
        File descriptor of the socket to the rank.
    slots, buffers : sequence of int
        File descriptors of the shared memory.
    """
    _end_with_parent(parent)
    _ignore_signals()
    torch.set_num_threads(1)
    np.seterr(all="warn")
    worker = Worker([SharedMemory(fd) for fd in slots], [SharedMemory(fd) for fd in buffers])
    rank = Connection(connection)
    with suppress(EOFError, OSError):  # the rank has closed the connection
        while True:
            answer = worker.answer(rank.recv())
            if answer is not None:
                rank.send(answer)
    sys.stdout.flush()
    os._exit(0)  # without the seconds in which Python takes down its modules
