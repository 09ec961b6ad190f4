"""What travels for one rank: receives posted ahead, sends, and hand-overs on the rank itself.

Invariant: a block handed over on the same rank gets what a message would give, memory of its own,
contiguous and aligned; so it computes the same bits wherever its neighbours are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.block import Block
from dtrain.comm.comm import Comm
from dtrain.errors import Refusal
from dtrain.live import Live
from dtrain.mesh import Mesh
from dtrain.objectives.objective import Mode, Objective
from dtrain.objectives.task import Task
from dtrain.parcel import EXACT, Parcel, Spec
from dtrain.schedules.action import Action, Route
from dtrain.schedules.messages import Messages


@dataclass(frozen=True)
class Seat:
    """One rank's place: its coordinates on the mesh, and the stage of every block."""

    mesh: Mesh
    replica: int
    stage: int
    place: tuple[int, ...]

    def rank(self, block: int) -> int:
        """Return the rank that holds `block` for this replica."""
        return self.mesh.rank(self.replica, self.place[block])

    @contextmanager
    def at(self, action: Action, when: str) -> Iterator[None]:
        """Add to whatever is raised inside where it was: replica, stage, update, action."""
        try:
            yield
        except BaseException as error:
            place = f"[replica {self.replica} stage {self.stage} | {when} | action {action}]"
            if isinstance(error, Refusal):
                error.at(place)
            else:
                error.add_note(place)
            raise


@dataclass(frozen=True)
class Lines:
    """The communicators, one per purpose.

    Attributes
    ----------
    onward, back, control : Comm
        All ranks: what goes to later blocks, what goes to earlier ones, JSON.
    replicas, column : Comm
        The replicas of my stage; the stages of my replica, in order.
    """

    onward: Comm
    back: Comm
    control: Comm
    replicas: Comm
    column: Comm


class Mail:
    """Takes and offers along the routes of one mode.

    Parameters
    ----------
    mode : str
        "train" or "predict": which routes of the objective are used.
    tasks : sequence of Task
        One per block of the run.
    parcel : Parcel
        How tensors travel in training; in prediction they do as they are.
    """

    def __init__(
        self,
        mode: Mode,
        objective: Objective,
        tasks: Sequence[Task],
        seat: Seat,
        lines: Lines,
        parcel: Parcel = EXACT,
    ) -> None:
        self.routes = objective.routes(len(tasks), mode)
        self.objective = objective
        self.tasks = tasks
        self.seat = seat
        self.lines = lines
        self.parcel = parcel
        self.shelf: dict[tuple[int, int, int], Tensor] = {}
        self.standing: dict[tuple[int, str, int], dict[str, Tensor]] = {}

    def open(
        self, plan: Iterable[Action], sizes: Sequence[int], rows: Callable[[int, int], int]
    ) -> None:
        """Declare every message that the plan will receive; the next of each is always posted.

        Parameters
        ----------
        sizes : sequence of int
            Micro-batches of each update of the segment.
        rows : callable
            Returns the samples of (update, micro-batch).
        """
        seat, self.rows = self.seat, rows
        self.messages = Messages(self.routes, seat.place, seat.stage, sizes)
        coming: defaultdict[int, list[Spec]] = defaultdict(list)
        for index, action in self.messages.receipts(plan):
            update, micro = self.messages.origin(index, action)
            count = self._count(update, micro)
            route = self.routes[index]
            coming[index].append(self.parcel.spec(route, self._spec(route, count)))
        self.sent, self.came = Counter[int](), Counter[int]()
        self.tags = self._tags()
        for index, specs in coming.items():
            route, window = self.routes[index], self.messages.window(index)
            rank, line = seat.rank(route.source.block), self._line(route)
            for way in range(min(window, len(specs))):
                line.expect(rank, self._tag(index, way), specs[way::window])

    def take(self, action: Action) -> dict[str, Tensor]:
        """Return by route name what the routes bring to `action`; the caller owns it.

        What comes once per update is there for all its micro-batches: it must not be written to.
        """
        told: dict[str, Tensor] = {}
        for index in self.messages.takes(action):
            route, tensor = self.routes[index], self._fetch(index, action)
            told[route.name] = tensor
            if route.single:
                self._stand(action, route.name, tensor)
        if action.micro > 0 and self.standing:
            told |= self.standing.get(_point(action), {})
        return told

    def offer(self, action: Action, block: Block, live: Live | None) -> None:
        """Send what leaves `action`, without waiting for its arrival."""
        for index in self.messages.offers(action):
            route = self.routes[index]
            tensor = self.objective.tell(route, block, live)
            rows = 0 if live is None else len(live.targets)
            due, found = self._spec(route, rows), (tensor.shape, tensor.dtype)
            assert found == due, f"{route}: `tell` gave {found}, `shape` says {due}"
            tensor = self.parcel.packed(route, tensor)
            if live is None:  # a weight, that the next update may overwrite under way
                tensor = tensor.clone()
            if self.messages.local(index):
                copy = tensor.clone(memory_format=torch.contiguous_format)
                self.shelf[index, action.update, action.micro] = copy
            else:
                tag = self._tag(index, self.sent[index])
                self.sent[index] += 1
                self._line(route).isend(tensor, self.seat.rank(route.target.block), tag)

    def close(self) -> None:
        """Wait until everything that was sent has arrived."""
        self.lines.onward.flush()
        self.lines.back.flush()
        self.standing.clear()

    def _line(self, route: Route) -> Comm:
        ahead = route.target.block >= route.source.block
        return self.lines.onward if ahead else self.lines.back

    def _fetch(self, index: int, action: Action) -> Tensor:
        route, origin = self.routes[index], self.messages.origin(index, action)
        if self.messages.local(index):
            tensor = self.shelf.pop((index, *origin))
        else:
            tag = self._tag(index, self.came[index])
            self.came[index] += 1
            came = self._line(route).recv(self.seat.rank(route.source.block), tag)
            assert isinstance(came, Tensor)
            tensor = came
        return self.parcel.unpacked(route, tensor, self._spec(route, self._count(*origin)))

    def _spec(self, route: Route, rows: int) -> Spec:
        return self.objective.shape(route, self.tasks, rows)

    def _count(self, update: int, micro: int) -> int:
        """Return the samples of a micro-batch, 0 of a message that belongs to none."""
        return self.rows(update, micro) if micro >= 0 else 0

    def _tag(self, index: int, number: int) -> int:
        """Return the tag of a route's message: a route with a lag has as many as may be waiting."""
        return self.tags[index] + number % self.messages.window(index)

    def _tags(self) -> list[int]:
        """Return the first tag of each route, counted for each pair of stages by itself."""
        used: Counter[tuple[int, int]] = Counter()
        first = []
        for index in range(len(self.routes)):
            pair = self.messages.source(index), self.messages.target(index)
            first.append(used[pair])
            used[pair] += self.messages.window(index)
        return first

    def _stand(self, action: Action, name: str, tensor: Tensor) -> None:
        """Keep what came for a whole update, in place of what came for the one before."""
        self.standing.setdefault(_point(action), {})[name] = tensor


def _point(action: Action) -> tuple[int, str, int]:
    """Return where an action stands, `I` in the place of `B`."""
    return action.block, "B" if action.kind == "I" else action.kind, action.pass_
