"""MessageRouter: the messages of one rank, to other ranks and between its own blocks.

Invariant: a block gets the same tensors whether its neighbour is on this rank or on another: memory
of its own, contiguous and aligned. So it computes the same bits on any number of ranks.

::

    receive(action)    link.receive()    <-- RecvChannel | LocalChannel <--
    send(action)       link.send(tensor) --> SendChannel | LocalChannel -->
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import cycle
from typing import Protocol, final

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.comm.buffers import TensorSpec
from dtrain.comm.groups import ProcessGroups
from dtrain.comm.staging import Message
from dtrain.comm.wire_format import EXACT, WireFormat
from dtrain.mesh import RankPosition
from dtrain.objectives.base import ExecutionMode, Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.messages import (
    all_routes,
    is_of_layers,
    layer_message,
    message_spec,
)
from dtrain.schedules.actions import Action, Kind, Point, Route
from dtrain.schedules.messages import MessageTable


class Sender(Protocol):
    """The sending end of a channel."""

    def send(self, message: Tensor) -> None:
        """Send a message; its memory must not change until it has arrived."""


class Receiver(Protocol):
    """The receiving end of a channel."""

    def receive(self) -> Message:
        """Wait for the next message and return it."""

    def cancel(self) -> None:
        """Forget the declared messages, which will not be sent."""


@final
class LocalChannel:
    """Both ends of a channel whose blocks are on this rank; messages are copied once."""

    def __init__(self) -> None:
        self._messages: deque[Tensor] = deque()

    def send(self, message: Tensor) -> None:
        """Append a copy, contiguous and aligned as a received message is."""
        self._messages.append(message.clone(memory_format=torch.contiguous_format))

    def receive(self) -> Tensor:
        """Return the oldest message."""
        return self._messages.popleft()

    def cancel(self) -> None:
        """Do nothing: messages of the same rank are not declared."""


@final
class Link:
    """One route of a segment at this rank: its channels, message specs and wire format.

    Parameters
    ----------
    route : Route
        The route.
    spec : callable
        Returns shape and dtype of the message of a micro-batch of so many rows.
    wire_format : WireFormat or None
        Encodes and decodes the messages; None where they travel as they are.
    senders, receivers : sequence
        Channel ends on this rank, used in turn; empty where that end is on another rank.
    """

    def __init__(
        self,
        route: Route,
        spec: Callable[[int], TensorSpec],
        wire_format: WireFormat | None,
        senders: Sequence[Sender],
        receivers: Sequence[Receiver],
    ) -> None:
        self.route = route
        self.once_per_update = route.once_per_update
        self.is_of_layers = is_of_layers(route)
        self.spec = spec
        self.wire_format = wire_format
        self._senders = cycle(senders)
        self._receivers = cycle(receivers)
        self._all_receivers = tuple(receivers)

    def send(self, tensor: Tensor, rows: int) -> None:
        """Send the message of a micro-batch of `rows` samples, 0 of an update."""
        # A complex tensor may be the conjugate of its memory, and a real one its negative.
        tensor = tensor.resolve_conj().resolve_neg()
        actual, expected = (tensor.shape, tensor.dtype), self.spec(rows)
        assert actual == expected, (
            f"{self.route}: `make_message` returned {actual}, `message_spec` says {expected}"
        )
        if self.wire_format is not None:
            tensor = self.wire_format.encode(self.route, tensor)
        if self.route.source.kind == "U":  # a weight; the next update may overwrite it in flight
            tensor = tensor.clone()
        next(self._senders).send(tensor)

    def receive(self) -> Tensor:
        """Wait for the next message and return it; the caller owns its memory."""
        message = next(self._receivers).receive()
        assert isinstance(message, Tensor)
        if self.wire_format is None:
            return message
        (_, *shape), dtype = self.spec(1)  # a message may have several rows per sample
        return self.wire_format.decode(self.route, message, ((len(message), *shape), dtype))

    def cancel(self) -> None:
        """Forget the declared messages, which will not be sent."""
        for receiver in self._all_receivers:
            receiver.cancel()


class MessageRouter:
    """Receives and sends along the routes of one execution mode.

    Parameters
    ----------
    mode : str
        "train" or "predict": selects the routes of the objective.
    block_specs : sequence of BlockSpec
        One per block of the run.
    wire_format : WireFormat
        Encoding of messages in training; in prediction they travel as they are.
    """

    def __init__(
        self,
        mode: ExecutionMode,
        objective: Objective,
        block_specs: Sequence[BlockSpec],
        position: RankPosition,
        groups: ProcessGroups,
        wire_format: WireFormat = EXACT,
    ) -> None:
        self.routes = all_routes(objective, block_specs, mode)
        self.objective = objective
        self.block_specs = block_specs
        self.position = position
        self.groups = groups
        self.wire_format = wire_format
        self.links: dict[int, Link] = {}
        self.targets = _action_kinds(route.target for route in self.routes)
        self.sources = _action_kinds(route.source for route in self.routes)
        self.update_messages: dict[tuple[int, str, int], dict[str, Tensor]] = {}

    def open(
        self,
        plan: Iterable[Action],
        micro_batches: Sequence[int],
        row_count: Callable[[int, int], int],
    ) -> None:
        """Resolve every route for a segment, and declare all messages that the plan receives.

        Parameters
        ----------
        micro_batches : sequence of int
            Micro-batches of each update of the segment.
        row_count : callable
            Returns the samples of (update, micro-batch).
        """
        place, stage = self.position.place, self.position.stage
        self.messages = MessageTable(self.routes, place, stage, micro_batches)
        specs = [
            cache(partial(message_spec, self.objective, route, self.block_specs))
            for route in self.routes
        ]
        incoming: defaultdict[int, list[TensorSpec]] = defaultdict(list)
        for index, action in self.messages.remote_receives(plan):
            update, micro = self.messages.source_micro_batch(index, action)
            spec = specs[index](row_count(update, micro) if micro >= 0 else 0)
            incoming[index].append(self.wire_format.encoded_spec(self.routes[index], spec))
        first_tags = self._first_tags()
        self.links = {
            index: self._make_link(index, specs[index], first_tags[index], incoming[index])
            for index in range(len(self.routes))
            if stage in (self.messages.source_stage(index), self.messages.target_stage(index))
        }

    def receive(self, action: Action) -> dict[str, Tensor]:
        """Return the messages of all routes to `action`, by route name; the caller owns them.

        A message that is sent once per update is returned for all its micro-batches: do not write
        to it.
        """
        received: dict[str, Tensor] = {}
        if (action.block, action.kind) not in self.targets:
            return received
        for index in self.messages.incoming(action):
            link = self.links[index]
            route, tensor = link.route, link.receive()
            received[route.name] = tensor
            if link.once_per_update:
                self.update_messages.setdefault(_action_point(action), {})[route.name] = tensor
        if action.micro > 0 and self.update_messages:
            received |= self.update_messages.get(_action_point(action), {})
        return received

    def send(self, action: Action, block: Block, micro_batch: MicroBatch | None) -> None:
        """Send the messages of all routes from `action`, without waiting for their arrival."""
        if (action.block, action.kind) not in self.sources:
            return
        for index in self.messages.outgoing(action):
            link = self.links[index]
            if link.is_of_layers:
                tensor = layer_message(link.route, micro_batch)
            else:
                tensor = self.objective.make_message(link.route, block, micro_batch)
            link.send(tensor, 0 if micro_batch is None else len(micro_batch.targets))

    def source_of(self, action: Action) -> tuple[int, int]:
        """Return update and micro-batch of the input of a forward: those of the action."""
        return action.update, action.micro

    def forward_metrics(self, action: Action) -> dict[str, float]:
        """Return what is recorded of the messages of a forward: nothing."""
        return {}

    def end_sends(self) -> None:
        """Do nothing: both ends know all messages of a segment."""

    @property
    def kept_bytes(self) -> int:
        """The bytes of messages that are kept after they were used: none."""
        return 0

    def cancel(self) -> None:
        """Forget the declared messages of a segment that ends early: no rank sends them."""
        for link in self.links.values():
            link.cancel()

    def close(self) -> None:
        """Wait until everything that was sent has arrived."""
        self.groups.forward.flush()
        self.groups.backward.flush()
        self.update_messages.clear()

    def _make_link(
        self,
        index: int,
        spec: Callable[[int], TensorSpec],
        first_tag: int,
        incoming: Sequence[TensorSpec],
    ) -> Link:
        """Return a route's link, the receives of its `incoming` messages posted.

        A route has one tag per message that may be in flight to this rank at once; messages use
        them in turn.
        """
        route, window = self.routes[index], self.messages.window(index)
        wire_format = self.wire_format if self.wire_format.is_encoded(route, spec(1)) else None
        if self.messages.is_local(index):
            local = [LocalChannel()]
            return Link(route, spec, wire_format, local, local)
        forward = route.target.block >= route.source.block
        comm = self.groups.forward if forward else self.groups.backward
        tags = range(first_tag, first_tag + window)
        if self.messages.source_stage(index) == self.position.stage:
            dest = self.position.rank(route.target.block)
            senders = [comm.send_channel(dest, tag) for tag in tags]
            return Link(route, spec, wire_format, senders, ())
        source = self.position.rank(route.source.block)
        receivers = [comm.recv_channel(source, tag) for tag in tags]
        for number, receiver in enumerate(receivers):
            receiver.post_recv(incoming[number::window])
        return Link(route, spec, wire_format, (), receivers)

    def _first_tags(self) -> list[int]:
        """Return the first tag of each route; each pair of stages counts its own tags."""
        used: Counter[tuple[int, int]] = Counter()
        first_tags = []
        for index in range(len(self.routes)):
            pair = self.messages.source_stage(index), self.messages.target_stage(index)
            first_tags.append(used[pair])
            used[pair] += self.messages.window(index)
        return first_tags


def _action_kinds(points: Iterable[Point]) -> set[tuple[int, Kind]]:
    """Return (block, kind) of the actions at these points; in a split backward `I` acts for `B`."""
    kinds = {(point.block, point.kind) for point in points}
    return kinds | {(block, "I") for block, kind in kinds if kind == "B"}


def _action_point(action: Action) -> tuple[int, str, int]:
    """Return block, kind and pass of an action; `I` counts as `B`."""
    return action.block, "B" if action.kind == "I" else action.kind, action.pass_
