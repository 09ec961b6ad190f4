"""Run plans in virtual time, by exactly the rule that `comm` moves messages by.

Invariant: every rank has one order of steps and every channel has one reader and one writer (a Kahn
process network), so the order in which ranks are simulated changes nothing: one run proves all
timings.

The rule, per route (from one block to one block):

    sender    F0.0 send 0    F0.1 send 1    F0.2 send 2  ...
                    |              |              |            send k returns when receive
                    v              v              v            k - credits is posted
    receiver     receive 0      receive 1      receive 2  ...  receive k + 1 is posted when k
                                                               was received, receive 0 at start

A rank receives the messages of an action in the order of the routes, computes, then sends in the
order of the routes. `U` of a block waits for the same `U` of all replicas. A route with a lag has a
larger window: see `MessageTable.window`.

Without credits the order is proved; waiting for a receive to be posted then costs no time, since it
is rare with the credits of a real run. With credits a send that waits delays its rank. Messages
that the credits allow in flight move at once, one after the other on each link.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, final

from dtrain.schedules.actions import Action, Route
from dtrain.schedules.cost_model import CostModel, unit_costs
from dtrain.schedules.messages import MessageTable

ActionList = Sequence[Action]


RankCoords = tuple[int, int]
"""(replica, stage)."""


WaitReason = tuple[Literal["receive", "send", "update"], int, int]
"""("receive" or "send", replica, route) or ("update", replica, block)."""


class PlanError(ValueError):
    """Plans do not fit each other: a fault of the schedule.

    The message names stage, position (from 0) and action.

    Attributes
    ----------
    key : str
        Stable name of the fault, such as "plan.deadlock".
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Span(NamedTuple):
    """An action from `start` to `end`, in whole units, or in seconds where costs are given."""

    stage: int
    start: float
    end: float
    action: Action


@final
class SimulatedChannel:
    """The messages of one route in one replica.

    Attributes
    ----------
    send_spans : list of Span
        The actions that sent them.
    send_times, arrival_times : list of float
        Time at which each was sent, and at which it arrived.
    receive_times : list of float
        Time at which each was received, as far as they were.
    """

    def __init__(self) -> None:
        self.send_spans: list[Span] = []
        self.send_times: list[float] = []
        self.arrival_times: list[float] = []
        self.receive_times: list[float] = []


@final
class Simulator:
    """A simulation of the plans of all ranks.

    Parameters
    ----------
    plans : mapping of int to sequence of ActionList
        `plans[replica][stage]`; replicas of equal plans need only one entry.
    micro_batches : mapping of int to sequence of int
        Number of micro-batches by [replica][update].
    place : sequence of int
        `place[b]` is the stage of block b.
    routes : sequence of Route
        All routes of the model.
    costs : CostModel, optional
        Default: unit costs.
    credits : int, optional
        Sends of a route that may be in flight beyond the posted receives, in a timed run. Default:
        none, and waiting for a receive costs no time, which proves the order.

    Attributes
    ----------
    spans : dict of (replica, stage) to list of Span
        The actions that ran, with their times.
    channels : dict of int to list of SimulatedChannel
        `channels[replica][route]`.
    message_tables : dict of (replica, stage) to MessageTable
        The messages of each rank.
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
        self._plans = plans
        self._place = place
        self._routes = routes
        self._costs = costs or unit_costs(len(place))
        self._credits = credits
        self.message_tables = {
            (replica, stage): MessageTable(routes, place, stage, micro_batches[replica])
            for replica, stages in plans.items()
            for stage in range(len(stages))
        }
        self._links = [
            self._costs.links(place[route.source.block], place[route.target.block])
            for route in routes
        ]
        self._link_free_at: defaultdict[tuple[int, int, int], float] = defaultdict(int)
        self._sync_arrivals: dict[Action, dict[int, float]] = defaultdict(dict)
        self._ready_ranks: deque[tuple[RankCoords, Iterator[WaitReason]]] = deque()
        self._waiting_ranks: dict[WaitReason, tuple[RankCoords, Iterator[WaitReason]]] = {}

    def run(self) -> None:
        """Run all plans to their ends.

        Raises
        ------
        PlanError
            A deadlock, a message of the wrong micro-batch, or one that is never received.
        """
        for replica, plans in self._plans.items():
            for stage, plan in enumerate(plans):
                self._ready_ranks.append(((replica, stage), self._run_rank((replica, stage), plan)))
        while self._ready_ranks:
            rank, steps = self._ready_ranks.popleft()
            wait = next(steps, None)
            if wait is not None:
                self._waiting_ranks[wait] = rank, steps
        if self._waiting_ranks:
            raise PlanError("plan.deadlock", self._deadlock_text())
        self._check_all_received()

    @property
    def messages(self) -> int:
        """Number of messages between ranks; local routes are not counted."""
        return sum(
            len(channel.send_spans)
            for channels in self.channels.values()
            for route, channel in zip(self._routes, channels, strict=True)
            if self._place[route.source.block] != self._place[route.target.block]
        )

    def _run_rank(self, rank: RankCoords, plan: ActionList) -> Iterator[WaitReason]:
        """Run one rank's plan; yield a reason to wait, continue when it may be gone."""
        messages, block_costs = self.message_tables[rank], self._costs.blocks
        spans = self.spans[rank] = []
        now: float = 0
        for action in plan:
            for route in messages.incoming(action):
                now = yield from self._receive(rank, route, action, now)
            if action.kind == "U":
                now = yield from self._synchronise(rank[0], action, now)
            end = now + block_costs[action.block].seconds(action.kind)
            spans.append(Span(rank[1], now, end, action))
            now = end
            for route in messages.outgoing(action):
                now = yield from self._send(rank, route, spans[-1], now)

    def _receive(
        self, rank: RankCoords, route: int, action: Action, now: float
    ) -> Generator[WaitReason, None, float]:
        """Receive the next message of a route and post the next receive; return the time."""
        channel = self.channels[rank[0]][route]
        index = len(channel.receive_times)
        while index == len(channel.send_spans):
            yield "receive", rank[0], route
        source = channel.send_spans[index].action
        expected = self.message_tables[rank].source_micro_batch(route, action)
        if (source.update, source.micro) != expected:
            message = self._mismatch_text(rank, route, channel.send_spans[index], action)
            raise PlanError("plan.wrong-micro-batch", message)
        channel.receive_times.append(max(now, channel.arrival_times[index]))
        self._wake(("send", rank[0], route))
        return channel.receive_times[-1]

    def _send(
        self, rank: RankCoords, route: int, span: Span, now: float
    ) -> Generator[WaitReason, None, float]:
        """Send on a route; wait while more sends than credits lack a posted receive."""
        messages, channel = self.message_tables[rank], self.channels[rank[0]][route]
        local = messages.is_local(route)
        channel.send_spans.append(span)
        channel.send_times.append(now)
        channel.arrival_times.append(now if local else self._arrival(rank, route, now))
        self._wake(("receive", rank[0], route))
        if local:
            return now
        needed = len(channel.send_spans) - messages.window(route) - (self._credits or 0)
        while len(channel.receive_times) < needed:
            yield "send", rank[0], route
        is_timed = self._credits is not None and needed > 0
        return max(now, channel.receive_times[needed - 1]) if is_timed else now

    def _arrival(self, rank: RankCoords, route: int, now: float) -> float:
        """Return the arrival time of a message that is sent now; its link is busy meanwhile."""
        link, size = self._links[route], self._costs.payload(route)
        ends = *rank, self.message_tables[rank].target_stage(route)
        transfer_s = size and size / link.bytes_per_s
        self._link_free_at[ends] = max(now, self._link_free_at[ends]) + transfer_s
        return self._link_free_at[ends] + link.latency_s

    def _synchronise(
        self, replica: int, action: Action, now: float
    ) -> Generator[WaitReason, None, float]:
        """Wait for the same update in all replicas; return the time at which they are in sync."""
        arrivals = self._sync_arrivals[action]
        arrivals[replica] = now
        while len(arrivals) < len(self._plans):
            yield "update", replica, action.block
        for other in self._plans:
            self._wake(("update", other, action.block))
        return max(arrivals.values()) + self._costs.blocks[action.block].sync_s

    def _wake(self, wait: WaitReason) -> None:
        """Continue the rank that waits for this reason, if there is one."""
        if wait in self._waiting_ranks:
            self._ready_ranks.append(self._waiting_ranks.pop(wait))

    def _check_all_received(self) -> None:
        """Raise a `PlanError` for a message that was sent and never received."""
        for channels in self.channels.values():
            for route, channel in zip(self._routes, channels, strict=True):
                sent, received = len(channel.send_spans), len(channel.receive_times)
                if received < sent:
                    raise PlanError(
                        "plan.message-not-received", f"{route}: {sent} sent, {received} received"
                    )

    def _mismatch_text(self, rank: RankCoords, route: int, span: Span, action: Action) -> str:
        """Return the text of a message that belongs to another micro-batch."""
        return (
            f"{self._rank_name(rank)} at {action} of update {action.update} (position "
            f"{len(self.spans[rank])}) receives {self._routes[route].name} {action.micro}, but "
            f"{self._rank_name((rank[0], span.stage))} sends that of {span.action} of update "
            f"{span.action.update} first"
        )

    def _deadlock_text(self) -> str:
        """Return the chain of waiting ranks as text, as a circle if there is one."""
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
        """Return the rank for which `rank` waits."""
        kind, replica, index = wait
        if kind == "update":
            arrivals = self._sync_arrivals[self._blocked_action(rank, wait)[1]]
            return next(other for other in self._plans if other not in arrivals), rank[1]
        route = self._routes[index]
        return replica, self._place[(route.source if kind == "receive" else route.target).block]

    def _reason(self, rank: RankCoords, wait: WaitReason, peer: RankCoords) -> str:
        """Return the position of a waiting rank and its reason, as text."""
        position, action = self._blocked_action(rank, wait)
        kind, _, index = wait
        match kind:
            case "receive":
                reason = f"{self._routes[index].name} {action.micro} from {self._rank_name(peer)}"
            case "send":
                reason = f"{self._rank_name(peer)} to receive {self._routes[index].name}"
            case "update":
                reason = f"the same update in {self._rank_name(peer)}"
        return f"waits at {action} of update {action.update} (position {position}) for {reason}"

    def _blocked_action(self, rank: RankCoords, wait: WaitReason) -> tuple[int, Action]:
        """Return position and action of a waiting rank; a send waits after its action ran."""
        position = len(self.spans[rank]) - (wait[0] == "send")
        return position, self._plans[rank[0]][rank[1]][position]

    def _rank_name(self, rank: RankCoords) -> str:
        """Return the name of a rank, without the replica if there is only one."""
        replica, stage = rank
        return f"stage {stage}" if len(self._plans) == 1 else f"replica {replica} stage {stage}"
