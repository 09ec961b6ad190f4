"""Routes: the messages between two ranks under one tag, in order, seen from either end.

Invariant: the next message that will come is always posted, and a message is under way until the
other end has posted it; so what is under way is bounded by the credits.

    Outbox                                          Inbox
    a  under way, credit 1 -----------------------> a  posted
    b  under way, credit 2 ---> (parked)            b  declared: posted when a is taken
    c  waits for a to arrive                        c  declared
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor

from dtrain.comm.line import Line
from dtrain.comm.memory import aligned, raw
from dtrain.comm.wire import Request

Spec = tuple[Sequence[int], torch.dtype]
"""Shape and dtype of a message."""


@final
class Outbox:
    """The messages under way from here; it keeps their memory."""

    def __init__(self, line: Line, to: int, tag: int) -> None:
        self._line, self._to, self._tag = line, to, tag
        self._sends: deque[tuple[Tensor, Request]] = deque()

    def __len__(self) -> int:
        """Return how many were under way at the last look."""
        return len(self._sends)

    def send(self, tensor: Tensor) -> None:
        """Send a tensor; it must not change while it is under way."""
        data = tensor.detach().contiguous()
        counted = self._line.traffic.on
        self._line.traffic.hold(data.nbytes)
        self._sends.append((data, self._line.push(raw(data), self._to, self._tag, counted)))

    def look(self) -> None:
        """Forget what has arrived."""
        while self._sends and self._sends[0][1].test():
            self._line.traffic.hold(-self._sends.popleft()[0].nbytes)


@final
class Inbox:
    """The messages that will come here: the posted one and those declared after it.

    Attributes
    ----------
    posted : (Tensor, Request) or None
        The next message, and whether it has come.
    """

    def __init__(self, line: Line, source: int, tag: int) -> None:
        self._line, self._source, self._tag = line, source, tag
        self._specs: deque[Spec] = deque()
        self.posted: tuple[Tensor, Request] | None = None

    def expect(self, specs: Iterable[Spec]) -> None:
        """Declare more messages."""
        self._specs.extend(specs)
        if self.posted is None:
            self.post()

    def post(self) -> None:
        """Post the next message, where one is declared; the one before it is the caller's."""
        if self.posted is not None:
            self._line.traffic.hold(-self.posted[0].nbytes)
        self.posted = None
        if self._specs:
            tensor = aligned(*self._specs.popleft())
            self._line.traffic.hold(tensor.nbytes)
            self.posted = tensor, self._line.pull(raw(tensor), self._source, self._tag)
