"""Comm: a group of ranks that exchange tensors. Higher layers use only this class.

Invariants: no rank ever blocks outside `Comm.wait`, which keeps everything in flight moving; the
next receive of every channel is always posted; a send completes only once its receive was posted,
whatever the size, so its completion returns the credit.

All ranks of the group must call its collectives in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from dtrain.comm.all_to_all import AllToAll
from dtrain.comm.allreduce import MeanReduction
from dtrain.comm.backends.base import Backend, Bytes
from dtrain.comm.call_order import CallOrder, Tensors, unnamed_tensors
from dtrain.comm.channels import MessageSpec, RecvChannel, SendChannel
from dtrain.comm.context import Collective, CommContext
from dtrain.comm.flight_recorder import Pending, flush_output
from dtrain.comm.shared_memory import allocate_shared
from dtrain.comm.staging import Host, Message, Pinned
from dtrain.comm.transport import Transport
from dtrain.comm.tree import allgather_bytes, broadcast_tensors, run_steps
from dtrain.errors import DtrainError
from dtrain.schedules.forecast import CREDITS


@final
class Comm:
    """One rank's handle of a group of ranks.

    Parameters
    ----------
    backend : Backend
        The object that moves the bytes; nothing else may use it.
    credits : int
        Sends per (destination, tag) that may be in flight; one more waits for the oldest.
    timeout_s : float, optional
        Seconds after which a wait raises `CommTimeout`; default: never.
    chunk_bytes : int
        Longer messages travel in chunks; MPI counts must stay below 2^31.
    name : str
        Of the group, in flight records.
    context : CommContext, optional
        Of the group that this one was split from; default: a new one.

    Attributes
    ----------
    rank, size : int
        Position in the group, and number of its ranks.
    hosts : tuple of str
        Host of each rank of the group, for people.
    nodes : tuple of hashable
        Node of each rank of the group: ranks of one node share memory.
    library : str
        Name and version of the library that moves the bytes.
    topology : NodeTopology
        The ranks of the group by node.
    node_index, node_count : int
        Index of this rank's node, in order of first appearance, and number of nodes.
    traffic : TrafficCounter
        Bytes that this rank has sent, over all groups split from one world.
    flight : FlightRecorder
        Last events and open waits of this rank, over all these groups.
    context : CommContext
        The state that all these groups share, with its debug mode and its record of waits.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        credits: int = CREDITS,
        timeout_s: float | None = None,
        chunk_bytes: int = 1 << 30,
        name: str = "world",
        context: CommContext | None = None,
    ) -> None:
        self.rank, self.size = backend.rank, backend.size
        self.hosts, self.nodes = backend.hosts, backend.nodes
        self.library = backend.library
        self.name = name
        self.credits = credits
        self.timeout_s = timeout_s
        self.context = context or CommContext(backend)
        self.traffic = self.context.traffic
        self.flight = self.context.flight
        self.transport = Transport(backend, self.traffic, self.flight, chunk_bytes, name)
        self.topology = self.transport.topology
        self.node_index = self.topology.node_index
        self.node_count = len(self.topology.nodes)
        self._call_order = CallOrder(self.transport, self.context)
        self.send_channels: dict[tuple[int, int], SendChannel] = {}
        self.recv_channels: dict[tuple[int, int], RecvChannel] = {}
        self.collectives: list[Collective] = []  # open at the last look
        self._split_count = 0  # the same on all ranks
        self.context.groups.append(self)

    # ---- waiting

    def wait(self, is_done: Callable[[], bool], description: str, peer: int | None = None) -> None:
        """Return when `is_done()`: the only wait of the program.

        Until then everything in flight keeps moving, in this group and in all groups split from the
        same world. `peer` is the rank that this one waits for; default: all ranks that are not in a
        wait of the same `description`.

        Raises
        ------
        CommTimeout
            After `timeout_s`; as `Deadlock` where no rank can continue (threads and single only).
        """
        if not is_done():
            backend = self.transport.backend
            world_ranks = backend.world_ranks
            peers = world_ranks if peer is None else (world_ranks[peer],)
            self.context.wait(is_done, description, peers, backend, self.timeout_s)

    @property
    def wait_s(self) -> float:
        """Seconds that this rank has spent in waits, over all groups of its world."""
        return self.context.wait_s

    def progress(self) -> None:
        """Move everything that is in flight, in all groups and both ways; never wait.

        For use between computations: MPI moves large messages only inside its calls.
        """
        self.context.progress(all_lanes=True)
        self.context.poll_receives()

    def pending(self) -> Iterator[Pending]:
        """Yield start time and description of what was in flight at the last look."""
        for send_channel in self.send_channels.values():
            yield from send_channel.pending()
        for recv_channel in self.recv_channels.values():
            yield from recv_channel.pending()
        for collective in self.collectives:
            yield collective.start_time, f"{collective.describe()} of {self.name}"

    def close(self) -> None:
        """Leave the group: waits no longer progress it. Local; may be called twice.

        The backend stays open, since freeing an MPI communicator waits for all its ranks.

        Raises
        ------
        RuntimeError
            Something is in flight, or was declared and has not arrived.
        """
        self.context.progress()
        if pending := list(self.pending()):
            raise RuntimeError(
                f"{self.name} is closed with {len(pending)} in flight: {pending[0][1]}"
            )
        if self in self.context.groups:
            self.context.groups.remove(self)

    def set_device(self, device: torch.device) -> None:
        """Set the device of this rank, where `recv` puts messages, for all groups of its world.

        Tensors on an accelerator are copied through memory of the host on their way to and from the
        backend. Local; nothing may be declared or in flight.
        """
        self.context.staging = Host() if device.type == "cpu" else Pinned(device)

    # ---- between two ranks

    def send_channel(self, dest: int, tag: int) -> SendChannel:
        """Return the channel to `dest` under `tag`, one object for all calls.

        ``send_channel(dest, tag).send(message)`` is ``isend(message, dest, tag)`` without the
        look-up.
        """
        channel = self.send_channels.get((dest, tag))
        if channel is None:
            channel = SendChannel(self.transport, self.context, self.wait, dest, tag, self.credits)
            self.send_channels[dest, tag] = channel
        return channel

    def recv_channel(self, source: int, tag: int) -> RecvChannel:
        """Return the channel from `source` under `tag`, one object for all calls.

        Its `post_recv(specs)` and `receive()` are those of `Comm` without the look-up.
        """
        channel = self.recv_channels.get((source, tag))
        if channel is None:
            channel = RecvChannel(self.transport, self.context, self.wait, source, tag)
            self.recv_channels[source, tag] = channel
        return channel

    def isend(self, message: Message, dest: int, tag: int) -> None:
        """Send a tensor, or a tuple of tensors as one message; the receiver declares its specs.

        Only bytes travel, in C order, of any dtype and stride. The memory must not change until
        `flush` (or until the receiver is known to have the message). When `credits` sends to the
        same rank and tag are in flight, this waits for the oldest of them. Tags are
        0 … `USER_TAGS` - 1.

        Raises
        ------
        TypeError
            A tensor is sparse, quantised, nested or meta; the message names it.
        ValueError
            The tuple is empty, or the tag is out of range.
        """
        self.send_channel(dest, tag).send(message)

    def post_recv(self, source: int, tag: int, specs: Iterable[MessageSpec]) -> None:
        """Declare the next messages of a channel, in order.

        A spec is (shape, dtype), or a tuple of these for a message of several tensors. The next
        receive is always posted, into new memory that starts on a 64-byte boundary. Declarations
        add up; every declared message must arrive before the program ends.
        """
        self.recv_channel(source, tag).post_recv(specs)

    def recv(self, source: int, tag: int) -> Message:
        """Wait for the next message of a channel and return it: a tensor or a tuple, as declared.

        The caller owns it.

        Raises
        ------
        RuntimeError
            No message was declared by `post_recv`.
        """
        return self.recv_channel(source, tag).receive()

    def flush(self) -> None:
        """Wait until every `isend` of this group is complete."""
        for channel in tuple(self.send_channels.values()):
            channel.flush()

    # ---- among all ranks

    def mean_(self, tensors: Tensors, weight: float | None = None) -> None:
        """Replace tensors by their weighted mean, in place. Collective over the group.

        On one node the result is w_0 t_0 + w_1 t_1 + …, in rank order. Over nodes it is the sum of
        the nodes' sums, in order of their first ranks: (w_0 t_0 + w_1 t_1) + (w_2 t_2 + …) + ….
        Every product and sum is rounded, whatever the sizes: the same bits on all ranks and in
        every repetition. Equal weights of a node that are a power of two multiply its sum once.
        Sums of bfloat16 and float16 are made in float32, those of float64 in float64.
        `dtrain.comm.allreduce` states the traffic between nodes.

        Parameters
        ----------
        tensors : sequence of Tensor, or mapping of str to Tensor
            float64, float32, bfloat16, float16 or complex, a pair of these; the same shapes on all
            ranks. The errors of the debug mode show the names.
        weight : float, optional
            Weight of this rank, 1/size by default; the weights need not add up to 1.

        Raises
        ------
        TypeError
            A tensor has another dtype or no dense memory; the message names it.
        ValueError
            Elements of a tensor, or two tensors, share memory; the message names them.
        """
        self.imean_(tensors, weight).wait()
        self.context.progress()  # drops the reference to the tensors

    def imean_(self, tensors: Tensors, weight: float | None = None) -> MeanReduction:
        """Start `mean_` and return its handle (`test`, `wait`). Collective over the group.

        The tensors must not be used until it is complete. Every wait of any group advances it;
        between waits only `test` and `progress` do. Several may be in flight, and may be waited for
        in any order.
        """
        mean = MeanReduction(
            self.transport,
            unnamed_tensors(tensors),
            1.0 / self.size if weight is None else weight,
            self._call_order.reserve_tags("mean_", tensors),
            self.context.buffer_pool,
            self.context.staging,
            self.wait,
        )
        if not mean.test():
            self.collectives.append(mean)
        return mean

    def broadcast_(self, tensors: Tensors, root: int = 0) -> None:
        """Overwrite tensors by those of `root`, in place. Collective over the group.

        Shapes and dtypes are the same on all ranks; any dtype. Raises as `mean_` does.
        """
        self.flight.note("broadcast", len(tensors), "tensors of", self.name, "from rank", root)
        tag = self._call_order.reserve_tags(f"broadcast_ from rank {root}", tensors)
        steps = broadcast_tensors(
            self.transport, unnamed_tensors(tensors), root, tag, self.context.staging
        )
        description = f"{len(tensors)} tensors from rank {root} of {self.name} with tag {tag}"
        run_steps(steps, self.wait, description)

    def ialltoall(self, parts: Sequence[Tensor]) -> AllToAll:
        """Start to send ``parts[r]`` to each rank r; return a handle. Collective over the group.

        The handle's ``wait()`` returns the parts that this rank receives, by rank; each has the
        shape and dtype of its own ``parts[rank]``. The parts must not be used before. An
        all-gather is n times the same part.

        Raises
        ------
        TypeError
            A part has no dense memory; the message gives its number.
        ValueError
            There are not as many parts as ranks.
        """
        tag = self._call_order.reserve_tags("all_to_all", parts)
        self.flight.note("all-to-all", len(parts), "parts of", self.name)
        exchange = AllToAll(self.transport, parts, tag, self.context.staging, self.wait)
        if not exchange.test():
            self.collectives.append(exchange)
        return exchange

    def allgather_object(self, item: Any) -> list[Any]:
        """Return the items of all ranks, in rank order. Collective over the group.

        An item must be plain values of JSON; tuples are returned as lists.
        """
        self.flight.note("exchange", "of", self.name)
        tag = self._call_order.reserve_tags("exchange")
        steps = allgather_bytes(self.transport, json.dumps(item).encode(), tag)
        description = f"the control data of all ranks of {self.name} with tag {tag}"
        return list(json.loads(run_steps(steps, self.wait, description)))

    def raise_together(self, error: DtrainError | None) -> None:
        """Raise the error of the lowest failing rank on all ranks. Collective over the group."""
        for record in self.allgather_object(None if error is None else error.to_record()):
            if record is not None:
                raise DtrainError.from_record(record)

    def allocate_shared(self, size_bytes: int) -> Bytes | None:
        """Return zeros that all ranks of the group share: one memory, not a copy each.

        Collective over the group, whose ranks must be on one node, with the same size on all of
        them. It is freed when no rank refers to it any longer, however the ranks end. What one rank
        writes others may read after the next collective. None, on all ranks: they cannot share
        memory, or the machine has less. The caller makes sure that `size_bytes` are available.

        Raises
        ------
        ValueError
            The group has ranks on several nodes.
        """
        self.flight.note("shared memory", size_bytes, "bytes of", self.name)
        return allocate_shared(self, size_bytes)

    # ---- groups

    def split(self, color: int, key: int = 0, name: str = "") -> Comm:
        """Return the group of the ranks of this colour. Collective over the group.

        Its ranks are in order of key, then rank. Colours are not negative. Messages of different
        groups never match; traffic is counted over all groups.

                 rank  0  1  2  3              split(rank % 2)
                       a  b  a  b       ->     a: 0, 2 are its ranks 0, 1;  b: 1, 3 are its 0, 1
        """
        self._split_count += 1
        backend = self.transport.backend
        with self.context.record_wait(
            f"all ranks of {self.name}, to split it", backend.world_ranks
        ):
            split_backend = backend.split(color, key)
        return Comm(
            split_backend,
            credits=self.credits,
            timeout_s=self.timeout_s,
            chunk_bytes=self.transport.chunk_bytes,
            name=name or f"{self.name}.{self._split_count}",
            context=self.context,
        )

    def dup(self, name: str = "") -> Comm:
        """Return a group of the same ranks with messages of its own. Collective over the group."""
        return self.split(0, name=name)

    def split_by_node(self) -> Comm:
        """Return the group of the ranks on this host, in rank order. Collective over the group."""
        return self.split(self.node_index)

    def without_counting(self) -> AbstractContextManager[None]:
        """Return a context in which sends that start are not counted, in any group."""
        return self.traffic.without_counting()

    def abort(self, code: int) -> NoReturn:
        """End all ranks of the job with this exit code, this one included."""
        flush_output()
        self.transport.backend.abort(code)
