"""Run plans in virtual time, under exactly the rule by which `comm` moves messages.

Invariant: every rank's steps have one order and every channel has one reader and one writer (a
Kahn process network), so the order in which ranks are served changes nothing: one run proves all
timings.

The rule, per route (which leads to one block of one stage):

    sender    F0.0 offer 0   F0.1 offer 1   F0.2 offer 2 ...
                    |              |              |            offer k returns when receive
                    v              v              v            k - credits is posted
    receiver     take 0         take 1         take 2   ...    receive k + 1 is posted when k
                                                               was taken, receive 0 at start

A rank serves the takes of an action in the order of the routes, computes, then makes its offers in
the order of the routes. `U` of a block waits for the same `U` of all replicas. Time is counted in
units (F = 1, B = 2, U = 0, hops 0). Waiting for a receive costs no time here: it is there to prove
the order, and with the credits of a real run it is rare.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, final

from dtrain.schedules.action import Action, Route
from dtrain.schedules.messages import Messages

Plan = Sequence[Action]
Rank = tuple[int, int]
"""(replica, stage)."""
Wait = tuple[str, int, int]
"""("take" or "offer", replica, route) or ("meet", replica, block)."""

UNITS = {"F": 1, "B": 2, "U": 0}


class PlanError(ValueError):
    """Plans that do not fit each other; the message names stage, position and action."""


class Span(NamedTuple):
    """An action in time, `start` to `end` in units."""

    stage: int
    start: int
    end: int
    action: Action


@final
class _Channel:
    """The messages of one route in one replica: the spans that offered them, and how many left."""

    def __init__(self) -> None:
        self.sent: list[Span] = []
        self.taken = 0


@final
class Simulation:
    """The course of all ranks' plans.

    Parameters
    ----------
    plans : mapping of int to sequence of Plan
        `plans[replica][stage]`; replicas of equal plans need only one entry.
    place : sequence of int
        `place[b]` is the stage of block b.
    routes : sequence of Route
        What flows between actions.
    credits : int
        Sends of a route that may be under way beyond the posted receive; 0 is strictest.

    Attributes
    ----------
    spans : dict of (replica, stage) to list of Span
        What ran when.
    messages : int
        Messages between ranks, handovers on one rank not counted.
    """

    def __init__(
        self,
        plans: Mapping[int, Sequence[Plan]],
        place: Sequence[int],
        routes: Sequence[Route],
        credits: int = 0,
    ) -> None:
        self.spans: dict[Rank, list[Span]] = {}
        self.messages = 0
        self._plans, self._place, self._routes, self._credits = plans, place, routes, credits
        self._channels = {replica: [_Channel() for _ in routes] for replica in plans}
        self._met: dict[Action, dict[int, int]] = defaultdict(dict)
        self._ready: deque[tuple[Rank, Iterator[Wait]]] = deque()
        self._waiting: dict[Wait, tuple[Rank, Iterator[Wait]]] = {}

    def run(self) -> None:
        """Run all plans to their ends; `PlanError` for a deadlock or a message that misfits."""
        for replica, plans in self._plans.items():
            for stage, plan in enumerate(plans):
                self._ready.append(((replica, stage), self._course(replica, stage, plan)))
        while self._ready:
            rank, course = self._ready.popleft()
            wait = next(course, None)
            if wait is not None:
                self._waiting[wait] = rank, course
        if self._waiting:
            raise PlanError(self._deadlock())
        self._settle()

    def _course(self, replica: int, stage: int, plan: Plan) -> Iterator[Wait]:
        """Run one rank's plan; yield whenever it must wait, go on when that may have come."""
        messages, now = Messages(self._routes, self._place, stage), 0
        spans = self.spans[replica, stage] = []
        for action in plan:
            for route in messages.takes(action):
                now = max(now, (yield from self._take(replica, route, action)))
            if action.kind == "U":
                now = yield from self._meet(replica, action, now)
            spans.append(Span(stage, now, now + UNITS[action.kind], action))
            now = spans[-1].end
            for route in messages.offers(action):
                credits = math.inf if messages.local(route) else self._credits
                yield from self._offer(replica, route, spans[-1], credits)

    def _take(self, replica: int, route: int, action: Action) -> Generator[Wait, None, int]:
        """Take the next message of a route, posting the receive after it; return when it came."""
        channel = self._channels[replica][route]
        while channel.taken == len(channel.sent):
            yield "take", replica, route
        span = channel.sent[channel.taken]
        if span.action[2:] != action[2:]:
            rank = replica, self._place[action.block]
            raise PlanError(self._misfit(rank, route, span, action))
        channel.taken += 1
        self._wake(("offer", replica, route))
        return span.end

    def _offer(self, replica: int, route: int, span: Span, credits: float) -> Iterator[Wait]:
        """Send on a route; wait until no more than `credits` sends lack a posted receive."""
        channel = self._channels[replica][route]
        channel.sent.append(span)
        self.messages += credits != math.inf
        self._wake(("take", replica, route))
        while channel.taken < len(channel.sent) - 1 - credits:
            yield "offer", replica, route

    def _meet(self, replica: int, action: Action, now: int) -> Generator[Wait, None, int]:
        """Wait for the same update in all replicas; return when the last one came."""
        met = self._met[action]
        met[replica] = now
        while len(met) < len(self._plans):
            yield "meet", replica, action.block
        for other in self._plans:
            self._wake(("meet", other, action.block))
        return max(met.values())

    def _wake(self, wait: Wait) -> None:
        """Let the rank go on that waits for this, if there is one."""
        if wait in self._waiting:
            self._ready.append(self._waiting.pop(wait))

    def _settle(self) -> None:
        """Raise where a message was sent and never taken."""
        for channels in self._channels.values():
            for route, channel in zip(self._routes, channels, strict=True):
                if channel.taken < len(channel.sent):
                    raise PlanError(f"{route}: {len(channel.sent)} sent, {channel.taken} taken")

    def _misfit(self, rank: Rank, route: int, span: Span, action: Action) -> str:
        """Return what is wrong where a message of another micro-batch comes."""
        return (
            f"{self._name(rank)} at {action} of update {action.update} (position "
            f"{len(self.spans[rank])}) takes {self._routes[route].name} {action.micro}, but "
            f"{self._name((rank[0], span.stage))} sends that of {span.action} of update "
            f"{span.action.update} first"
        )

    def _deadlock(self) -> str:
        """Spell out who waits for whom, a circle where there is one."""
        blocked = {rank: wait for wait, (rank, _) in self._waiting.items()}
        chain = [min(blocked)]
        while chain[-1] in blocked and chain[-1] not in chain[:-1]:
            chain.append(self._peer(chain[-1], blocked[chain[-1]]))
        circle = chain[-1] in blocked
        chain = chain[chain.index(chain[-1]) if circle else 0 :]
        links = (self._reason(rank, blocked[rank], peer) for rank, peer in pairwise(chain))
        end = "" if circle else ", which has ended"
        return f"deadlock: {self._name(chain[0])} {', which '.join(links)}{end}"

    def _peer(self, rank: Rank, wait: Wait) -> Rank:
        """Return the rank that another one waits for."""
        kind, replica, index = wait
        if kind == "meet":
            met = self._met[self._stuck(rank, wait)[1]]
            return next(other for other in self._plans if other not in met), rank[1]
        route = self._routes[index]
        return replica, self._place[(route.source if kind == "take" else route.target).block]

    def _reason(self, rank: Rank, wait: Wait, peer: Rank) -> str:
        """Return where a rank waits and for what."""
        position, action = self._stuck(rank, wait)
        where = f"waits at {action} of update {action.update} (position {position}) for"
        match wait[0]:
            case "take":
                what = f"{self._routes[wait[2]].name} {action.micro} from {self._name(peer)}"
            case "offer":
                what = f"{self._name(peer)} to take {self._routes[wait[2]].name}"
            case _:
                what = f"the same update in {self._name(peer)}"
        return f"{where} {what}"

    def _stuck(self, rank: Rank, wait: Wait) -> tuple[int, Action]:
        """Return position and action of a rank that waits; an offer comes after its action ran."""
        position = len(self.spans[rank]) - (wait[0] == "offer")
        return position, self._plans[rank[0]][rank[1]][position]

    def _name(self, rank: Rank) -> str:
        """Return a rank's name; the replica only where there are several."""
        replica, stage = rank
        return f"stage {stage}" if len(self._plans) == 1 else f"replica {replica} stage {stage}"
