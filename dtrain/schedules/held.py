"""What of the messages is in memory at once: sends under way and receives posted.

Invariant: bounded from the plans, whatever the timing: a message is under way until the other end
has posted its receive, and a rank knows of the takes that its own past depends on, no more.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import final

from dtrain.schedules.action import Action, Route
from dtrain.schedules.forecast import CREDITS
from dtrain.schedules.messages import Messages
from dtrain.schedules.simulate import Span


def held_bytes(
    timeline: Iterable[Span],
    place: Sequence[int],
    routes: Sequence[Route],
    payload: Sequence[int],
    credits: int = CREDITS,
) -> list[int]:
    """Return per stage the most bytes of messages under way and of posted receives.

    Parameters
    ----------
    timeline : iterable of Span
        What all stages of a replica do, at any timing.
    place : sequence of int
        `place[b]` is the stage of block b.
    payload : sequence of int
        Bytes of one message of each route.
    credits : int
        Messages under one tag that may be under way.
    """
    spans = sorted(timeline, key=lambda span: (span.end, span.start))
    micros = Counter(a.update for *_, a in spans if a[:2] == ("F", 0) and not a.pass_)
    sizes = [micros[update] for update in range(1 + max(micros, default=-1))]
    harbour = _Harbour(place, routes, sizes, payload, credits)
    waiting: list[Span] = []
    for span in spans:
        # An update takes no time: what one takes may leave another of the same moment.
        still: list[Span] = []
        for each in (*waiting, span):
            behind = any(each.stage == other.stage for other in still)
            if behind or not harbour.ready(each.stage, each.action):
                still.append(each)
            else:
                harbour.pass_by(each.stage, each.action)
        waiting = still
    assert not waiting, f"nobody offers what {waiting[0].action} takes"
    return harbour.most()


@final
class _Harbour:
    """Messages under way, each rank knowing as little of the others as its past allows.

    ::

        stage 0   F0.0 offers 0    receive 0 of stage 1 is posted from the start
                  F0.1 offers 1    waits for its receive, for all that stage 0 knows
                  B0.0 takes gradient 0: so stage 1 has taken 0, and receive 1 is posted
    """

    def __init__(
        self,
        place: Sequence[int],
        routes: Sequence[Route],
        sizes: Sequence[int],
        payload: Sequence[int],
        credits: int,
    ) -> None:
        stages = range(max(place) + 1)
        self._mail = [Messages(routes, place, stage, sizes) for stage in stages]
        self._payload, self._credits = payload, credits
        self._sent = Counter[int]()
        # What each stage knows to be taken, by route; a message tells what its sender knew.
        self._known = [Counter[int]() for _ in stages]
        self._notes: dict[int, deque[Counter[int]]] = {i: deque() for i in range(len(routes))}
        self._most = [0 for _ in stages]

    def ready(self, stage: int, action: Action) -> bool:
        """Say whether all that an action takes from other stages was offered."""
        mail = self._mail[stage]
        return all(mail.local(route) or self._notes[route] for route in mail.takes(action))

    def pass_by(self, stage: int, action: Action) -> None:
        """Take and offer what belongs to an action."""
        mail, known = self._mail[stage], self._known[stage]
        for route in mail.takes(action):
            if not mail.local(route):
                known |= self._notes[route].popleft()
                known[route] += 1
        for route in mail.offers(action):
            if not mail.local(route):
                self._sent[route] += 1
                self._notes[route].append(known.copy())
                under_way = (self._bytes(each, stage, each == route) for each in self._sent)
                self._most[stage] = max(self._most[stage], sum(under_way))

    def _bytes(self, route: int, stage: int, now: bool) -> int:
        """Return the bytes of a route's messages under way; one that leaves now is among them."""
        mail = self._mail[stage]
        if mail.source(route) != stage:
            return 0
        window = mail.window(route)
        waiting = self._sent[route] - window - self._known[stage][route]
        return self._payload[route] * max(int(now), min(waiting, self._credits * window))

    def most(self) -> list[int]:
        """Return the most bytes per stage, with the receives that are posted."""
        posted = Counter[int]()
        for route, count in self._sent.items():
            mail = self._mail[0]
            posted[mail.target(route)] += min(count, mail.window(route)) * self._payload[route]
        return [most + posted[stage] for stage, most in enumerate(self._most)]
