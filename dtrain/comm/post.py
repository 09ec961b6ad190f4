"""Post: matches sends with receives inside one process; under `threads` and `single`.

Invariant: a letter is complete only when both ends are there (rendezvous), and letters of one
route match in order, as in MPI. It has no lock: at most one rank runs at a time.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable
from typing import final

from dtrain.comm.wire import Bytes, Request


@final
class Letter(Request):
    """One end of a transfer."""

    def __init__(self, data: Bytes) -> None:
        self.data = data
        self.done = False

    def test(self) -> bool:
        """Return whether the other end has come."""
        return self.done


@final
class Post:
    """Sends and receives that wait for their other end, by route.

    Attributes
    ----------
    events : int
        Letters posted so far: as long as it stands still, nothing has happened.
    """

    def __init__(self) -> None:
        self.events = 0
        self._sends: defaultdict[Hashable, deque[Letter]] = defaultdict(deque)
        self._receives: defaultdict[Hashable, deque[Letter]] = defaultdict(deque)

    def send(self, route: Hashable, data: Bytes) -> Letter:
        """Post a send on a route (group, source, destination, tag)."""
        letter = Letter(data)
        self._match(route, letter, self._sends, self._receives)
        return letter

    def receive(self, route: Hashable, data: Bytes) -> Letter:
        """Post a receive on a route."""
        letter = Letter(data)
        self._match(route, letter, self._receives, self._sends)
        return letter

    def _match(
        self,
        route: Hashable,
        letter: Letter,
        ours: defaultdict[Hashable, deque[Letter]],
        others: defaultdict[Hashable, deque[Letter]],
    ) -> None:
        self.events += 1
        if not others[route]:
            ours[route].append(letter)
            return
        other = others[route].popleft()
        sent, received = (letter, other) if ours is self._sends else (other, letter)
        if sent.data.size != received.data.size:
            raise RuntimeError(
                f"message of {sent.data.size} bytes met a receive of {received.data.size} bytes "
                f"on route {route}"
            )
        received.data[:] = sent.data
        letter.done = other.done = True
