"""Channels: the messages from one rank to another under one tag, in order, at either end.

Invariant: the next receive of a channel is always posted, and a send is complete only once its
receive was posted. So the credits bound the messages in flight.

    SendChannel                                      RecvChannel
    a  in flight, credit 1 ------------------------> a  posted
    b  in flight, credit 2 ---> (waits there)        b  declared: posted when a is received
    c  waits here until a has arrived                c  declared

A message of several tensors is several transfers in a row and takes one credit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from dtrain.comm.backends.base import PointToPointRequest, combine_requests
from dtrain.comm.buffers import TensorSpec, as_bytes, describe_tensor
from dtrain.comm.context import CommContext
from dtrain.comm.flight_recorder import Pending
from dtrain.comm.staging import Message, require_dense
from dtrain.comm.transport import Transport

MessageSpec = TensorSpec | tuple[TensorSpec, ...]
"""Shape and dtype of a message's tensor, or of each tensor of a message of several."""


USER_TAGS = 1 << 14
"""Tags of users are below this, those of collectives above; MPI promises only 2^15 in all."""


class Wait(Protocol):
    """`Comm.wait` of the group that a channel belongs to."""

    def __call__(
        self, is_done: Callable[[], bool], description: str, peer: int | None = None
    ) -> None:
        """Return when `is_done()`."""


class Transfer(NamedTuple):
    """A message in flight, or the posted receive of one."""

    tensors: tuple[Tensor, ...]
    request: PointToPointRequest
    start_time: float
    nbytes: int

    @staticmethod
    def start(tensors: tuple[Tensor, ...], requests: list[PointToPointRequest]) -> Transfer:
        """Return the transfer of `tensors` that the requests complete."""
        size_bytes = sum(tensor.nbytes for tensor in tensors)
        return Transfer(tensors, combine_requests(requests), time.perf_counter(), size_bytes)

    def describe(self) -> str:
        """Return shapes and dtypes as text."""
        return " and ".join(map(describe_tensor, self.tensors))


@final
class SendChannel:
    """The messages that this rank sends to `dest` under `tag`; `Comm.send_channel` makes it.

    The channel keeps the memory of its messages while they are in flight.
    """

    def __init__(
        self,
        transport: Transport,
        context: CommContext,
        wait: Wait,
        dest: int,
        tag: int,
        credits: int,
    ) -> None:
        self._transport = transport
        self._context = context
        self._wait = wait
        self._dest = dest
        self._tag = _check_tag(tag)
        self._credits = credits
        self._sends: deque[Transfer] = deque()

    def __len__(self) -> int:
        """Return how many messages were in flight at the last look."""
        return len(self._sends)

    def send(self, message: Message) -> None:
        """Send a message as `Comm.isend` does."""
        if len(self._sends) >= self._credits:
            description = f"a credit to send to rank {self._dest} with tag {self._tag}"
            self._wait(lambda: len(self._sends) < self._credits, description, self._dest)
        tensors = (message,) if isinstance(message, Tensor) else message
        if not tensors:
            raise ValueError("an empty tuple is no message: send nothing, or an empty tensor")
        for number, tensor in enumerate(tensors):
            require_dense(tensor, "isend", number)
        transport, counted = self._transport, self._transport.traffic.enabled
        data = tuple(map(self._context.staging.to_host, tensors))
        transfer = Transfer.start(
            data,
            [transport.isend(as_bytes(part), self._dest, self._tag, counted) for part in data],
        )
        transport.traffic.add_message_bytes(transfer.nbytes)
        transport.note("send", self._dest, self._tag, transfer.nbytes)
        self._sends.append(transfer)

    def flush(self) -> None:
        """Wait until every message of the channel has arrived."""
        description = f"rank {self._dest} to take {len(self)} messages with tag {self._tag}"
        self._wait(lambda: not self._sends, description, self._dest)

    def release_completed(self) -> None:
        """Free the messages that have arrived."""
        while self._sends and self._sends[0].request.test():
            size_bytes = self._sends.popleft().nbytes
            self._transport.traffic.add_message_bytes(-size_bytes)
            self._transport.note("sent", self._dest, self._tag, size_bytes)

    def pending(self) -> Iterator[Pending]:
        """Yield the messages that were in flight at the last look."""
        peer = self._transport.describe_channel(self._dest, self._tag)
        for transfer in self._sends:
            yield transfer.start_time, f"send {transfer.describe()} to {peer}"


@final
class RecvChannel:
    """The messages that `source` sends here under `tag`; `Comm.recv_channel` makes it."""

    def __init__(
        self, transport: Transport, context: CommContext, wait: Wait, source: int, tag: int
    ) -> None:
        self._transport = transport
        self._context = context
        self._wait = wait
        self._source = source
        self._tag = _check_tag(tag)
        self._specs: deque[MessageSpec] = deque()
        self._posted: Transfer | None = None
        self._single_tensor = True  # whether the posted message is a tensor, not a tuple

    def post_recv(self, specs: Iterable[MessageSpec]) -> None:
        """Declare the next messages as `Comm.post_recv` does."""
        self._specs.extend(specs)
        if self._posted is None:
            self._post_next()

    def receive(self) -> Message:
        """Wait for the next message and return it as `Comm.recv` does."""
        posted, single_tensor = self._posted, self._single_tensor
        if posted is None:
            raise RuntimeError(
                f"no message is expected from rank {self._source} with tag {self._tag}"
            )
        if not posted.request.test():
            description = f"{posted.describe()} from rank {self._source} with tag {self._tag}"
            self._wait(posted.request.test, description, self._source)
        self._transport.traffic.add_message_bytes(-posted.nbytes)
        self._transport.note("received", self._source, self._tag, posted.nbytes)
        self._post_next()
        tensors = tuple(map(self._context.staging.to_device, posted.tensors))
        return tensors[0] if single_tensor else tensors

    def cancel(self) -> None:
        """Forget the declared messages, which will not be sent."""
        self._specs.clear()
        if self._posted is not None:
            self._posted.request.cancel()
            self._transport.traffic.add_message_bytes(-self._posted.nbytes)
            self._posted = None

    def is_open(self) -> bool:
        """Return whether the posted receive is not complete; tests it, so MPI makes progress."""
        return self._posted is not None and not self._posted.request.test()

    def pending(self) -> Iterator[Pending]:
        """Yield the posted receive."""
        if self._posted is None:
            return
        peer = self._transport.describe_channel(self._source, self._tag)
        more = f" ({len(self._specs)} more declared)" if self._specs else ""
        yield self._posted.start_time, f"receive {self._posted.describe()} from {peer}{more}"

    def _post_next(self) -> None:
        self._posted = None
        if not self._specs:
            return
        self._single_tensor, specs = _tensor_specs(self._specs.popleft())
        staging, transport = self._context.staging, self._transport
        tensors = tuple(staging.recv_buffer(*spec) for spec in specs)
        self._posted = Transfer.start(
            tensors,
            [transport.irecv(as_bytes(part), self._source, self._tag) for part in tensors],
        )
        transport.traffic.add_message_bytes(self._posted.nbytes)


def _tensor_specs(spec: MessageSpec) -> tuple[bool, tuple[TensorSpec, ...]]:
    """Return whether a message is one tensor, not a tuple, and the specs of its tensors."""
    if len(spec) == 2 and isinstance(spec[1], torch.dtype):
        return True, (spec,)
    return False, spec


def _check_tag(tag: int) -> int:
    if not 0 <= tag < USER_TAGS:
        raise ValueError(f"tag {tag} is not in 0 … {USER_TAGS - 1}")
    return tag
