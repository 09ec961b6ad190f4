"""Peak memory of messages: sends in flight and posted receives.

Invariant: the peak is a bound from the plans, whatever the timing. A message is in flight until
the receiver has posted its receive. A rank counts another rank's receives only where its own past
depends on them, and frees messages only between two actions.
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
    update_bytes: Sequence[int] = (),
) -> list[int]:
    """Return per stage the most bytes of messages in flight and of posted receives.

    Parameters
    ----------
    timeline : iterable of Span
        All actions of one replica, in any timing.
    place : sequence of int
        `place[b]` is the stage of block b.
    routes : sequence of Route
        All routes of the model.
    payload : sequence of int
        Bytes of one message of each route.
    credits : int
        Sends of a route that may be in flight beyond the posted receives.
    update_bytes : sequence of int
        Bytes per stage of further messages, sent and received in an update; default: 0.
    """
    spans = sorted(timeline, key=lambda span: (span.end, span.start))
    first_forwards = (a for *_, a in spans if (a.kind, a.block, a.pass_) == ("F", 0, 0))
    micros = Counter(action.update for action in first_forwards)
    micro_batches = [micros[update] for update in range(1 + max(micros, default=-1))]
    in_flight = _InFlight(place, routes, micro_batches, payload, credits, update_bytes)
    waiting: list[Span] = []
    for span in spans:
        waiting = in_flight.run_ready([*waiting, span])
    while waiting:
        blocked = in_flight.run_ready(waiting)
        assert len(blocked) < len(waiting), (
            f"no action sends the messages that {blocked[0].action} receives"
        )
        waiting = blocked
    return in_flight.peak_bytes()


@final
class _InFlight:
    """Messages in flight, counted by each rank from its own past alone.

    ::

        stage 0   F0.0 sends 0    receive 0 of stage 1 is posted from the start
                  F0.1 sends 1    waits for its receive, as far as stage 0 knows
                  B0.0 receives gradient 0: so stage 1 has received 0, and receive 1 is posted;
                                  1 is freed after this action

    A skip waits, too, until its reader is known to have started: that may be later.
    """

    def __init__(
        self,
        place: Sequence[int],
        routes: Sequence[Route],
        micro_batches: Sequence[int],
        payload: Sequence[int],
        credits: int,
        update_bytes: Sequence[int],
    ) -> None:
        stages = range(max(place) + 1)
        self._message_tables = [
            MessageTable(routes, place, stage, micro_batches) for stage in stages
        ]
        self._passes_blocks = [route.blocks_passed > 0 for route in routes]
        self._routes_of_stage: list[list[int]] = [[] for _ in stages]
        for index, route in enumerate(routes):
            source = place[route.source.block]
            if source != place[route.target.block]:
                self._routes_of_stage[source].append(index)
        self._payload = payload
        self._credits = credits
        self._send_counts = Counter[int]()
        self._update_bytes = update_bytes or [0 for _ in stages]
        # The receives of each route that a stage knows of, and (under ~stage) the stages that have
        # posted their first receives; a message carries its sender's counts.
        self._known_receives = [Counter({~stage: 1}) for stage in stages]
        self._sender_knowledge: dict[int, deque[Counter[int]]] = {
            i: deque() for i in range(len(routes))
        }
        self._peak_bytes = [0 for _ in stages]

    def ready(self, stage: int, action: Action) -> bool:
        """Return whether all messages that an action receives from other stages were sent."""
        messages = self._message_tables[stage]
        return all(
            messages.is_local(route) or self._sender_knowledge[route]
            for route in messages.incoming(action)
        )

    def run_ready(self, spans: Sequence[Span]) -> list[Span]:
        """Run the actions of spans in their order, and return those that have to wait.

        An update takes no time, so an action may need a message of the same moment.
        """
        blocked: list[Span] = []
        for span in spans:
            is_behind = any(span.stage == other.stage for other in blocked)
            if is_behind or not self.ready(span.stage, span.action):
                blocked.append(span)
            else:
                self.run_action(span.stage, span.action)
        return blocked

    def run_action(self, stage: int, action: Action) -> None:
        """Receive and send the messages of an action."""
        messages, receives = self._message_tables[stage], self._known_receives[stage]
        freed = receives.copy()
        for route in messages.incoming(action):
            if not messages.is_local(route):
                receives |= self._sender_knowledge[route].popleft()
                receives[route] += 1
        for route in messages.outgoing(action):
            if not messages.is_local(route):
                self._send_counts[route] += 1
                self._sender_knowledge[route].append(receives.copy())
                self._note_peak(stage, freed, route)
        if action.kind == "U" and self._update_bytes[stage]:
            self._note_peak(stage, freed, None, self._update_bytes[stage])

    def _note_peak(
        self, stage: int, freed: Counter[int], sending: int | None, more_bytes: int = 0
    ) -> None:
        """Count the messages in flight of a stage, given the receives whose sends are freed."""
        sizes = (
            self._in_flight_bytes(route, stage, freed, route == sending)
            for route in self._routes_of_stage[stage]
        )
        self._peak_bytes[stage] = max(self._peak_bytes[stage], sum(sizes) + more_bytes)

    def _in_flight_bytes(
        self, route: int, stage: int, freed: Counter[int], is_sending: bool
    ) -> int:
        """Return the bytes of a route's messages in flight, with the one that is being sent."""
        messages = self._message_tables[stage]
        window = messages.window(route)
        started = freed[~messages.target_stage(route)] or not self._passes_blocks[route]
        waiting = self._send_counts[route] - (window if started else 0) - freed[route]
        return self._payload[route] * max(int(is_sending), min(waiting, self._credits * window))

    def peak_bytes(self) -> list[int]:
        """Return the most bytes per stage, posted receives included."""
        posted_bytes = Counter[int]()
        messages = self._message_tables[0]
        for route, count in self._send_counts.items():
            posted = min(count, messages.window(route))
            posted_bytes[messages.target_stage(route)] += posted * self._payload[route]
        return [peak + posted_bytes[stage] for stage, peak in enumerate(self._peak_bytes)]
