"""Comm: the few verbs with which ranks exchange tensors. The only thing that other floors see.

Invariants: no rank ever blocks outside `Comm.wait`, which keeps everything in flight going; the
next receive of every route is always posted; a send completes only once its receive was posted,
whatever the size, so that its completion is the credit.

Every verb that is called collective must be called by all ranks of the group, in the same order.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

from torch import Tensor

from dtrain.comm.line import Line
from dtrain.comm.mean import PIECE_BYTES, Mean
from dtrain.comm.memory import Scratch, raw, words
from dtrain.comm.routes import Inbox, Outbox, Spec
from dtrain.comm.traffic import Traffic
from dtrain.comm.tree import broadcast, finish, gather
from dtrain.comm.wire import Stall, Wire
from dtrain.errors import Refusal

TAGS = 1 << 14
"""Tags of users end here and those of collectives begin; MPI promises only 2^15 in all."""

SPAN = 64
"""Tags that one collective may use."""


@final
@dataclass
class Shared:
    """What a world and all groups split from it have in common, on one rank."""

    traffic: Traffic = field(default_factory=Traffic)
    polls: list[Callable[[], object]] = field(default_factory=list)
    scratch: Scratch = field(default_factory=lambda: Scratch(PIECE_BYTES))
    waited_s: float = 0.0


@final
class Comm:
    """One group of ranks, seen by one of them.

    Parameters
    ----------
    wire : Wire
        What moves the bytes; it must not be used by anything else.
    credits : int
        Sends per (destination, tag) that may be under way; one more waits for the oldest.
    timeout_s : float, optional
        Seconds after which a wait raises `Stall`; default: never.
    chunk_bytes : int
        Longer messages travel in parts; MPI counts must stay below 2^31.

    Attributes
    ----------
    rank, size : int
        Position in the group, and number of its ranks.
    hosts : tuple of str
        Host of each rank of the group.
    library : str
        What moves the bytes, in words, with its version.
    node, nodes : int
        Index of my host, in order of first appearance, and number of hosts.
    traffic : Traffic
        What this rank has sent, over all groups split from one world.
    polls : list of callable
        Called in every turn of every wait, in all those groups; a poll must not wait.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        credits: int = 2,
        timeout_s: float | None = None,
        chunk_bytes: int = 1 << 30,
        shared: Shared | None = None,
    ) -> None:
        self.rank, self.size, self.hosts = wire.rank, wire.size, wire.hosts
        self.library = wire.library
        names = list(dict.fromkeys(self.hosts))
        self.node, self.nodes = names.index(self.hosts[self.rank]), len(names)
        self.credits, self.timeout_s = credits, timeout_s
        self._shared = shared or Shared()
        self.traffic, self.polls = self._shared.traffic, self._shared.polls
        self.line = Line(wire, self.traffic, chunk_bytes)
        self._outboxes: dict[tuple[int, int], Outbox] = {}
        self._inboxes: dict[tuple[int, int], Inbox] = {}
        self._means: list[Mean] = []
        self._started = 0  # collectives so far: the same number on all ranks
        self.polls.append(self._progress)

    # ---- waiting

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Return when `done()`: the one wait of the program.

        Until then everything in flight is kept going, in this group and in all its relatives.

        Raises
        ------
        Stall
            After `timeout_s`, or where no rank can go on (threads and self only).
        """
        if done():
            return
        start, turn = time.perf_counter(), 0
        try:
            while not done():
                for poll in tuple(self.polls):
                    poll()
                if self.timeout_s is not None and time.perf_counter() - start > self.timeout_s:
                    raise Stall(
                        f"rank {self.rank} of {self.size} waited {self.timeout_s:g} s for {what}"
                    )
                self.line.wire.idle(turn, what)
                turn += 1
        finally:
            self._shared.waited_s += time.perf_counter() - start

    @property
    def waited_s(self) -> float:
        """Seconds that this rank has spent in waits, over all groups of the family."""
        return self._shared.waited_s

    def _progress(self) -> None:
        for outbox in self._outboxes.values():
            outbox.look()
        if self._means:
            self._means = [mean for mean in self._means if not mean.test()]

    # ---- between two ranks

    def isend(self, tensor: Tensor, to: int, tag: int) -> None:
        """Send a tensor on the CPU; bytes only, the receiver states shape and dtype.

        The memory is the caller's and must not change until `flush` (or until the receiver is
        known to have the message). Where `credits` sends to the same rank and tag are under way
        this waits for the oldest of them. Tags are 0 … `TAGS` - 1.
        """
        if (to, tag) not in self._outboxes:
            self._outboxes[to, tag] = Outbox(self.line, to, _legal(tag))
        outbox = self._outboxes[to, tag]
        self.wait(
            lambda: len(outbox) < self.credits, f"a credit to send to rank {to} with tag {tag}"
        )
        outbox.send(tensor)

    def expect(self, source: int, tag: int, specs: Iterable[Spec]) -> None:
        """Declare the next messages of a route, in order: (shape, dtype) each.

        The next one is always posted, into fresh memory that starts on a 64-byte boundary.
        Declarations add up; what is declared must come before the program ends.
        """
        if (source, tag) not in self._inboxes:
            self._inboxes[source, tag] = Inbox(self.line, source, _legal(tag))
        self._inboxes[source, tag].expect(specs)

    def recv(self, source: int, tag: int) -> Tensor:
        """Return the next message of a route that was declared by `expect`; the caller owns it.

        Raises
        ------
        RuntimeError
            Where no message was declared.
        """
        inbox = self._inboxes.get((source, tag))
        if inbox is None or inbox.posted is None:
            raise RuntimeError(f"no message is expected from rank {source} with tag {tag}")
        tensor, request = inbox.posted
        self.wait(request.test, f"{words(tensor)} from rank {source} with tag {tag}")
        inbox.post()
        return tensor

    def flush(self) -> None:
        """Wait until every `isend` of this group is complete."""
        for (to, tag), outbox in tuple(self._outboxes.items()):
            what = f"rank {to} to take {len(outbox)} messages with tag {tag}"
            self.wait(lambda outbox=outbox: not len(outbox), what)  # type: ignore[misc]

    # ---- among all ranks

    def mean_(self, tensors: Sequence[Tensor], weight: float | None = None) -> None:
        """Replace tensors by their weighted mean over the group, in place. Collective.

        The result is w_0 t_0 + w_1 t_1 + …, every product and sum rounded, in rank order,
        whatever the sizes: the same bits on all ranks and in every repetition. Sums of bfloat16
        and float16 are made in float32, those of float64 in float64.

        Parameters
        ----------
        tensors : sequence of Tensor
            float64, float32, bfloat16 or float16, on the CPU; the same shapes on all ranks.
        weight : float, optional
            This rank's weight; default: 1/size. That they add up to 1 is the caller's business.

        Raises
        ------
        TypeError
            Names the first tensor of another dtype.
        """
        mean = self.imean_(tensors, weight)
        mean.wait()
        self._progress()  # which lets go of it

    def imean_(self, tensors: Sequence[Tensor], weight: float | None = None) -> Mean:
        """Start `mean_` and return its handle (`test`, `wait`). Collective.

        Nobody may touch the tensors until it is complete. Every wait of the family keeps it going;
        between waits only `test` does. Several may be in flight, to be waited for in any order.
        """
        scale = 1.0 / self.size if weight is None else weight
        mean = Mean(self.line, tensors, scale, self._tags(), self._shared.scratch, self.wait)
        if not mean.test():
            self._means.append(mean)
        return mean

    def broadcast_(self, tensors: Sequence[Tensor], root: int = 0) -> None:
        """Overwrite tensors, of the same shapes and dtypes everywhere, by those of `root`.
        Collective."""
        tag, counted = self._tags(), self.traffic.on
        for tensor in tensors:
            data = tensor.detach().contiguous()
            steps = broadcast(self.line, raw(data), root, tag, counted)
            finish(steps, self.wait, f"the broadcast of {words(tensor)} from rank {root}")
            if data.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(data)

    def exchange(self, item: Any) -> list[Any]:
        """Return the items of all ranks, in rank order: whatever JSON can hold. Collective."""
        steps = gather(self.line, json.dumps(item).encode(), self._tags())
        return list(json.loads(finish(steps, self.wait, "the control data of all ranks")))

    def agree(self, refusal: Refusal | None) -> None:
        """Raise, on all ranks, the refusal of the lowest rank that has one. Collective."""
        mine = None if refusal is None else [refusal.message, refusal.code]
        for found in self.exchange(mine):
            if found is not None:
                message, code = found
                raise Refusal(message, code, agreed=True)

    # ---- groups

    def split(self, color: int, key: int = 0) -> Comm:
        """Return the group of the ranks with my colour, by key, then rank. Collective.

        Colours are not negative. Messages of different groups never meet; traffic and polls are
        shared.

                 rank  0  1  2  3              split(rank % 2)
                       a  b  a  b       ->     a: 0, 2 are its ranks 0, 1;  b: 1, 3 are its 0, 1
        """
        return Comm(
            self.line.wire.split(color, key),
            credits=self.credits,
            timeout_s=self.timeout_s,
            chunk_bytes=self.line.chunk_bytes,
            shared=self._shared,
        )

    def dup(self) -> Comm:
        """Return the same group once more, whose messages are apart. Collective."""
        return self.split(0)

    def by_node(self) -> Comm:
        """Return the group of the ranks on my host, in rank order. Collective."""
        return self.split(self.node)

    def uncounted(self) -> AbstractContextManager[None]:
        """Return a context in which nothing that is started is counted, in the whole family."""
        return self.traffic.paused()

    def abort(self, code: int) -> NoReturn:
        """End all ranks of the job with this exit code, this one included."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.line.wire.abort(code)

    def _tags(self) -> int:
        """Reserve tags in program order: fixed ones cross-match as soon as two are in flight."""
        self._started += 1
        return TAGS + SPAN * (self._started % (TAGS // SPAN))


def _legal(tag: int) -> int:
    if not 0 <= tag < TAGS:
        raise ValueError(f"tag {tag} is not in 0 … {TAGS - 1}")
    return tag
