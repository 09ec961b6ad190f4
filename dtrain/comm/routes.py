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

from dtrain.comm.dock import Dock, Message, dense
from dtrain.comm.line import Line
from dtrain.comm.memory import raw, words
from dtrain.comm.wire import Request, joined
from dtrain.telemetry import Pending

Spec = tuple[Sequence[int], torch.dtype]
"""Shape and dtype of a tensor."""

Specs = Spec | tuple[Spec, ...]
"""Of a message: of a tensor, or of several that are one message."""


class Transfer(NamedTuple):
    """A message under way, or the receive that waits for it."""

    tensors: tuple[Tensor, ...]
    request: Request
    since: float

    @property
    def nbytes(self) -> int:
        """Bytes of its memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def words(self) -> str:
        """Return what it is."""
        return " and ".join(map(words, self.tensors))


@final
class Outbox:
    """The messages under way from here; it keeps their memory."""

    def __init__(self, line: Line, to: int, tag: int) -> None:
        self._line, self._to, self._tag = line, to, tag
        self._sends: deque[Transfer] = deque()

    def __len__(self) -> int:
        """Return how many were under way at the last look."""
        return len(self._sends)

    def send(self, message: Message, dock: Dock) -> None:
        """Send a message; it must not change while it is under way."""
        parts = (message,) if isinstance(message, Tensor) else message
        if not parts:
            raise ValueError("an empty tuple is no message: send nothing, or an empty tensor")
        for number, part in enumerate(parts):
            dense(part, "isend", number)
        data = tuple(map(dock.lower, parts))
        line, counted = self._line, self._line.traffic.on
        request = joined([line.push(raw(part), self._to, self._tag, counted) for part in data])
        transfer = Transfer(data, request, time.perf_counter())
        line.traffic.hold(transfer.nbytes)
        line.note("send", self._to, self._tag, transfer.nbytes)
        self._sends.append(transfer)

    def look(self) -> None:
        """Forget what has arrived."""
        while self._sends and self._sends[0].request.test():
            size_bytes = self._sends.popleft().nbytes
            self._line.traffic.hold(-size_bytes)
            self._line.note("sent", self._to, self._tag, size_bytes)

    def pending(self) -> Iterator[Pending]:
        """Yield what is under way, as of the last look."""
        where = self._line.words(self._to, self._tag)
        for transfer in self._sends:
            yield transfer.since, f"send {transfer.words()} to {where}"


@final
class Inbox:
    """The messages that will come here: the posted one and those declared after it."""

    def __init__(self, line: Line, source: int, tag: int, dock: Dock) -> None:
        self._line, self._source, self._tag, self._dock = line, source, tag, dock
        self._specs: deque[Specs] = deque()
        self._posted: Transfer | None = None
        self._alone = True

    def expect(self, specs: Iterable[Specs]) -> None:
        """Declare more messages."""
        self._specs.extend(specs)
        if self._posted is None:
            self._post()

    @property
    def posted(self) -> Transfer | None:
        """The next message; None where none is declared."""
        return self._posted

    def take(self) -> Message:
        """Return the posted message, which has come, to be the caller's; post the next one."""
        transfer, alone = self._posted, self._alone
        assert transfer is not None
        self._line.traffic.hold(-transfer.nbytes)
        self._line.note("received", self._source, self._tag, transfer.nbytes)
        self._post()
        tensors = tuple(map(self._dock.lift, transfer.tensors))
        return tensors[0] if alone else tensors

    def pending(self) -> Iterator[Pending]:
        """Yield what is posted."""
        where = self._line.words(self._source, self._tag)
        if self._posted is not None:
            more = f" ({len(self._specs)} more declared)" if self._specs else ""
            yield self._posted.since, f"receive {self._posted.words()} from {where}{more}"

    def _post(self) -> None:
        self._posted = None
        if not self._specs:
            return
        specs = self._specs.popleft()
        self._alone, parts = _parts(specs)
        tensors = tuple(self._dock.land(*part) for part in parts)
        pulls = joined([self._line.pull(raw(part), self._source, self._tag) for part in tensors])
        self._posted = Transfer(tensors, pulls, time.perf_counter())
        self._line.traffic.hold(self._posted.nbytes)


def _parts(specs: Specs) -> tuple[bool, tuple[Spec, ...]]:
    """Return whether a message is a tensor by itself (then its second word is a dtype), and its
    parts."""
    if len(specs) == 2 and isinstance(specs[1], torch.dtype):
        return True, (specs,)
    return False, specs
