"""Threads: n ranks in one process, for tests and for runs without MPI.

Invariant: exactly one rank runs at a time. It holds the baton and passes it only where it waits, to
a rank that the seed chooses: timings are explored by changing the seed, every run can be repeated,
and no two ranks ever race for torch's global generator.

    rank 0  ##compute##|wait            |##compute##|wait ...
    rank 1             |##compute##|wait            |
    rank 2                         |wait|                  <- looked, found nothing, passed it on
                       ^ baton     ^    ^           ^
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import NoReturn, TypeVar, final

from dtrain.comm.comm import Comm
from dtrain.comm.post import Post
from dtrain.comm.wire import Bytes, Request, Stall, Wire

T = TypeVar("T")

PATIENCE = 3
"""Turns of every rank without any event after which none can go on."""


@final
class Ended(BaseException):
    """This rank ends because another one failed; not an `Exception`, so that user code lets it
    pass."""


@final
class Baton:
    """Who runs, who waits for what, and why it all ended."""

    def __init__(self, ranks: int, seed: int) -> None:
        self.post = Post()
        self.live = list(range(ranks))
        self.failure: BaseException | None = None
        self.boards: defaultdict[Hashable, dict[int, tuple[int, int]]] = defaultdict(dict)
        self._random = random.Random(seed)
        self._turns = [threading.Semaphore(0) for _ in range(ranks)]
        self._waits: dict[int, str] = {}
        self._stalls: dict[int, Stall] = {}  # by rank, not yet raised there
        self._events = 0
        self._quiet: Counter[int] = Counter()

    def take(self, rank: int) -> None:
        """Wait for the baton; raise if no rank could go on, or another one failed, meanwhile."""
        self._turns[rank].acquire()
        if rank in self._stalls:
            raise self._stalls.pop(rank)
        if self.failure is not None:
            raise Ended

    def hand(self) -> None:
        """Give the baton to a live rank."""
        if self.live:
            self._turns[self._random.choice(self.live)].release()

    def idle(self, rank: int, what: str) -> None:
        """Pass the baton on and take it back later."""
        self._waits[rank] = what
        if self._events != self.post.events:
            self._events = self.post.events
            self._quiet.clear()
        self._quiet[rank] += 1
        if all(self._quiet[other] >= PATIENCE for other in self.live):
            self._quiet.clear()
            self._stalls = {other: Stall("deadlock: " + self.waits()) for other in self.live}
        self.hand()
        self.take(rank)

    def waits(self) -> str:
        """Return what each live rank waits for, or last waited for."""
        return "; ".join(
            f"rank {rank} waits for {self._waits.get(rank, 'its first turn')}" for rank in self.live
        )

    def leave(self, rank: int, error: BaseException | None) -> None:
        """Leave for good; the first error is kept."""
        if error is not None and not isinstance(error, Ended):
            self.failure = self.failure or error
        self.live.remove(rank)
        self.hand()


@final
class ThreadWire(Wire):
    """The wire between threads; `members` are the group's ranks in the world."""

    def __init__(
        self,
        baton: Baton,
        members: Sequence[int],
        me: int,
        hosts: Sequence[str],
        group: Hashable = (),
    ) -> None:
        self.rank, self.size = members.index(me), len(members)
        self.hosts, self.world, self.library = tuple(hosts), tuple(members), "threads"
        self._baton, self._members, self._me, self._group = baton, members, me, group
        self._splits = 0

    def isend(self, data: Bytes, to: int, tag: int) -> Request:
        """Send; complete once the receive was posted."""
        return self._baton.post.send((self._group, self.rank, to, tag), data)

    def irecv(self, data: Bytes, source: int, tag: int) -> Request:
        """Receive."""
        return self._baton.post.receive((self._group, source, self.rank, tag), data)

    def idle(self, turn: int, what: str) -> None:
        """Pass the baton; raise `Stall` in all ranks where none can go on."""
        self._baton.idle(self._me, what)

    def split(self, color: int, key: int) -> ThreadWire:
        """Return the wire of the ranks with my colour; waits for all ranks of this group."""
        self._splits += 1
        board = self._baton.boards[self._group, self._splits]
        board[self.rank] = (color, key)
        self._baton.post.events += 1
        while len(board) < self.size:
            self.idle(0, f"split {self._splits}: {len(board)} of {self.size} ranks are there")
        ranks = sorted((k, rank) for rank, (c, k) in board.items() if c == color)
        members = [self._members[rank] for _, rank in ranks]
        hosts = [self.hosts[rank] for _, rank in ranks]
        group = (self._group, self._splits, color)
        return ThreadWire(self._baton, members, self._me, hosts, group)

    def abort(self, code: int) -> NoReturn:
        """End all ranks; `run` raises `SystemExit(code)`."""
        sys.exit(code)


def run(
    n: int,
    work: Callable[[Comm], T],
    *,
    seed: int = 0,
    hosts: Sequence[str] | None = None,
    timeout_s: float = 60.0,
) -> list[T]:
    """Run `work` on n ranks in this process and return their results in rank order.

    Parameters
    ----------
    n : int
        Number of ranks.
    work : callable
        Called once per rank, in a thread of its own, with that rank's world.
    seed : int
        Chooses who runs next at every wait.
    hosts : sequence of str, optional
        A made-up host per rank; default: all on one.
    timeout_s : float
        Seconds that all of it may take.

    Raises
    ------
    Stall
        In every rank and here, where no rank can go on; here, where the time is over.
    BaseException
        Whatever the first failing rank raised; the others end at their next wait.
    """
    baton = Baton(n, seed)
    names = tuple(hosts) if hosts is not None else ("localhost",) * n
    results: dict[int, T] = {}

    def attend(rank: int) -> None:
        error: BaseException | None = None
        try:
            baton.take(rank)
            results[rank] = work(Comm(ThreadWire(baton, range(n), rank, names)))
        except BaseException as caught:
            error = caught
        baton.leave(rank, error)

    threads = [threading.Thread(target=attend, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    baton.hand()
    _join(baton, threads, timeout_s)
    if baton.failure is not None:
        raise baton.failure
    return [results[rank] for rank in range(n)]


def _join(baton: Baton, threads: list[threading.Thread], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise Stall(f"{timeout_s:g} s are over: {baton.waits()}")
    except BaseException as error:  # Ctrl-C too: the ranks end at their next wait
        baton.failure = baton.failure or error
        raise
