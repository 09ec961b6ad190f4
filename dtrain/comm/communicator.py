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

from dtrain.comm.all_to_all import AllToAll
from dtrain.comm.allreduce import MeanReduction
from dtrain.comm.backends.base import Backend
from dtrain.comm.call_order import CallOrder, Tensors, unnamed_tensors
from dtrain.comm.channels import Channels, MessageSpec
from dtrain.comm.context import CommContext
from dtrain.comm.flight_recorder import flush_output
from dtrain.comm.staging import Host, Message, Pinned
from dtrain.comm.transport import Transport
from dtrain.comm.tree import allgather_bytes, broadcast_tensors, run_steps
from dtrain.errors import DtrainError


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
        backend: Backend,
        *,
        credits: int = 2,
        timeout_s: float | None = None,
        chunk_bytes: int = 1 << 30,
        name: str = "world",
        context: CommContext | None = None,
    ) -> None:
        self.rank, self.size, self.hosts = backend.rank, backend.size, backend.hosts
        self.library, self.name = backend.library, name
        self.credits, self.timeout_s = credits, timeout_s
        self.context = context or CommContext(backend)
        self.traffic, self.flight = self.context.traffic, self.context.flight
        self.transport = Transport(backend, self.traffic, self.flight, chunk_bytes, name)
        self.node_index, self.node_count = (
            self.transport.topology.node_index,
            len(self.transport.topology.nodes),
        )
        self._channels, self._call_order = (
            Channels(self.transport),
            CallOrder(self.transport, self.context),
        )
        self._split_count = 0  # so far: the same number on all ranks
        self.context.group_channels.append(self._channels)

    # ---- waiting

    def wait(self, is_done: Callable[[], bool], description: str, peer: int | None = None) -> None:
        """Return when `done()`: the one wait of the program.

        Until then everything in flight is kept going, in this group and in all its relatives.
        `peer` is who is waited for; default: all ranks that do not wait for the same `what`.

        Raises
        ------
        Stall
            After `timeout_s`, or where no rank can go on (threads and self only).
        """
        if not is_done():
            wire = self.transport.backend
            peers = wire.world_ranks if peer is None else (wire.world_ranks[peer],)
            self.context.wait(is_done, description, peers, wire, self.timeout_s)

    @property
    def wait_s(self) -> float:
        """Seconds that this rank has spent in waits, over all groups of the family."""
        return self.context.wait_s

    def progress(self) -> None:
        """Move everything that is in flight in the whole family, both ways; never wait.

        For use between computations: MPI moves large messages only inside its calls.
        """
        self.context.progress(all_lanes=True)
        self.context.poll_receives()

    def close(self) -> None:
        """Leave the group: no turn looks at it any more. Local; may be called twice.

        The wire stays open, since freeing a communicator of MPI waits for all ranks.

        Raises
        ------
        RuntimeError
            Where something is in flight or was declared and has not come.
        """
        self.context.close(self._channels)

    def set_device(self, device: torch.device) -> None:
        """State where this rank computes: there `recv` puts messages, in the whole family.

        Tensors on an accelerator are copied through memory of the host on their way to and from
        the wire. Local; nothing may be declared or in flight.
        """
        self.context.staging = Host() if device.type == "cpu" else Pinned(device)

    # ---- between two ranks

    def isend(self, message: Message, dest: int, tag: int) -> None:
        """Send a tensor, or a tuple of tensors as one message; the receiver states what it is.

        Only bytes travel, in C order, of any dtype and stride. The memory is the caller's and must
        not change until `flush` (or until the receiver is known to have the message). Where
        `credits` sends to the same rank and tag are under way this waits for the oldest of them.
        Tags are 0 … `TAGS` - 1. Raises `TypeError`, by name, for a tensor without plain memory.
        """
        outbox = self._channels.send_channel(dest, tag)
        if len(outbox) >= self.credits:
            what = f"a credit to send to rank {dest} with tag {tag}"
            self.wait(lambda: len(outbox) < self.credits, what, dest)
        outbox.send(message, self.context.staging)

    def post_recv(self, source: int, tag: int, specs: Iterable[MessageSpec]) -> None:
        """Declare the next messages of a route, in order: of each (shape, dtype), or a tuple of
        such for a message of several tensors.

        The next one is always posted, into fresh memory that starts on a 64-byte boundary.
        Declarations add up; what is declared must come before the program ends.
        """
        self._channels.recv_channel(source, tag, self.context.staging).post_recv(specs)

    def recv(self, source: int, tag: int) -> Message:
        """Return the next message of a route, a tensor or a tuple of them as it was declared by
        `expect`; the caller owns it. Raises `RuntimeError` where none was declared."""
        inbox, transfer = self._channels.next_transfer(source, tag)
        if not transfer.request.test():
            what = f"{transfer.describe()} from rank {source} with tag {tag}"
            self.wait(transfer.request.test, what, source)
        return inbox.receive()

    def flush(self) -> None:
        """Wait until every `isend` of this group is complete."""
        for (to, tag), outbox in tuple(self._channels.send_channels.items()):
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
        self._channels.progress()  # which lets go of it

    def imean_(self, tensors: Tensors, weight: float | None = None) -> MeanReduction:
        """Start `mean_` and return its handle (`test`, `wait`). Collective.

        Nobody may touch the tensors until it is complete. Every wait of the family keeps it going;
        between waits only `test` and `progress` do. Several may be in flight, to be waited for in
        any order.
        """
        family, scale = self.context, 1.0 / self.size if weight is None else weight
        tag, line, own = (
            self._call_order.reserve_tags("mean_", tensors),
            self.transport,
            unnamed_tensors(tensors),
        )
        mean = MeanReduction(line, own, scale, tag, family.buffer_pool, family.staging, self.wait)
        if not mean.test():
            self._channels.collectives.append(mean)
        return mean

    def broadcast_(self, tensors: Tensors, root: int = 0) -> None:
        """Overwrite tensors, of the same shapes and dtypes everywhere, by those of `root`.
        Collective. Refuses what `mean_` refuses, dtypes excepted."""
        self.flight.note("broadcast", len(tensors), "tensors of", self.name, "from rank", root)
        tag = self._call_order.reserve_tags(f"broadcast_ from rank {root}", tensors)
        what = f"{len(tensors)} tensors from rank {root} of {self.name} with tag {tag}"
        run_steps(
            broadcast_tensors(
                self.transport, unnamed_tensors(tensors), root, tag, self.context.staging
            ),
            self.wait,
            what,
        )

    def ialltoall(self, parts: Sequence[Tensor]) -> AllToAll:
        """Start to give each rank r ``parts[r]``; return a handle (`test`, `wait`). Collective.

        ``wait()`` returns by rank what was given to me; each part has the shape and dtype of my own
        ``parts[rank]``. Nobody may touch the parts before. A gather is n times the same part.
        Raises `TypeError`, by number, for a tensor without plain memory.
        """
        tag = self._call_order.reserve_tags("all_to_all", parts)
        self.flight.note("all-to-all", len(parts), "parts of", self.name)
        trade = AllToAll(self.transport, parts, tag, self.context.staging, self.wait)
        if not trade.test():
            self._channels.collectives.append(trade)
        return trade

    def allgather_object(self, item: Any) -> list[Any]:
        """Return the items of all ranks, in rank order: whatever JSON can hold. Collective."""
        self.flight.note("exchange", "of", self.name)
        tag = self._call_order.reserve_tags("exchange")
        steps = allgather_bytes(self.transport, json.dumps(item).encode(), tag)
        what = f"the control data of all ranks of {self.name} with tag {tag}"
        return list(json.loads(run_steps(steps, self.wait, what)))

    def raise_together(self, error: DtrainError | None) -> None:
        """Raise, on all ranks, the refusal of the lowest rank that has one. Collective."""
        record = None if error is None else error.to_record()
        for other in self.allgather_object(record):
            if other is not None:
                raise DtrainError.from_record(other)

    # ---- groups

    def split(self, color: int, key: int = 0, name: str = "") -> Comm:
        """Return the group of the ranks with my colour, by key, then rank. Collective.

        Colours are not negative. Messages of different groups never meet; traffic is shared.

                 rank  0  1  2  3              split(rank % 2)
                       a  b  a  b       ->     a: 0, 2 are its ranks 0, 1;  b: 1, 3 are its 0, 1
        """
        self._split_count += 1
        with self.context.record_wait(
            f"all ranks of {self.name}, to split it", self.transport.backend.world_ranks
        ):
            wire = self.transport.backend.split(color, key)
        return Comm(
            wire,
            credits=self.credits,
            timeout_s=self.timeout_s,
            chunk_bytes=self.transport.chunk_bytes,
            name=name or f"{self.name}.{self._split_count}",
            context=self.context,
        )

    def dup(self, name: str = "") -> Comm:
        """Return the same group once more, whose messages are apart. Collective."""
        return self.split(0, name=name)

    def split_by_node(self) -> Comm:
        """Return the group of the ranks on my host, in rank order. Collective."""
        return self.split(self.node_index)

    def without_counting(self) -> AbstractContextManager[None]:
        """Return a context in which nothing that is started is counted, in the whole family."""
        return self.traffic.without_counting()

    def abort(self, code: int) -> NoReturn:
        """End all ranks of the job with this exit code, this one included."""
        flush_output()
        self.transport.backend.abort(code)
