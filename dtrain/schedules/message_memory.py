"""What of the messages is in memory at once: sends under way and receives posted.

Invariant: bounded from the plans, whatever the timing: a message is under way until the other end
has posted its receive, and a rank knows of the takes that its own past depends on, no more.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import final

from dtrain.schedules.actions import Action, Route
from dtrain.schedules.forecast import CREDITS
from dtrain.schedules.messages import MessageTable
from dtrain.schedules.simulator import Span


def peak_message_bytes(
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
    first_forwards = (a for *_, a in spans if (a.kind, a.block, a.pass_) == ("F", 0, 0))
    micros = Counter(action.update for action in first_forwards)
    sizes = [micros[update] for update in range(1 + max(micros, default=-1))]
    harbour = _InFlight(place, routes, sizes, payload, credits)
    waiting: list[Span] = []
    for span in spans:
        # An update takes no time: what one takes may leave another of the same moment.
        still: list[Span] = []
        for each in (*waiting, span):
            behind = any(each.stage == other.stage for other in still)
            if behind or not harbour.ready(each.stage, each.action):
                still.append(each)
            else:
                harbour.run_action(each.stage, each.action)
        waiting = still
    assert not waiting, f"nobody offers what {waiting[0].action} takes"
    return harbour.peak_bytes()


@final
class _InFlight:
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
        micro_batches: Sequence[int],
        payload: Sequence[int],
        credits: int,
    ) -> None:
        stages = range(max(place) + 1)
        self._message_tables = [
            MessageTable(routes, place, stage, micro_batches) for stage in stages
        ]
        self._payload, self._credits = payload, credits
        self._send_counts = Counter[int]()
        # What each stage knows to be taken, by route; a message tells what its sender knew.
        self._known_receives = [Counter[int]() for _ in stages]
        self._sender_knowledge: dict[int, deque[Counter[int]]] = {
            i: deque() for i in range(len(routes))
        }
        self._peak_bytes = [0 for _ in stages]

    def ready(self, stage: int, action: Action) -> bool:
        """Say whether all that an action takes from other stages was offered."""
        mail = self._message_tables[stage]
        return all(
            mail.is_local(route) or self._sender_knowledge[route] for route in mail.incoming(action)
        )

    def run_action(self, stage: int, action: Action) -> None:
        """Take and offer what belongs to an action."""
        mail, known = self._message_tables[stage], self._known_receives[stage]
        for route in mail.incoming(action):
            if not mail.is_local(route):
                known |= self._sender_knowledge[route].popleft()
                known[route] += 1
        for route in mail.outgoing(action):
            if not mail.is_local(route):
                self._send_counts[route] += 1
                self._sender_knowledge[route].append(known.copy())
                under_way = (
                    self._in_flight_bytes(each, stage, each == route) for each in self._send_counts
                )
                self._peak_bytes[stage] = max(self._peak_bytes[stage], sum(under_way))

    def _in_flight_bytes(self, route: int, stage: int, is_sending: bool) -> int:
        """Return the bytes of a route's messages under way; one that leaves now is among them."""
        mail = self._message_tables[stage]
        if mail.source_stage(route) != stage:
            return 0
        window = mail.window(route)
        waiting = self._send_counts[route] - window - self._known_receives[stage][route]
        return self._payload[route] * max(int(is_sending), min(waiting, self._credits * window))

    def peak_bytes(self) -> list[int]:
        """Return the most bytes per stage, with the receives that are posted."""
        posted = Counter[int]()
        for route, count in self._send_counts.items():
            mail = self._message_tables[0]
            posted[mail.target_stage(route)] += (
                min(count, mail.window(route)) * self._payload[route]
            )
        return [most + posted[stage] for stage, most in enumerate(self._peak_bytes)]
