"""EarlyEnd: the ranks agree on the update after which a segment ends before its last one.

Invariant: no rank waits for ever. A rank answers in a wait, too, so every answer comes. An answer
is the number of updates that the rank has begun, and the rank begins no further one before the
decision. The decision is the largest answer, and all ranks train to it: what they then compute is
the plan of so many updates, which was proven to end.

A tree of ranks, four children each. A request of any rank starts a round, in which every edge
carries one message of each kind::

    rank 0        begun 7   --- ask ---->  rank 1   begun 6      a signal came to rank 1, 2 or 0
                            <-- answer --  (9: the largest of rank 1 and its children)
                            -- decision -> 9

In normal operation a rank tests one flag and its posted receives, at most five, once per update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import numpy as np

from dtrain.comm.backends.base import Request
from dtrain.comm.communicator import Comm

FAN_OUT = 4


ASK, ANSWER, DECISION = range(3)
"""Tags: down, up and down the tree."""


@final
class Receive:
    """The posted receive of two numbers: updates begun, and a request."""

    def __init__(self, comm: Comm, source: int, tag: int) -> None:
        self._numbers = np.zeros(2, dtype=np.int64)
        self._request = comm.transport.irecv(self._numbers.view(np.uint8), source, tag)
        self.done = False

    def test(self) -> bool:
        """Return whether the message is there."""
        self.done = self.done or self._request.test()
        return self.done

    def numbers(self) -> tuple[int, int]:
        """Return the message."""
        return int(self._numbers[0]), int(self._numbers[1])

    def cancel(self) -> None:
        """Withdraw the receive if no message came; may be called again."""
        if not self.done:
            self._request.cancel()
            self.done = True


@final
class EarlyEnd:
    """One rank's part of the agreement.

    Parameters
    ----------
    comm : Comm
        All ranks; nothing else may use it.
    in_segments : bool
        Whether a segment may end after any of its updates. Otherwise nothing is sent, and requests
        are acted on between segments.
    clock : callable, optional
        Called before each test; it may set `requested`.

    Attributes
    ----------
    requested : int
        What this rank wants; 0: nothing. Of several ranks the largest number counts. A signal
        handler may set it, so nothing resets it.
    passing_request : int
        Likewise, until all ranks have acted on it.
    """

    def __init__(
        self, comm: Comm, in_segments: bool, clock: Callable[[], None] | None = None
    ) -> None:
        self.comm = comm
        self.in_segments = in_segments
        self.clock = clock
        self.requested = self.passing_request = 0
        self._begun = 0
        self._enabled = True
        self._parent = (comm.rank - 1) // FAN_OUT if comm.rank else None
        first = FAN_OUT * comm.rank + 1
        self._children = range(min(first, comm.size), min(first + FAN_OUT, comm.size))
        self._sends: list[tuple[Request, object]] = []
        self._start_round()
        if in_segments and comm.size > 1:
            comm.context.on_turn = self.poll

    def _start_round(self) -> None:
        self._asked = False
        self._request = 0
        self._limit: int | None = None  # begin no update from here on before the decision
        self._decision: tuple[int, int] | None = None
        self._ask = self._decided = None
        self._answers: list[Receive] = []
        if self.in_segments:
            if self._parent is not None:
                self._ask = Receive(self.comm, self._parent, ASK)
                self._decided = Receive(self.comm, self._parent, DECISION)
            self._answers = [Receive(self.comm, child, ANSWER) for child in self._children]

    # ---- in a segment

    def admits(self, update: int) -> bool:
        """Return whether an action of this update is run; wait for a decision that is due.

        `update` counts from the start of the run.
        """
        if update < self._begun and self._limit is None:
            return True
        self.poll()
        if self._limit is None:
            self._begun = max(self._begun, update + 1)
            return True
        if update < self._limit:
            return True
        if self._decision is None:
            self._wait("the update at which all ranks end the segment")
        assert self._decision is not None
        return update < self._decision[0]

    def end_of(self, stop: int) -> int:
        """Return the update before which a segment ended; `stop` unless it ended early."""
        return stop if self._decision is None else min(stop, self._decision[0])

    def poll(self) -> None:
        """Take part in a round if there is one; never wait."""
        if self.clock is not None:
            self.clock()
        if not self.in_segments or self._decision is not None:
            return
        if not self._asked:
            if not (
                ((self.requested or self.passing_request) and self._enabled)
                or (self._ask is not None and self._ask.test())
                or any(answer.test() for answer in self._answers)
            ):
                return
            self._ask_children()
        if self._limit is None and all(answer.test() for answer in self._answers):
            self._answer()
        if self._decided is not None and self._limit is not None and self._decided.test():
            self._decide(*self._decided.numbers())

    def _ask_children(self) -> None:
        self._asked = True
        for child in self._children:
            self._send(child, ASK, 0, 0)

    def _answer(self) -> None:
        """Send the largest answer of this rank and its children to the parent."""
        answers = [answer.numbers() for answer in self._answers]
        self._limit = self._begun
        update = max([self._begun, *(update for update, _ in answers)])
        own = max(self.requested, self.passing_request)
        self._request = max([own, *(request for _, request in answers)])
        if self._parent is None:
            self._decide(update, self._request)
        else:
            self._send(self._parent, ANSWER, update, self._request)

    def _decide(self, update: int, request: int) -> None:
        self._decision = update, request
        for child in self._children:
            self._send(child, DECISION, update, request)

    def _send(self, dest: int, tag: int, update: int, request: int) -> None:
        numbers = np.array([update, request], dtype=np.int64)
        data = numbers.view(np.uint8)
        self._sends.append((self.comm.transport.isend(data, dest, tag, count_bytes=False), numbers))

    def _wait(self, description: str) -> None:
        self.comm.wait(lambda: self._decision is not None, description)

    # ---- between segments

    def announce(self, begun: int) -> int:
        """Return the request that this rank knows of, for an exchange between all ranks.

        Without one this rank counts `begun` updates as begun, since a segment may follow.
        """
        self.poll()
        known = max(self.requested, self.passing_request, self._request, int(self._asked))
        if not known:
            self._begun = begun
        return known

    def settle(self, announced: int, begun: int) -> int:
        """End the round, and return the request that all ranks act on now.

        Collective over all ranks.

        Parameters
        ----------
        announced : int
            The largest number that any rank announced.
        begun : int
            Updates that count as begun from now on.
        """
        if not announced:
            return 0
        request = announced
        if self.in_segments:
            if not self._asked:
                self._ask_children()
            self.poll()
            self._wait("the end of an agreement of all ranks")
            self.comm.wait(self._is_over, "all ranks to take the decision")
            assert self._decision is not None
            request = max(request, self._decision[1])
            self._begun = begun
            self._start_round()
        self.passing_request = 0
        return request

    def _is_over(self) -> bool:
        """Return whether all messages of the round have arrived."""
        self._sends = [(request, data) for request, data in self._sends if not request.test()]
        return not self._sends and (self._ask is None or self._ask.test())

    def disable(self) -> bool:
        """Start no round any more; return whether one is open, as far as this rank knows."""
        self._enabled = False
        return self._asked

    def close(self) -> None:
        """Withdraw the posted receives. No round may be open on any rank."""
        self.comm.context.on_turn = None
        for receive in (self._ask, self._decided, *self._answers):
            if receive is not None:
                receive.cancel()
