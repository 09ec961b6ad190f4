"""ReplayRouter: the messages of one rank under `stream-replay`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, final

from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.engine.replay import ReplayReceiver, ReplaySender, Source
from dtrain.engine.router import MessageRouter
from dtrain.objectives.messages import message_spec
from dtrain.schedules.actions import Action
from dtrain.schedules.messages import MessageTable
from dtrain.schedules.stream_replay import StreamReplay


@final
class ReplayRouter(MessageRouter):
    """Sends the outputs of blocks to the next ones, and replays late inputs.

    Parameters
    ----------
    schedule : StreamReplay
        Size of the buffers, and patience.
    """

    def __init__(self, *arguments: Any, schedule: StreamReplay) -> None:
        super().__init__(*arguments)
        self._schedule = schedule
        self._senders: dict[int, ReplaySender] = {}
        self._receivers: dict[int, ReplayReceiver] = {}
        self._sources: dict[tuple[int, int, int], Source] = {}
        self._left_out: set[tuple[int, int, int]] = set()

    def open(
        self,
        plan: Iterable[Action],
        micro_batches: Sequence[int],
        row_count: Callable[[int, int], int],
    ) -> None:
        """Open the boundaries of a segment; messages are as large as its largest micro-batch."""
        place, stage, comm = self.position.place, self.position.stage, self.groups.forward
        self.messages = MessageTable(self.routes, place, stage, micro_batches)
        self._sources, self._left_out = {}, set()
        self.links, self._senders, self._receivers = {}, {}, {}
        largest = max(
            (row_count(u, m) for u, count in enumerate(micro_batches) for m in range(count)),
            default=0,
        )
        patience_s, buffer = self._schedule.patience_s, self._schedule.buffer
        first_tags = self._first_tags()
        for index, route in enumerate(self.routes):
            spec = cache(partial(message_spec, self.objective, route, self.block_specs))
            source, target = route.source.block, route.target.block
            if self.messages.is_local(index):
                if self.messages.source_stage(index) == stage:
                    self.links[index] = self._make_link(index, spec, first_tags[index], ())
            elif not largest:
                continue
            elif self.messages.source_stage(index) == stage:
                dest = self.position.rank(target)
                self._senders[source] = ReplaySender(
                    comm, dest, first_tags[index], spec(largest), patience_s
                )
            elif self.messages.target_stage(index) == stage:
                self._receivers[target] = ReplayReceiver(
                    comm,
                    self.position.rank(source),
                    first_tags[index],
                    spec(largest),
                    buffer,
                    patience_s,
                )

    def receive(self, action: Action) -> dict[str, Tensor]:
        """Return the input of a forward, by route name, and remember its micro-batch."""
        if action.kind != "F":
            return {}
        receiver = self._receivers.get(action.block)
        if receiver is not None:
            (index,) = self.messages.incoming(action)
            tensor, self._sources[action.key] = receiver.receive()
            return {self.routes[index].name: tensor}
        before = self._sources.get((action.block - 1, action.update, action.micro))
        self._sources[action.key] = before or Source(action.update, action.micro)
        return super().receive(action)

    def send(self, action: Action, block: Block, micro_batch: MicroBatch | None) -> None:
        """Send the output of a forward, or leave it out."""
        sender = self._senders.get(action.block) if action.kind == "F" else None
        if sender is None:
            super().send(action, block, micro_batch)
            return
        (index,) = self.messages.outgoing(action)
        tensor = self.objective.make_message(self.routes[index], block, micro_batch)
        if not sender.send(tensor, self._sources[action.key]):
            self._left_out.add(action.key)

    def source_of(self, action: Action) -> tuple[int, int]:
        """Return update and micro-batch of the input that a forward has received."""
        return self._sources[action.key]

    def forward_metrics(self, action: Action) -> dict[str, float]:
        """Return the updates by which the input is old, and 1 for an output that was left out."""
        metrics = {}
        if action.block in self._receivers:
            metrics["staleness"] = max(0.0, action.update - self._sources[action.key].update)
        if action.block in self._senders:
            metrics["left_out"] = float(action.key in self._left_out)
        return metrics

    def end_sends(self) -> None:
        """Tell the next ranks that the segment has no more outputs."""
        for sender in self._senders.values():
            sender.end()

    def close(self) -> None:
        """Take all that was sent to this rank, and wait until everything it sent has arrived."""
        for receiver in self._receivers.values():
            receiver.drain()
        super().close()

    @property
    def kept_bytes(self) -> int:
        """The bytes of the inputs that the buffers of this segment kept at most."""
        return sum(receiver.peak_bytes for receiver in self._receivers.values())
