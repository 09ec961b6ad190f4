"""What travels for one rank: receives posted ahead, sends, and hand-overs on the rank itself.

Invariant: a block handed over on the same rank gets what a message would give, memory of its own,
contiguous and aligned; so it computes the same bits wherever its neighbours are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.comm.buffers import TensorSpec
from dtrain.comm.communicator import Comm
from dtrain.comm.groups import ProcessGroups
from dtrain.comm.wire_format import EXACT, WireFormat
from dtrain.mesh import RankPosition
from dtrain.objectives.base import ExecutionMode, Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.messages import MessageTable


class MessageRouter:
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
        mode: ExecutionMode,
        objective: Objective,
        block_specs: Sequence[BlockSpec],
        position: RankPosition,
        groups: ProcessGroups,
        wire_format: WireFormat = EXACT,
    ) -> None:
        self.routes = objective.routes(len(block_specs), mode)
        self.objective = objective
        self.block_specs = block_specs
        self.position = position
        self.groups = groups
        self.wire_format = wire_format
        self.local_messages: dict[tuple[int, int, int], Tensor] = {}
        self.update_messages: dict[tuple[int, str, int], dict[str, Tensor]] = {}

    def open(
        self, plan: Iterable[Action], sizes: Sequence[int], row_count: Callable[[int, int], int]
    ) -> None:
        """Declare every message that the plan will receive; the next of each is always posted.

        Parameters
        ----------
        sizes : sequence of int
            Micro-batches of each update of the segment.
        rows : callable
            Returns the samples of (update, micro-batch).
        """
        seat, self.row_count = self.position, row_count
        self.messages = MessageTable(self.routes, seat.place, seat.stage, sizes)
        coming: defaultdict[int, list[TensorSpec]] = defaultdict(list)
        for index, action in self.messages.remote_receives(plan):
            update, micro = self.messages.source_micro_batch(index, action)
            count = self._message_rows(update, micro)
            route = self.routes[index]
            coming[index].append(
                self.wire_format.encoded_spec(route, self._message_spec(route, count))
            )
        self.sent_counts, self.received_counts = Counter[int](), Counter[int]()
        self.first_tags = self._first_tags()
        for index, specs in coming.items():
            route, window = self.routes[index], self.messages.window(index)
            rank, line = seat.rank(route.source.block), self._comm(route)
            for way in range(min(window, len(specs))):
                line.post_recv(rank, self._tag(index, way), specs[way::window])

    def receive(self, action: Action) -> dict[str, Tensor]:
        """Return by route name what the routes bring to `action`; the caller owns it.

        What comes once per update is there for all its micro-batches: it must not be written to.
        """
        told: dict[str, Tensor] = {}
        for index in self.messages.incoming(action):
            route, tensor = self.routes[index], self._receive_route(index, action)
            told[route.name] = tensor
            if route.once_per_update:
                self._keep_for_update(action, route.name, tensor)
        if action.micro > 0 and self.update_messages:
            told |= self.update_messages.get(_action_point(action), {})
        return told

    def send(self, action: Action, block: Block, micro_batch: MicroBatch | None) -> None:
        """Send what leaves `action`, without waiting for its arrival."""
        for index in self.messages.outgoing(action):
            route = self.routes[index]
            tensor = self.objective.make_message(route, block, micro_batch)
            rows = 0 if micro_batch is None else len(micro_batch.targets)
            due, found = self._message_spec(route, rows), (tensor.shape, tensor.dtype)
            assert found == due, f"{route}: `tell` gave {found}, `shape` says {due}"
            tensor = self.wire_format.encode(route, tensor)
            if micro_batch is None:  # a weight, that the next update may overwrite under way
                tensor = tensor.clone()
            if self.messages.is_local(index):
                copy = tensor.clone(memory_format=torch.contiguous_format)
                self.local_messages[index, action.update, action.micro] = copy
            else:
                tag = self._tag(index, self.sent_counts[index])
                self.sent_counts[index] += 1
                self._comm(route).isend(tensor, self.position.rank(route.target.block), tag)

    def close(self) -> None:
        """Wait until everything that was sent has arrived."""
        self.groups.forward.flush()
        self.groups.backward.flush()
        self.update_messages.clear()

    def _comm(self, route: Route) -> Comm:
        ahead = route.target.block >= route.source.block
        return self.groups.forward if ahead else self.groups.backward

    def _receive_route(self, index: int, action: Action) -> Tensor:
        route, origin = self.routes[index], self.messages.source_micro_batch(index, action)
        if self.messages.is_local(index):
            tensor = self.local_messages.pop((index, *origin))
        else:
            tag = self._tag(index, self.received_counts[index])
            self.received_counts[index] += 1
            came = self._comm(route).recv(self.position.rank(route.source.block), tag)
            assert isinstance(came, Tensor)
            tensor = came
        return self.wire_format.decode(
            route, tensor, self._message_spec(route, self._message_rows(*origin))
        )

    def _message_spec(self, route: Route, rows: int) -> TensorSpec:
        return self.objective.message_spec(route, self.block_specs, rows)

    def _message_rows(self, update: int, micro: int) -> int:
        """Return the samples of a micro-batch, 0 of a message that belongs to none."""
        return self.row_count(update, micro) if micro >= 0 else 0

    def _tag(self, index: int, number: int) -> int:
        """Return the tag of a route's message: a route with a lag has as many as may be waiting."""
        return self.first_tags[index] + number % self.messages.window(index)

    def _first_tags(self) -> list[int]:
        """Return the first tag of each route, counted for each pair of stages by itself."""
        used: Counter[tuple[int, int]] = Counter()
        first = []
        for index in range(len(self.routes)):
            pair = self.messages.source_stage(index), self.messages.target_stage(index)
            first.append(used[pair])
            used[pair] += self.messages.window(index)
        return first

    def _keep_for_update(self, action: Action, name: str, tensor: Tensor) -> None:
        """Keep what came for a whole update, in place of what came for the one before."""
        self.update_messages.setdefault(_action_point(action), {})[name] = tensor


def _action_point(action: Action) -> tuple[int, str, int]:
    """Return where an action stands, `I` in the place of `B`."""
    return action.block, "B" if action.kind == "I" else action.kind, action.pass_
