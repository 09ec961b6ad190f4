"""The backend of n ranks that are threads of one process, for tests and for runs without MPI.

Invariant: exactly one rank runs at a time. It passes its turn on only where it waits, to a rank
that the seed chooses. So different seeds give different timings, every run can be repeated, and no
two ranks draw from torch's global generator at the same time.

    rank 0  ##compute##|wait            |##compute##|wait ...
    rank 1             |##compute##|wait            |
    rank 2                         |wait|                  <- found nothing, passed its turn on
                       ^ turn      ^    ^           ^
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import NoReturn, TypeVar, final

from dtrain.comm.backends.base import Backend, Bytes, CommTimeout, Deadlock, PointToPointRequest
from dtrain.comm.backends.matching import Matcher
from dtrain.comm.communicator import Comm
from dtrain.errors import RankLostError

T = TypeVar("T")


DEADLOCK_TURNS = 3
"""No rank can continue after so many turns of every rank without any event."""


@final
class ThreadScheduler:
    """Chooses the rank that runs, and ends all ranks when one fails or none can continue.

    Attributes
    ----------
    matcher : Matcher
        Of the messages of all groups.
    live_ranks : list of int
        Ranks that have not ended.
    failure : BaseException or None
        The first error of any rank.
    split_requests : dict of Hashable to dict of int to (int, int)
        Colour and key of each rank that has called a split so far, by group and split.
    """

    def __init__(self, ranks: int, seed: int) -> None:
        self.matcher = Matcher()
        self.live_ranks = list(range(ranks))
        self.failure: BaseException | None = None
        self.split_requests: defaultdict[Hashable, dict[int, tuple[int, int]]] = defaultdict(dict)
        self._random = random.Random(seed)
        self._turn_semaphores = [threading.Semaphore(0) for _ in range(ranks)]
        self._wait_descriptions: dict[int, str] = {}
        self._deadlocks: dict[int, Deadlock] = {}  # by rank, not yet raised there
        self._last_event_count = 0
        self._idle_turns: Counter[int] = Counter()

    def wait_turn(self, rank: int) -> None:
        """Wait for this rank's turn; raise if no rank can continue, or if another one failed."""
        self._turn_semaphores[rank].acquire()
        if rank in self._deadlocks:
            raise self._deadlocks.pop(rank)
        if self.failure is not None:
            raise RankLostError("comm.rank-failed", f"rank {rank} ends: another rank failed")

    def pass_turn(self) -> None:
        """Give the turn to a live rank, one of those that waited least since the last event."""
        if self.live_ranks:
            least = min(self._idle_turns[rank] for rank in self.live_ranks)
            ready = [rank for rank in self.live_ranks if self._idle_turns[rank] == least]
            self._turn_semaphores[self._random.choice(ready)].release()

    def idle(self, rank: int, description: str) -> None:
        """Pass the turn on and wait for the next one."""
        self._wait_descriptions[rank] = description
        if self._last_event_count != self.matcher.event_count:
            self._last_event_count = self.matcher.event_count
            self._idle_turns.clear()
        self._idle_turns[rank] += 1
        if all(self._idle_turns[other] >= DEADLOCK_TURNS for other in self.live_ranks):
            self._idle_turns.clear()
            message = "deadlock: " + self.describe_waits()
            self._deadlocks = {
                other: Deadlock("comm.deadlock", message) for other in self.live_ranks
            }
        self.pass_turn()
        self.wait_turn(rank)

    def describe_waits(self) -> str:
        """Return, for each live rank, what it waits for or last waited for."""
        return "; ".join(
            f"rank {rank} waits for {self._wait_descriptions.get(rank, 'its first turn')}"
            for rank in self.live_ranks
        )

    def finish(self, rank: int, error: BaseException | None) -> None:
        """End a rank; the first error is kept."""
        self.failure = self.failure or error
        self.live_ranks.remove(rank)
        self.pass_turn()


@final
class ThreadBackend(Backend):
    """A group of threads; `members` are the world ranks of the group."""

    def __init__(
        self,
        scheduler: ThreadScheduler,
        members: Sequence[int],
        world_rank: int,
        hosts: Sequence[str],
        nodes: Sequence[Hashable],
        group: Hashable = (),
    ) -> None:
        self.rank, self.size = members.index(world_rank), len(members)
        self.hosts, self.nodes, self.world_ranks = tuple(hosts), tuple(nodes), tuple(members)
        self.library = "threads"
        self._scheduler = scheduler
        self._world_rank = world_rank
        self._group = group
        self._split_count = 0

    def isend(self, data: Bytes, dest: int, tag: int) -> PointToPointRequest:
        """Send; complete once the receive was posted."""
        return self._scheduler.matcher.post_send((self._group, self.rank, dest, tag), data)

    def irecv(self, data: Bytes, source: int, tag: int) -> PointToPointRequest:
        """Receive."""
        return self._scheduler.matcher.post_recv((self._group, source, self.rank, tag), data)

    def idle(self, turn: int, description: str) -> None:
        """Pass the turn on; raise `Deadlock` in all ranks if none can go on."""
        self._scheduler.idle(self._world_rank, description)

    def split(self, color: int, key: int) -> ThreadBackend:
        """Return the backend of the ranks of this colour. Collective over the group."""
        self._split_count += 1
        requests = self._scheduler.split_requests[self._group, self._split_count]
        requests[self.rank] = (color, key)
        self._scheduler.matcher.event_count += 1
        while len(requests) < self.size:
            self.idle(
                0, f"split {self._split_count}: {len(requests)} of {self.size} ranks are there"
            )
        ranks = sorted((k, rank) for rank, (c, k) in requests.items() if c == color)
        members = [self.world_ranks[rank] for _, rank in ranks]
        hosts = [self.hosts[rank] for _, rank in ranks]
        nodes = [self.nodes[rank] for _, rank in ranks]
        group = (self._group, self._split_count, color)
        return ThreadBackend(self._scheduler, members, self._world_rank, hosts, nodes, group)

    def abort(self, code: int) -> NoReturn:
        """End all ranks; `run_ranks` raises `SystemExit(code)`."""
        sys.exit(code)


def run_ranks(
    ranks: int,
    function: Callable[[Comm], T],
    *,
    seed: int = 0,
    hosts: Sequence[str] | None = None,
    nodes: Sequence[Hashable] | None = None,
    timeout_s: float = 60.0,
) -> list[T]:
    """Run `function` on n ranks in this process and return their results in rank order.

    Parameters
    ----------
    ranks : int
        Number of ranks.
    function : callable
        Called once per rank, in a thread of its own, with the communicator of all ranks.
    seed : int
        Chooses which rank runs next at every wait.
    hosts : sequence of str, optional
        A made-up host per rank; default: all on one.
    nodes : sequence of hashable, optional
        A made-up node per rank; default: one for each host.
    timeout_s : float
        Seconds in which all ranks must end.

    Raises
    ------
    Deadlock
        In every rank and here, when no rank can continue.
    CommTimeout
        Here, after `timeout_s`.
    BaseException
        The first error of any rank; the others raise `RankLostError` at their next wait.
    """
    scheduler = ThreadScheduler(ranks, seed)
    host_names = tuple(hosts) if hosts is not None else ("localhost",) * ranks
    node_names = host_names if nodes is None else tuple(nodes)
    results: dict[int, T] = {}

    def run_rank(rank: int) -> None:
        error: BaseException | None = None
        try:
            scheduler.wait_turn(rank)
            backend = ThreadBackend(scheduler, range(ranks), rank, host_names, node_names)
            results[rank] = function(Comm(backend))
        except BaseException as caught:
            error = caught
        scheduler.finish(rank, error)

    threads = [
        threading.Thread(target=run_rank, args=(rank,), daemon=True) for rank in range(ranks)
    ]
    for thread in threads:
        thread.start()
    scheduler.pass_turn()
    _join_threads(scheduler, threads, timeout_s)
    if scheduler.failure is not None:
        raise scheduler.failure
    return [results[rank] for rank in range(ranks)]


def _join_threads(
    scheduler: ThreadScheduler, threads: list[threading.Thread], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise CommTimeout(
                    "comm.timeout", f"{timeout_s:g} s are over: {scheduler.describe_waits()}"
                )
    except BaseException as error:  # Ctrl-C too: the ranks end at their next wait
        scheduler.failure = scheduler.failure or error
        raise
