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

from dtrain.comm.backends.base import Backend, Bytes, CommTimeout, Request
from dtrain.comm.backends.matching import Matcher
from dtrain.comm.communicator import Comm

T = TypeVar("T")


DEADLOCK_TURNS = 3
"""Turns of every rank without any event after which none can go on."""


@final
class OtherRankFailed(BaseException):
    """This rank ends because another one failed; not an `Exception`, so that user code lets it
    pass."""


@final
class ThreadScheduler:
    """Who runs, who waits for what, and why it all ended."""

    def __init__(self, ranks: int, seed: int) -> None:
        self.matcher = Matcher()
        self.live_ranks = list(range(ranks))
        self.failure: BaseException | None = None
        self.split_requests: defaultdict[Hashable, dict[int, tuple[int, int]]] = defaultdict(dict)
        self._random = random.Random(seed)
        self._turn_semaphores = [threading.Semaphore(0) for _ in range(ranks)]
        self._wait_descriptions: dict[int, str] = {}
        self._deadlocks: dict[int, CommTimeout] = {}  # by rank, not yet raised there
        self._last_event_count = 0
        self._idle_turns: Counter[int] = Counter()

    def wait_turn(self, rank: int) -> None:
        """Wait for the baton; raise if no rank could go on, or another one failed, meanwhile."""
        self._turn_semaphores[rank].acquire()
        if rank in self._deadlocks:
            raise self._deadlocks.pop(rank)
        if self.failure is not None:
            raise OtherRankFailed

    def pass_turn(self) -> None:
        """Give the baton to a live rank."""
        if self.live_ranks:
            self._turn_semaphores[self._random.choice(self.live_ranks)].release()

    def idle(self, rank: int, description: str) -> None:
        """Pass the baton on and take it back later."""
        self._wait_descriptions[rank] = description
        if self._last_event_count != self.matcher.event_count:
            self._last_event_count = self.matcher.event_count
            self._idle_turns.clear()
        self._idle_turns[rank] += 1
        if all(self._idle_turns[other] >= DEADLOCK_TURNS for other in self.live_ranks):
            self._idle_turns.clear()
            self._deadlocks = {
                other: CommTimeout("deadlock: " + self.describe_waits())
                for other in self.live_ranks
            }
        self.pass_turn()
        self.wait_turn(rank)

    def describe_waits(self) -> str:
        """Return what each live rank waits for, or last waited for."""
        return "; ".join(
            f"rank {rank} waits for {self._wait_descriptions.get(rank, 'its first turn')}"
            for rank in self.live_ranks
        )

    def finish(self, rank: int, error: BaseException | None) -> None:
        """Leave for good; the first error is kept."""
        if error is not None and not isinstance(error, OtherRankFailed):
            self.failure = self.failure or error
        self.live_ranks.remove(rank)
        self.pass_turn()


@final
class ThreadBackend(Backend):
    """The wire between threads; `members` are the group's ranks in the world."""

    def __init__(
        self,
        scheduler: ThreadScheduler,
        members: Sequence[int],
        world_rank: int,
        hosts: Sequence[str],
        group: Hashable = (),
    ) -> None:
        self.rank, self.size = members.index(world_rank), len(members)
        self.hosts, self.world_ranks, self.library = tuple(hosts), tuple(members), "threads"
        self._scheduler, self._members, self._world_rank, self._group = (
            scheduler,
            members,
            world_rank,
            group,
        )
        self._split_count = 0

    def isend(self, data: Bytes, dest: int, tag: int) -> Request:
        """Send; complete once the receive was posted."""
        return self._scheduler.matcher.post_send((self._group, self.rank, dest, tag), data)

    def irecv(self, data: Bytes, source: int, tag: int) -> Request:
        """Receive."""
        return self._scheduler.matcher.post_recv((self._group, source, self.rank, tag), data)

    def idle(self, turn: int, description: str) -> None:
        """Pass the baton; raise `Stall` in all ranks where none can go on."""
        self._scheduler.idle(self._world_rank, description)

    def split(self, color: int, key: int) -> ThreadBackend:
        """Return the wire of the ranks with my colour; waits for all ranks of this group."""
        self._split_count += 1
        board = self._scheduler.split_requests[self._group, self._split_count]
        board[self.rank] = (color, key)
        self._scheduler.matcher.event_count += 1
        while len(board) < self.size:
            self.idle(0, f"split {self._split_count}: {len(board)} of {self.size} ranks are there")
        ranks = sorted((k, rank) for rank, (c, k) in board.items() if c == color)
        members = [self._members[rank] for _, rank in ranks]
        hosts = [self.hosts[rank] for _, rank in ranks]
        group = (self._group, self._split_count, color)
        return ThreadBackend(self._scheduler, members, self._world_rank, hosts, group)

    def abort(self, code: int) -> NoReturn:
        """End all ranks; `run` raises `SystemExit(code)`."""
        sys.exit(code)


def run_ranks(
    ranks: int,
    function: Callable[[Comm], T],
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
    baton = ThreadScheduler(ranks, seed)
    names = tuple(hosts) if hosts is not None else ("localhost",) * ranks
    results: dict[int, T] = {}

    def attend(rank: int) -> None:
        error: BaseException | None = None
        try:
            baton.wait_turn(rank)
            results[rank] = function(Comm(ThreadBackend(baton, range(ranks), rank, names)))
        except BaseException as caught:
            error = caught
        baton.finish(rank, error)

    threads = [threading.Thread(target=attend, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    baton.pass_turn()
    _join_threads(baton, threads, timeout_s)
    if baton.failure is not None:
        raise baton.failure
    return [results[rank] for rank in range(ranks)]


def _join_threads(
    scheduler: ThreadScheduler, threads: list[threading.Thread], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise CommTimeout(f"{timeout_s:g} s are over: {scheduler.describe_waits()}")
    except BaseException as error:  # Ctrl-C too: the ranks end at their next wait
        scheduler.failure = scheduler.failure or error
        raise
