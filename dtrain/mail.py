"""What travels for one rank: receives posted ahead, sends, and hand-overs on the rank itself.

Invariant: a block handed over on the same rank gets what a message would give, memory of its own,
contiguous and aligned; so it computes the same bits wherever its neighbours are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.block import Live
from dtrain.comm.comm import Comm
from dtrain.comm.routes import Spec
from dtrain.mesh import Mesh
from dtrain.objectives.objective import Mode, Objective, Task
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


@dataclass(frozen=True)
class Lines:
    """The communicators, one per purpose, all over the same ranks but `replicas`."""

    onward: Comm
    back: Comm
    control: Comm
    replicas: Comm


class Mail:
    """Takes and offers along the routes of one mode.

    Parameters
    ----------
    mode : str
        "train" or "predict": which routes of the objective are used.
    tasks : sequence of Task
        One per block of the run.
    """

    def __init__(
        self, mode: Mode, objective: Objective, tasks: Sequence[Task], seat: Seat, lines: Lines
    ) -> None:
        self.routes = objective.routes(len(tasks), mode)
        self.messages = Messages(self.routes, seat.place, seat.stage)
        self.objective = objective
        self.tasks = tasks
        self.seat = seat
        self.lines = lines
        self.shelf: dict[tuple[int, int, int], Tensor] = {}

    def open(self, plan: Iterable[Action], rows: Callable[[Action], int]) -> None:
        """Declare every message that the plan will receive; the next of each is always posted."""
        coming: defaultdict[int, list[Spec]] = defaultdict(list)
        for index, action in self.messages.receipts(plan):
            shape, dtype = self.objective.shape(self.routes[index], self.tasks)
            coming[index].append(((rows(action), *shape), dtype))
        for index, specs in coming.items():
            route = self.routes[index]
            self._line(route).expect(self.seat.rank(route.source.block), index, specs)

    def take(self, action: Action) -> dict[str, Tensor]:
        """Return by route name what the routes bring to `action`; the caller owns it."""
        return {self.routes[i].name: self._fetch(i, action) for i in self.messages.takes(action)}

    def offer(self, action: Action, live: Live) -> None:
        """Send what leaves `action`, without waiting for its arrival."""
        for index in self.messages.offers(action):
            route = self.routes[index]
            tensor = self.objective.tell(route, live)
            if self.messages.local(index):
                copy = tensor.clone(memory_format=torch.contiguous_format)
                self.shelf[index, action.update, action.micro] = copy
            else:
                self._line(route).isend(tensor, self.seat.rank(route.target.block), index)

    def close(self) -> None:
        """Wait until everything that was sent has arrived."""
        self.lines.onward.flush()
        self.lines.back.flush()

    def _line(self, route: Route) -> Comm:
        ahead = route.target.block >= route.source.block
        return self.lines.onward if ahead else self.lines.back

    def _fetch(self, index: int, action: Action) -> Tensor:
        route = self.routes[index]
        if self.messages.local(index):
            return self.shelf.pop((index, action.update, action.micro))
        return self._line(route).recv(self.seat.rank(route.source.block), index)
