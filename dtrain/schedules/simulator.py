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

from dtrain.schedules.actions import Action, Route
from dtrain.schedules.cost_model import CostModel, unit_costs
from dtrain.schedules.messages import MessageTable

ActionList = Sequence[Action]


RankCoords = tuple[int, int]
"""(replica, stage)."""


WaitReason = tuple[str, int, int]
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
class SimulatedChannel:
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
        self.send_spans: list[Span] = []
        self.send_times: list[float] = []
        self.arrival_times: list[float] = []
        self.receive_times: list[float] = []


@final
class Simulator:
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
        plans: Mapping[int, Sequence[ActionList]],
        micro_batches: Mapping[int, Sequence[int]],
        place: Sequence[int],
        routes: Sequence[Route],
        costs: CostModel | None = None,
        credits: int | None = None,
    ) -> None:
        self.spans: dict[RankCoords, list[Span]] = {}
        self.channels = {replica: [SimulatedChannel() for _ in routes] for replica in plans}
        self._plans, self._place, self._routes = plans, place, routes
        self._costs, self._credits = costs or unit_costs(len(place)), credits
        self._message_tables = {
            (replica, stage): MessageTable(routes, place, stage, micro_batches[replica])
            for replica, stages in plans.items()
            for stage in range(len(stages))
        }
        ends = [(place[route.source.block], place[route.target.block]) for route in routes]
        self._links = [self._costs.links(*pair) for pair in ends]
        self._link_free_at: defaultdict[tuple[int, int, int], float] = defaultdict(int)
        self._sync_arrivals: dict[Action, dict[int, float]] = defaultdict(dict)
        self._ready_ranks: deque[tuple[RankCoords, Iterator[WaitReason]]] = deque()
        self._waiting_ranks: dict[WaitReason, tuple[RankCoords, Iterator[WaitReason]]] = {}

    def run(self) -> None:
        """Run all plans to their ends; `PlanError` for a deadlock or a message that misfits."""
        for replica, plans in self._plans.items():
            for stage, plan in enumerate(plans):
                self._ready_ranks.append(((replica, stage), self._run_rank((replica, stage), plan)))
        while self._ready_ranks:
            rank, course = self._ready_ranks.popleft()
            wait = next(course, None)
            if wait is not None:
                self._waiting_ranks[wait] = rank, course
        if self._waiting_ranks:
            raise PlanError(self._deadlock_text())
        self._check_all_received()

    @property
    def messages(self) -> int:
        """Messages between ranks, handovers on one rank not counted."""
        return sum(
            len(channel.send_spans)
            for channels in self.channels.values()
            for route, channel in zip(self._routes, channels, strict=True)
            if self._place[route.source.block] != self._place[route.target.block]
        )

    def _run_rank(self, rank: RankCoords, plan: ActionList) -> Iterator[WaitReason]:
        """Run one rank's plan; yield whenever it must wait, go on when that may have come."""
        messages, prices = self._message_tables[rank], self._costs.blocks
        spans = self.spans[rank] = []
        now: float = 0
        for action in plan:
            for route in messages.incoming(action):
                now = yield from self._receive(rank, route, action, now)
            if action.kind == "U":
                now = yield from self._synchronise(rank[0], action, now)
            end = now + prices[action.block].seconds(action.kind)
            spans.append(Span(rank[1], now, end, action))
            now = end
            for route in messages.outgoing(action):
                now = yield from self._send(rank, route, spans[-1], now)

    def _receive(
        self, rank: RankCoords, route: int, action: Action, now: float
    ) -> Generator[WaitReason, None, float]:
        """Take the next message of a route, posting a receive after it; return when it is there."""
        channel = self.channels[rank[0]][route]
        index = len(channel.receive_times)
        while index == len(channel.send_spans):
            yield "take", rank[0], route
        source = channel.send_spans[index].action
        if (source.update, source.micro) != self._message_tables[rank].source_micro_batch(
            route, action
        ):
            raise PlanError(self._mismatch_text(rank, route, channel.send_spans[index], action))
        channel.receive_times.append(max(now, channel.arrival_times[index]))
        self._wake(("offer", rank[0], route))
        return channel.receive_times[-1]

    def _send(
        self, rank: RankCoords, route: int, span: Span, now: float
    ) -> Generator[WaitReason, None, float]:
        """Send on a route; wait until no more sends than credits lack a posted receive."""
        messages, channel = self._message_tables[rank], self.channels[rank[0]][route]
        local = messages.is_local(route)
        channel.send_spans.append(span)
        channel.send_times.append(now)
        channel.arrival_times.append(now if local else self._arrival(rank, route, now))
        self._wake(("take", rank[0], route))
        if local:
            return now
        posted = len(channel.send_spans) - messages.window(route) - (self._credits or 0)
        while len(channel.receive_times) < posted:
            yield "offer", rank[0], route
        timed = self._credits is not None and posted > 0
        return max(now, channel.receive_times[posted - 1]) if timed else now

    def _arrival(self, rank: RankCoords, route: int, now: float) -> float:
        """Return when a message that is sent now is there; its link is busy until it has left."""
        link, size = self._links[route], self._costs.payload(route)
        way = *rank, self._message_tables[rank].target_stage(route)
        self._link_free_at[way] = max(now, self._link_free_at[way]) + (
            size and size / link.bytes_per_s
        )
        return self._link_free_at[way] + link.latency_s

    def _synchronise(
        self, replica: int, action: Action, now: float
    ) -> Generator[WaitReason, None, float]:
        """Wait for the same update in all replicas; return when they have met."""
        met = self._sync_arrivals[action]
        met[replica] = now
        while len(met) < len(self._plans):
            yield "meet", replica, action.block
        for other in self._plans:
            self._wake(("meet", other, action.block))
        return max(met.values()) + self._costs.blocks[action.block].sync_s

    def _wake(self, wait: WaitReason) -> None:
        """Let the rank go on that waits for this, if there is one."""
        if wait in self._waiting_ranks:
            self._ready_ranks.append(self._waiting_ranks.pop(wait))

    def _check_all_received(self) -> None:
        """Raise where a message was sent and never taken."""
        for channels in self.channels.values():
            for route, channel in zip(self._routes, channels, strict=True):
                sent, taken = len(channel.send_spans), len(channel.receive_times)
                if taken < sent:
                    raise PlanError(f"{route}: {sent} sent, {taken} taken")

    def _mismatch_text(self, rank: RankCoords, route: int, span: Span, action: Action) -> str:
        """Return what is wrong where a message of another micro-batch comes."""
        return (
            f"{self._rank_name(rank)} at {action} of update {action.update} (position "
            f"{len(self.spans[rank])}) takes {self._routes[route].name} {action.micro}, but "
            f"{self._rank_name((rank[0], span.stage))} sends that of {span.action} of update "
            f"{span.action.update} first"
        )

    def _deadlock_text(self) -> str:
        """Spell out who waits for whom, a circle where there is one."""
        blocked = {rank: wait for wait, (rank, _) in self._waiting_ranks.items()}
        chain = [min(blocked)]
        while chain[-1] in blocked and chain[-1] not in chain[:-1]:
            chain.append(self._peer(chain[-1], blocked[chain[-1]]))
        circle = chain[-1] in blocked
        chain = chain[chain.index(chain[-1]) if circle else 0 :]
        links = (self._reason(rank, blocked[rank], peer) for rank, peer in pairwise(chain))
        end = "" if circle else ", which has ended"
        return f"deadlock: {self._rank_name(chain[0])} {', which '.join(links)}{end}"

    def _peer(self, rank: RankCoords, wait: WaitReason) -> RankCoords:
        """Return the rank that another one waits for."""
        kind, replica, index = wait
        if kind == "meet":
            met = self._sync_arrivals[self._blocked_action(rank, wait)[1]]
            return next(other for other in self._plans if other not in met), rank[1]
        route = self._routes[index]
        return replica, self._place[(route.source if kind == "take" else route.target).block]

    def _reason(self, rank: RankCoords, wait: WaitReason, peer: RankCoords) -> str:
        """Return where a rank waits and for what."""
        position, action = self._blocked_action(rank, wait)
        where = f"waits at {action} of update {action.update} (position {position}) for"
        match wait[0]:
            case "take":
                what = f"{self._routes[wait[2]].name} {action.micro} from {self._rank_name(peer)}"
            case "offer":
                what = f"{self._rank_name(peer)} to take {self._routes[wait[2]].name}"
            case _:
                what = f"the same update in {self._rank_name(peer)}"
        return f"{where} {what}"

    def _blocked_action(self, rank: RankCoords, wait: WaitReason) -> tuple[int, Action]:
        """Return position and action of a rank that waits; an offer comes after its action ran."""
        position = len(self.spans[rank]) - (wait[0] == "offer")
        return position, self._plans[rank[0]][rank[1]][position]

    def _rank_name(self, rank: RankCoords) -> str:
        """Return a rank's name; the replica only where there are several."""
        replica, stage = rank
        return f"stage {stage}" if len(self._plans) == 1 else f"replica {replica} stage {stage}"
