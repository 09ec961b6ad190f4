"""Routes: the messages between two ranks under one tag, in order, seen from either end.

Invariant: the next message that will come is always posted, and a message is under way until the
other end has posted it; so what is under way is bounded by the credits.

    Outbox                                          Inbox
    a  under way, credit 1 -----------------------> a  posted
    b  under way, credit 2 ---> (parked)            b  declared: posted when a is taken
    c  waits for a to arrive                        c  declared

A message of several tensors is several transfers in a row, of one credit in all.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from dtrain.comm.all_to_all import AllToAll
from dtrain.comm.allreduce import MeanReduction
from dtrain.comm.backends.base import Request, combine_requests
from dtrain.comm.buffers import as_bytes, describe_tensor
from dtrain.comm.flight_recorder import Pending
from dtrain.comm.staging import Message, Staging, require_dense
from dtrain.comm.transport import Transport

TensorSpec = tuple[Sequence[int], torch.dtype]
"""Shape and dtype of a tensor."""


MessageSpec = TensorSpec | tuple[TensorSpec, ...]
"""Of a message: of a tensor, or of several that are one message."""


class Transfer(NamedTuple):
    """A message under way, or the receive that waits for it."""

    tensors: tuple[Tensor, ...]
    request: Request
    start_time: float

    @property
    def nbytes(self) -> int:
        """Bytes of its memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def describe(self) -> str:
        """Return what it is."""
        return " and ".join(map(describe_tensor, self.tensors))


@final
class SendChannel:
    """The messages under way from here; it keeps their memory."""

    def __init__(self, transport: Transport, dest: int, tag: int) -> None:
        self._transport, self._dest, self._tag = transport, dest, tag
        self._sends: deque[Transfer] = deque()

    def __len__(self) -> int:
        """Return how many were under way at the last look."""
        return len(self._sends)

    def send(self, message: Message, staging: Staging) -> None:
        """Send a message; it must not change while it is under way."""
        parts = (message,) if isinstance(message, Tensor) else message
        if not parts:
            raise ValueError("an empty tuple is no message: send nothing, or an empty tensor")
        for number, part in enumerate(parts):
            require_dense(part, "isend", number)
        data = tuple(map(staging.to_host, parts))
        line, counted = self._transport, self._transport.traffic.enabled
        request = combine_requests(
            [line.isend(as_bytes(part), self._dest, self._tag, counted) for part in data]
        )
        transfer = Transfer(data, request, time.perf_counter())
        line.traffic.add_message_bytes(transfer.nbytes)
        line.note("send", self._dest, self._tag, transfer.nbytes)
        self._sends.append(transfer)

    def release_completed(self) -> None:
        """Forget what has arrived."""
        while self._sends and self._sends[0].request.test():
            size_bytes = self._sends.popleft().nbytes
            self._transport.traffic.add_message_bytes(-size_bytes)
            self._transport.note("sent", self._dest, self._tag, size_bytes)

    def pending(self) -> Iterator[Pending]:
        """Yield what is under way, as of the last look."""
        where = self._transport.describe_channel(self._dest, self._tag)
        for transfer in self._sends:
            yield transfer.start_time, f"send {transfer.describe()} to {where}"


@final
class RecvChannel:
    """The messages that will come here: the posted one and those declared after it."""

    def __init__(self, transport: Transport, source: int, tag: int, staging: Staging) -> None:
        self._transport, self._source, self._tag, self._staging = transport, source, tag, staging
        self._specs: deque[MessageSpec] = deque()
        self._posted_recv: Transfer | None = None
        self._single_tensor = True

    def post_recv(self, specs: Iterable[MessageSpec]) -> None:
        """Declare more messages."""
        self._specs.extend(specs)
        if self._posted_recv is None:
            self._post_next()

    @property
    def posted_recv(self) -> Transfer | None:
        """The next message; None where none is declared."""
        return self._posted_recv

    def receive(self) -> Message:
        """Return the posted message, which has come, to be the caller's; post the next one."""
        transfer, alone = self._posted_recv, self._single_tensor
        assert transfer is not None
        self._transport.traffic.add_message_bytes(-transfer.nbytes)
        self._transport.note("received", self._source, self._tag, transfer.nbytes)
        self._post_next()
        tensors = tuple(map(self._staging.to_device, transfer.tensors))
        return tensors[0] if alone else tensors

    def pending(self) -> Iterator[Pending]:
        """Yield what is posted."""
        where = self._transport.describe_channel(self._source, self._tag)
        if self._posted_recv is not None:
            more = f" ({len(self._specs)} more declared)" if self._specs else ""
            yield (
                self._posted_recv.start_time,
                f"receive {self._posted_recv.describe()} from {where}{more}",
            )

    def _post_next(self) -> None:
        self._posted_recv = None
        if not self._specs:
            return
        specs = self._specs.popleft()
        self._single_tensor, parts = _tensor_specs(specs)
        tensors = tuple(self._staging.recv_buffer(*part) for part in parts)
        pulls = combine_requests(
            [self._transport.irecv(as_bytes(part), self._source, self._tag) for part in tensors]
        )
        self._posted_recv = Transfer(tensors, pulls, time.perf_counter())
        self._transport.traffic.add_message_bytes(self._posted_recv.nbytes)


def _tensor_specs(spec: MessageSpec) -> tuple[bool, tuple[TensorSpec, ...]]:
    """Return whether a message is a tensor by itself (then its second word is a dtype), and its
    parts."""
    if len(spec) == 2 and isinstance(spec[1], torch.dtype):
        return True, (spec,)
    return False, spec


USER_TAGS = 1 << 14
"""Tags of users end here and those of collectives begin; MPI promises only 2^15 in all."""


@final
class Channels:
    """The routes and the collectives of one group.

    Attributes
    ----------
    name : str
        Of the group.
    outboxes, inboxes : dict of (int, int) to Outbox, to Inbox
        By the other end's rank and tag.
    running : list of (Mean or Trade)
        Collectives that were not complete at the last look.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport, self.name = transport, transport.name
        self.send_channels: dict[tuple[int, int], SendChannel] = {}
        self.recv_channels: dict[tuple[int, int], RecvChannel] = {}
        self.collectives: list[MeanReduction | AllToAll] = []

    def send_channel(self, dest: int, tag: int) -> SendChannel:
        """Return the messages from here to a rank."""
        if (dest, tag) not in self.send_channels:
            self.send_channels[dest, tag] = SendChannel(self._transport, dest, _check_tag(tag))
        return self.send_channels[dest, tag]

    def recv_channel(self, source: int, tag: int, staging: Staging) -> RecvChannel:
        """Return the messages from a rank to here."""
        if (source, tag) not in self.recv_channels:
            self.recv_channels[source, tag] = RecvChannel(
                self._transport, source, _check_tag(tag), staging
            )
        return self.recv_channels[source, tag]

    def next_transfer(self, source: int, tag: int) -> tuple[RecvChannel, Transfer]:
        """Return the next message of a route to here, and where it comes; `RuntimeError` where
        none was declared."""
        inbox = self.recv_channels.get((source, tag))
        if inbox is None or inbox.posted_recv is None:
            raise RuntimeError(f"no message is expected from rank {source} with tag {tag}")
        return inbox, inbox.posted_recv

    def progress(self, all_lanes: bool = False) -> None:
        """Take note of what has arrived elsewhere, and go on with the collectives."""
        for outbox in self.send_channels.values():
            if outbox:
                outbox.release_completed()
        if self.collectives:
            self.collectives = [each for each in self.collectives if not each.test(all_lanes)]

    def poll_receives(self) -> bool:
        """Look at receives until one is open; return whether one was."""
        for inbox in self.recv_channels.values():
            if inbox.posted_recv is not None and not inbox.posted_recv.request.test():
                return True
        return False

    def pending(self) -> Iterator[Pending]:
        """Yield what is in flight, as of the last look."""
        for outbox in self.send_channels.values():
            yield from outbox.pending()
        for inbox in self.recv_channels.values():
            yield from inbox.pending()
        for each in self.collectives:
            yield each.start_time, f"{each.describe()} of {self._transport.name}"


def _check_tag(tag: int) -> int:
    if not 0 <= tag < USER_TAGS:
        raise ValueError(f"tag {tag} is not in 0 … {USER_TAGS - 1}")
    return tag
