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
the order of the routes. `U` of a block waits for the same `U` of all replicas. A route with a lag
has a larger window: see `Messages.window`.

Without credits the order is proved, and waiting for a receive costs no time: with the credits of a
real run it is rare. With credits it is timed: a send that waits delays its rank. What credits allow
under way is taken to move at once, one message after the other on each link.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, final

from dtrain.schedules.action import Action, Route
from dtrain.schedules.costs import Costs, units
from dtrain.schedules.messages import Messages

Plan = Sequence[Action]
Rank = tuple[int, int]
"""(replica, stage)."""
Wait = tuple[str, int, int]
"""("take" or "offer", replica, route) or ("meet", replica, block)."""


class PlanError(ValueError):
    """Plans that do not fit each other; the message names stage, position and action."""


class Span(NamedTuple):
    """An action in time, `start` to `end`: units (whole numbers), or seconds where costs are."""

    stage: int
    start: float
    end: float
    action: Action


@final
class Channel:
    """The messages of one route in one replica.

    Attributes
    ----------
    sent : list of Span
        The actions that offered them.
    left, came : list of float
        When each was offered, and when it was there.
    taken : list of float
        When each that was taken was.
    """

    def __init__(self) -> None:
        self.sent: list[Span] = []
        self.left: list[float] = []
        self.came: list[float] = []
        self.taken: list[float] = []


@final
class Simulation:
    """The course of all ranks' plans.

    Parameters
    ----------
    plans : mapping of int to sequence of Plan
        `plans[replica][stage]`; replicas of equal plans need only one entry.
    sizes : mapping of int to sequence of int
        Micro-batches by [replica][update].
    place : sequence of int
        `place[b]` is the stage of block b.
    routes : sequence of Route
        What flows between actions.
    costs : Costs, optional
        What it takes; default: units.
    credits : int, optional
        Sends of a route that may be under way beyond the posted receives, in a timed run;
        default: none, and waiting for a receive costs no time, which proves the order.

    Attributes
    ----------
    spans : dict of (replica, stage) to list of Span
        What ran when.
    channels : dict of int to list of Channel
        `channels[replica][route]`.
    """

    def __init__(
        self,
        plans: Mapping[int, Sequence[Plan]],
        sizes: Mapping[int, Sequence[int]],
        place: Sequence[int],
        routes: Sequence[Route],
        costs: Costs | None = None,
        credits: int | None = None,
    ) -> None:
        self.spans: dict[Rank, list[Span]] = {}
        self.channels = {replica: [Channel() for _ in routes] for replica in plans}
        self._plans, self._place, self._routes = plans, place, routes
        self._costs, self._credits = costs or units(len(place)), credits
        self._mail = {
            (replica, stage): Messages(routes, place, stage, sizes[replica])
            for replica, stages in plans.items()
            for stage in range(len(stages))
        }
        ends = [(place[route.source.block], place[route.target.block]) for route in routes]
        self._links = [self._costs.links(*pair) for pair in ends]
        self._free: defaultdict[tuple[int, int, int], float] = defaultdict(int)
        self._met: dict[Action, dict[int, float]] = defaultdict(dict)
        self._ready: deque[tuple[Rank, Iterator[Wait]]] = deque()
        self._waiting: dict[Wait, tuple[Rank, Iterator[Wait]]] = {}

    def run(self) -> None:
        """Run all plans to their ends; `PlanError` for a deadlock or a message that misfits."""
        for replica, plans in self._plans.items():
            for stage, plan in enumerate(plans):
                self._ready.append(((replica, stage), self._course((replica, stage), plan)))
        while self._ready:
            rank, course = self._ready.popleft()
            wait = next(course, None)
            if wait is not None:
                self._waiting[wait] = rank, course
        if self._waiting:
            raise PlanError(self._deadlock())
        self._settle()

    @property
    def messages(self) -> int:
        """Messages between ranks, handovers on one rank not counted."""
        return sum(
            len(channel.sent)
            for channels in self.channels.values()
            for route, channel in zip(self._routes, channels, strict=True)
            if self._place[route.source.block] != self._place[route.target.block]
        )

    def _course(self, rank: Rank, plan: Plan) -> Iterator[Wait]:
        """Run one rank's plan; yield whenever it must wait, go on when that may have come."""
        messages, prices = self._mail[rank], self._costs.blocks
        spans = self.spans[rank] = []
        now: float = 0
        for action in plan:
            for route in messages.takes(action):
                now = yield from self._take(rank, route, action, now)
            if action.kind == "U":
                now = yield from self._meet(rank[0], action, now)
            end = now + prices[action.block].seconds(action.kind)
            spans.append(Span(rank[1], now, end, action))
            now = end
            for route in messages.offers(action):
                now = yield from self._offer(rank, route, spans[-1], now)

    def _take(
        self, rank: Rank, route: int, action: Action, now: float
    ) -> Generator[Wait, None, float]:
        """Take the next message of a route, posting a receive after it; return when it is there."""
        channel = self.channels[rank[0]][route]
        index = len(channel.taken)
        while index == len(channel.sent):
            yield "take", rank[0], route
        source = channel.sent[index].action
        if (source.update, source.micro) != self._mail[rank].origin(route, action):
            raise PlanError(self._misfit(rank, route, channel.sent[index], action))
        channel.taken.append(max(now, channel.came[index]))
        self._wake(("offer", rank[0], route))
        return channel.taken[-1]

    def _offer(
        self, rank: Rank, route: int, span: Span, now: float
    ) -> Generator[Wait, None, float]:
        """Send on a route; wait until no more sends than credits lack a posted receive."""
        messages, channel = self._mail[rank], self.channels[rank[0]][route]
        local = messages.local(route)
        channel.sent.append(span)
        channel.left.append(now)
        channel.came.append(now if local else self._arrival(rank, route, now))
        self._wake(("take", rank[0], route))
        if local:
            return now
        posted = len(channel.sent) - messages.window(route) - (self._credits or 0)
        while len(channel.taken) < posted:
            yield "offer", rank[0], route
        timed = self._credits is not None and posted > 0
        return max(now, channel.taken[posted - 1]) if timed else now

    def _arrival(self, rank: Rank, route: int, now: float) -> float:
        """Return when a message that is sent now is there; its link is busy until it has left."""
        link, size = self._links[route], self._costs.payload(route)
        way = *rank, self._mail[rank].target(route)
        self._free[way] = max(now, self._free[way]) + (size and size / link.bytes_per_s)
        return self._free[way] + link.latency_s

    def _meet(self, replica: int, action: Action, now: float) -> Generator[Wait, None, float]:
        """Wait for the same update in all replicas; return when they have met."""
        met = self._met[action]
        met[replica] = now
        while len(met) < len(self._plans):
            yield "meet", replica, action.block
        for other in self._plans:
            self._wake(("meet", other, action.block))
        return max(met.values()) + self._costs.blocks[action.block].meet_s

    def _wake(self, wait: Wait) -> None:
        """Let the rank go on that waits for this, if there is one."""
        if wait in self._waiting:
            self._ready.append(self._waiting.pop(wait))

    def _settle(self) -> None:
        """Raise where a message was sent and never taken."""
        for channels in self.channels.values():
            for route, channel in zip(self._routes, channels, strict=True):
                sent, taken = len(channel.sent), len(channel.taken)
                if taken < sent:
                    raise PlanError(f"{route}: {sent} sent, {taken} taken")

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
