"""Comm: the few verbs with which ranks exchange tensors. The only thing that other floors see.

Invariants: no rank ever blocks outside `Comm.wait`, which keeps everything in flight going; the
next receive of every route is always posted; a send completes only once its receive was posted,
whatever the size, so that its completion is the credit.

Every verb that is called collective must be called by all ranks of the group, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from dtrain.comm.desk import Desk
from dtrain.comm.dock import Host, Message, Pinned
from dtrain.comm.family import Family
from dtrain.comm.line import Line
from dtrain.comm.mean import Mean
from dtrain.comm.roll import Roll, Tensors, plain
from dtrain.comm.routes import Specs
from dtrain.comm.trade import Trade
from dtrain.comm.tree import finish, gather, spread
from dtrain.comm.wire import Wire
from dtrain.errors import Refusal
from dtrain.telemetry import flush


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
    name : str
        Of the group, for people who read the flight recorder.

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
    flight : Flight
        What this rank did last and waits for, over all those groups.
    family : Family
        What all those groups share: its debug mode, its notes of waits.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        credits: int = 2,
        timeout_s: float | None = None,
        chunk_bytes: int = 1 << 30,
        name: str = "world",
        family: Family | None = None,
    ) -> None:
        self.rank, self.size, self.hosts = wire.rank, wire.size, wire.hosts
        self.library, self.name = wire.library, name
        self.credits, self.timeout_s = credits, timeout_s
        self.family = family or Family(wire)
        self.traffic, self.flight = self.family.traffic, self.family.flight
        self.line = Line(wire, self.traffic, self.flight, chunk_bytes, name)
        self.node, self.nodes = self.line.tiers.node, len(self.line.tiers.nodes)
        self._desk, self._roll = Desk(self.line), Roll(self.line, self.family)
        self._splits = 0  # so far: the same number on all ranks
        self.family.desks.append(self._desk)

    # ---- waiting

    def wait(self, done: Callable[[], bool], what: str, peer: int | None = None) -> None:
        """Return when `done()`: the one wait of the program.

        Until then everything in flight is kept going, in this group and in all its relatives.
        `peer` is who is waited for; default: all ranks that do not wait for the same `what`.

        Raises
        ------
        Stall
            After `timeout_s`, or where no rank can go on (threads and self only).
        """
        if not done():
            wire = self.line.wire
            peers = wire.world if peer is None else (wire.world[peer],)
            self.family.wait(done, what, peers, wire, self.timeout_s)

    @property
    def waited_s(self) -> float:
        """Seconds that this rank has spent in waits, over all groups of the family."""
        return self.family.waited_s

    def progress(self) -> None:
        """Move everything that is in flight in the whole family, both ways; never wait.

        For use between computations: MPI moves large messages only inside its calls.
        """
        self.family.progress(whole=True)
        self.family.poke()

    def close(self) -> None:
        """Leave the group: no turn looks at it any more. Local; may be called twice.

        The wire stays open, since freeing a communicator of MPI waits for all ranks.

        Raises
        ------
        RuntimeError
            Where something is in flight or was declared and has not come.
        """
        self.family.close(self._desk)

    def onto(self, device: torch.device) -> None:
        """State where this rank computes: there `recv` puts messages, in the whole family.

        Tensors on an accelerator are copied through memory of the host on their way to and from
        the wire. Local; nothing may be declared or in flight.
        """
        self.family.dock = Host() if device.type == "cpu" else Pinned(device)

    # ---- between two ranks

    def isend(self, message: Message, to: int, tag: int) -> None:
        """Send a tensor, or a tuple of tensors as one message; the receiver states what it is.

        Only bytes travel, in C order, of any dtype and stride. The memory is the caller's and must
        not change until `flush` (or until the receiver is known to have the message). Where
        `credits` sends to the same rank and tag are under way this waits for the oldest of them.
        Tags are 0 … `TAGS` - 1. Raises `TypeError`, by name, for a tensor without plain memory.
        """
        outbox = self._desk.outbox(to, tag)
        if len(outbox) >= self.credits:
            what = f"a credit to send to rank {to} with tag {tag}"
            self.wait(lambda: len(outbox) < self.credits, what, to)
        outbox.send(message, self.family.dock)

    def expect(self, source: int, tag: int, specs: Iterable[Specs]) -> None:
        """Declare the next messages of a route, in order: of each (shape, dtype), or a tuple of
        such for a message of several tensors.

        The next one is always posted, into fresh memory that starts on a 64-byte boundary.
        Declarations add up; what is declared must come before the program ends.
        """
        self._desk.inbox(source, tag, self.family.dock).expect(specs)

    def recv(self, source: int, tag: int) -> Message:
        """Return the next message of a route, a tensor or a tuple of them as it was declared by
        `expect`; the caller owns it. Raises `RuntimeError` where none was declared."""
        inbox, transfer = self._desk.next(source, tag)
        if not transfer.request.test():
            what = f"{transfer.words()} from rank {source} with tag {tag}"
            self.wait(transfer.request.test, what, source)
        return inbox.take()

    def flush(self) -> None:
        """Wait until every `isend` of this group is complete."""
        for (to, tag), outbox in tuple(self._desk.outboxes.items()):
            what = f"rank {to} to take {len(outbox)} messages with tag {tag}"
            self.wait(lambda outbox=outbox: not len(outbox), what, to)  # type: ignore[misc]

    # ---- among all ranks

    def mean_(self, tensors: Tensors, weight: float | None = None) -> None:
        """Replace tensors by their weighted mean over the group, in place. Collective.

        On one node the result is w_0 t_0 + w_1 t_1 + …, in rank order. Over nodes it is the sum of
        the nodes' sums, in order of their first ranks: (w_0 t_0 + w_1 t_1) + (w_2 t_2 + …) + ….
        Every product and sum is rounded, whatever the sizes: the same bits on all ranks and in
        every repetition. Sums of bfloat16 and float16 are made in float32, those of float64 in
        float64. What crosses between nodes is in the docstring of `dtrain.comm.mean`.

        Parameters
        ----------
        tensors : sequence of Tensor, or mapping of str to Tensor
            float64, float32, bfloat16 or float16; the same shapes on all ranks. Names are for the
            errors of the debug mode.
        weight : float, optional
            This rank's, 1/size by default; the sum is the caller's business.

        Raises
        ------
        TypeError
            Names the first tensor of another dtype, or without plain memory.
        ValueError
            Names a tensor whose elements share memory, or two that do.
        """
        mean = self.imean_(tensors, weight)
        mean.wait()
        self._desk.look()  # which lets go of it

    def imean_(self, tensors: Tensors, weight: float | None = None) -> Mean:
        """Start `mean_` and return its handle (`test`, `wait`). Collective.

        Nobody may touch the tensors until it is complete. Every wait of the family keeps it going;
        between waits only `test` and `progress` do. Several may be in flight, to be waited for in
        any order.
        """
        family, scale = self.family, 1.0 / self.size if weight is None else weight
        tag, line, own = self._roll.call("mean_", tensors), self.line, plain(tensors)
        mean = Mean(line, own, scale, tag, family.scratch, family.dock, self.wait)
        if not mean.test():
            self._desk.running.append(mean)
        return mean

    def broadcast_(self, tensors: Tensors, root: int = 0) -> None:
        """Overwrite tensors, of the same shapes and dtypes everywhere, by those of `root`.
        Collective. Refuses what `mean_` refuses, dtypes excepted."""
        self.flight.note("broadcast", len(tensors), "tensors of", self.name, "from rank", root)
        tag = self._roll.call(f"broadcast_ from rank {root}", tensors)
        what = f"{len(tensors)} tensors from rank {root} of {self.name} with tag {tag}"
        finish(spread(self.line, plain(tensors), root, tag, self.family.dock), self.wait, what)

    def iall_to_all(self, parts: Sequence[Tensor]) -> Trade:
        """Start to give each rank r ``parts[r]``; return a handle (`test`, `wait`). Collective.

        ``wait()`` returns by rank what was given to me; each part has the shape and dtype of my own
        ``parts[rank]``. Nobody may touch the parts before. A gather is n times the same part.
        Raises `TypeError`, by number, for a tensor without plain memory.
        """
        tag = self._roll.call("all_to_all", parts)
        self.flight.note("all-to-all", len(parts), "parts of", self.name)
        trade = Trade(self.line, parts, tag, self.family.dock, self.wait)
        if not trade.test():
            self._desk.running.append(trade)
        return trade

    def exchange(self, item: Any) -> list[Any]:
        """Return the items of all ranks, in rank order: whatever JSON can hold. Collective."""
        self.flight.note("exchange", "of", self.name)
        tag = self._roll.call("exchange")
        steps = gather(self.line, json.dumps(item).encode(), tag)
        what = f"the control data of all ranks of {self.name} with tag {tag}"
        return list(json.loads(finish(steps, self.wait, what)))

    def agree(self, refusal: Refusal | None) -> None:
        """Raise, on all ranks, the refusal of the lowest rank that has one. Collective."""
        mine = None if refusal is None else [refusal.message, refusal.code]
        for found in self.exchange(mine):
            if found is not None:
                message, code = found
                raise Refusal(message, code, agreed=True)

    # ---- groups

    def split(self, color: int, key: int = 0, name: str = "") -> Comm:
        """Return the group of the ranks with my colour, by key, then rank. Collective.

        Colours are not negative. Messages of different groups never meet; traffic is shared.

                 rank  0  1  2  3              split(rank % 2)
                       a  b  a  b       ->     a: 0, 2 are its ranks 0, 1;  b: 1, 3 are its 0, 1
        """
        self._splits += 1
        with self.family.noted(f"all ranks of {self.name}, to split it", self.line.wire.world):
            wire = self.line.wire.split(color, key)
        return Comm(
            wire,
            credits=self.credits,
            timeout_s=self.timeout_s,
            chunk_bytes=self.line.chunk_bytes,
            name=name or f"{self.name}.{self._splits}",
            family=self.family,
        )

    def dup(self, name: str = "") -> Comm:
        """Return the same group once more, whose messages are apart. Collective."""
        return self.split(0, name=name)

    def by_node(self) -> Comm:
        """Return the group of the ranks on my host, in rank order. Collective."""
        return self.split(self.node)

    def uncounted(self) -> AbstractContextManager[None]:
        """Return a context in which nothing that is started is counted, in the whole family."""
        return self.traffic.paused()

    def abort(self, code: int) -> NoReturn:
        """End all ranks of the job with this exit code, this one included."""
        flush()
        self.line.wire.abort(code)
