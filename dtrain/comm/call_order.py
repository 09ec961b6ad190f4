"""Roll: numbers the collectives of a group and, in debug mode, calls the roll before each.

Invariant: a call gets the same number, and so the same tags, on all ranks. In debug mode none
begins before every rank has said that it makes the same one; who does not is named, in time.

::

    rank 0  7 mean_ fc1.weight (4, 3) float32  --+
    rank 1  7 mean_ fc1.weight (4, 3) float32  --+--> all alike: the mean begins
    rank 2  7 mean_ fc1.weight (3, 4) float32  --+--> else: a `Discord` on all ranks, naming rank 2

Each rank tells each other: n (n - 1) pairs of small messages per call, not counted as payload. A
collective that is started without a wait elsewhere waits for all ranks here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
from torch import Tensor

from dtrain.comm.backends.base import Bytes, CommTimeout
from dtrain.comm.channels import USER_TAGS
from dtrain.comm.context import CommContext
from dtrain.comm.transport import Transport
from dtrain.comm.tree import Steps, wait_all

TAGS_PER_CALL = 64
"""Tags that one collective may use; the last of them is the roll's."""


Tensors = Sequence[Tensor] | Mapping[str, Tensor]
"""What a collective is given: with names, those stand in the errors of the debug mode."""


@final
class CollectiveMismatch(RuntimeError):
    """Ranks of a group do not make the same call, or one of them makes none."""


class Call(NamedTuple):
    """One rank's call of a collective, as JSON has it.

    Attributes
    ----------
    number : int
        Which collective of its group, from 1.
    verb : str
        What is done, and from which root.
    tensors : list of str
        Number, name, shape and dtype of each, in words.
    """

    number: int
    operation: str
    tensors: list[str]

    def describe(self, group: str) -> str:
        """Return what is called where."""
        return f"{self.operation} (collective {self.number} of {group})"

    def describe_mismatch(self, other: Call, group: str) -> tuple[str, str]:
        """Return in words what it is, and what `other` is, where they differ first."""
        if self[:2] != other[:2]:
            return self.describe(group), other.describe(group)
        both = self.tensors, other.tensors
        first = next(
            (n for n, pair in enumerate(zip(*both, strict=False)) if pair[0] != pair[1]),
            min(map(len, both)),
        )
        return (
            f"{self.describe(group)} with {self._tensor_at(first)}",
            f"it with {other._tensor_at(first)}",
        )

    def _tensor_at(self, index: int) -> str:
        return self.tensors[index] if self.tensors[index:] else f"no tensor {index}"


@final
class CallOrder:
    """The collectives of one group, seen by one of its ranks."""

    def __init__(self, transport: Transport, context: CommContext) -> None:
        self._transport, self._context = transport, context
        self._last_call = Call(0, "nothing", [])
        self._open_steps: list[Steps] = []  # kept after an error: the wire may still write there

    def reserve_tags(self, operation: str, tensors: Tensors = ()) -> int:
        """Reserve the tags of the next collective and return the first. Collective.

        They go round in program order: fixed ones cross-match as soon as two are in flight.

        Raises
        ------
        Discord
            In debug mode, where another rank calls something else, or nothing in time.
        """
        number, limit_s = self._last_call.number + 1, self._context.debug_timeout_s
        call, tag = (
            Call(number, operation, []),
            USER_TAGS + TAGS_PER_CALL * (number % (USER_TAGS // TAGS_PER_CALL)),
        )
        if limit_s is not None and self._transport.size > 1:
            call = Call(number, operation, list(describe_tensors(tensors)))
            self._compare(call, tag + TAGS_PER_CALL - 1, limit_s)
        self._last_call = call
        return tag

    def _compare(self, call: Call, tag: int, timeout_s: float) -> None:
        line = self._transport
        heard = {line.rank: call}
        item = np.frombuffer(json.dumps(call).encode(), dtype=np.uint8)
        self._open_steps = [
            self._send_call(item, tag),
            *(self._recv_call(heard, r, tag) for r in line.other_ranks()),
        ]

        def done() -> bool:
            self._open_steps = [
                steps for steps in self._open_steps if next(steps, self) is not self
            ]
            return not self._open_steps

        what = f"the roll of {call.describe(line.name)}"
        try:
            if not done():
                self._context.wait(done, what, line.backend.world_ranks, line.backend, timeout_s)
        except CommTimeout as stall:
            raise CollectiveMismatch(self._timeout_message(call, heard, stall)) from stall
        first = heard[0]
        for rank in range(1, line.size):
            if heard[rank] != first:
                theirs, ours = heard[rank].describe_mismatch(first, line.name)
                raise CollectiveMismatch(
                    f"{self._describe_rank(rank)} calls {theirs}, where rank 0 calls {ours}: all ranks of a "
                    "group make the same calls, in the same order"
                )

    def _send_call(self, item: Bytes, tag: int) -> Steps:
        """Tell all others my call: its length, then itself."""
        line, size = self._transport, np.array([item.size], dtype=np.int64)
        parts = size.view(np.uint8), item
        told = [line.isend(part, rank, tag, False) for rank in line.other_ranks() for part in parts]
        yield from wait_all(*told)

    def _recv_call(self, calls: dict[int, Call], rank: int, tag: int) -> Steps:
        """Learn the call of another rank."""
        size = np.zeros(1, dtype=np.int64)
        yield from wait_all(self._transport.irecv(size.view(np.uint8), rank, tag))
        item = np.empty(int(size[0]), dtype=np.uint8)
        yield from wait_all(self._transport.irecv(item, rank, tag))
        calls[rank] = Call(*json.loads(item.tobytes()))

    def _timeout_message(self, call: Call, calls: Mapping[int, Call], timeout: CommTimeout) -> str:
        name, missing = (
            self._transport.name,
            [r for r in self._transport.other_ranks() if r not in calls],
        )
        who = " and ".join(map(self._describe_rank, missing))
        return (
            f"{who} has not called {call.describe(name)}, as rank {self._transport.rank} has; the last "
            f"call of all ranks there was {self._last_call.describe(name)} ({timeout})"
        )

    def _describe_rank(self, rank: int) -> str:
        """Return a rank, so that a person finds the process."""
        wire = self._transport.backend
        return f"rank {rank} of {self._transport.name} (world rank {wire.world_ranks[rank]})"


def unnamed_tensors(tensors: Tensors) -> Sequence[Tensor]:
    """Return the tensors without their names."""
    return list(tensors.values()) if isinstance(tensors, Mapping) else tensors


def describe_tensors(tensors: Tensors) -> Iterator[str]:
    """Yield number, name, shape and dtype of each tensor."""
    names = list(tensors) if isinstance(tensors, Mapping) else [""] * len(tensors)
    for number, (name, tensor) in enumerate(zip(names, unnamed_tensors(tensors), strict=True)):
        shape: Any = "nested" if tensor.is_nested else tuple(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield " ".join(filter(None, [f"tensor {number}", name and f"'{name}'", f"{shape} {dtype}"]))
