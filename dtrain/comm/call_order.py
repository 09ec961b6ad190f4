"""CallOrder: numbers the collectives of a group; in debug mode, compares the calls of all ranks.

Invariant: a collective has the same number, and so the same tags, on all ranks. In debug mode it
starts only after every rank has announced the same call; the error names a rank that differs, or
that calls nothing in time.

::

    rank 0  7 mean_ fc1.weight (4, 3) float32  --+
    rank 1  7 mean_ fc1.weight (4, 3) float32  --+--> all equal: the mean starts
    rank 2  7 mean_ fc1.weight (3, 4) float32  --+--> else `CollectiveMismatch` on all ranks: rank 2

Each rank sends its call to each other rank: n (n - 1) pairs of small messages per collective, not
counted as payload. A collective that otherwise starts without a wait then waits for all ranks.
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
"""Tags of one collective; the last one compares the calls of ranks."""


Tensors = Sequence[Tensor] | Mapping[str, Tensor]
"""Tensors of a collective; the errors of the debug mode show their names if there are any."""


@final
class CollectiveMismatch(RuntimeError):
    """Ranks of a group call different collectives, or one of them calls none."""


class Call(NamedTuple):
    """One rank's call of a collective, as sent in JSON.

    Attributes
    ----------
    number : int
        Position among the collectives of its group, from 1.
    operation : str
        Name of the method, and the root if there is one.
    tensors : list of str
        Number, name, shape and dtype of each tensor.
    """

    number: int
    operation: str
    tensors: list[str]

    def describe(self, group: str) -> str:
        """Return operation and number as text."""
        return f"{self.operation} (collective {self.number} of {group})"

    def describe_mismatch(self, other: Call, group: str) -> tuple[str, str]:
        """Return texts of this call and of `other`, with the first tensor that differs, if any."""
        if (self.number, self.operation) != (other.number, other.operation):
            return self.describe(group), other.describe(group)
        pairs = enumerate(zip(self.tensors, other.tensors, strict=False))
        first = next(
            (
                number
                for number, (this_tensor, other_tensor) in pairs
                if this_tensor != other_tensor
            ),
            min(len(self.tensors), len(other.tensors)),
        )
        return (
            f"{self.describe(group)} with {self._tensor_at(first)}",
            f"it with {other._tensor_at(first)}",
        )

    def _tensor_at(self, index: int) -> str:
        return self.tensors[index] if self.tensors[index:] else f"no tensor {index}"


@final
class CallOrder:
    """The collectives of one group, on one of its ranks."""

    def __init__(self, transport: Transport, context: CommContext) -> None:
        self._transport = transport
        self._context = context
        self._last_call = Call(0, "nothing", [])
        # Kept after an error, since the backend may still write into the buffers of open steps.
        self._open_steps: list[Steps] = []

    def reserve_tags(self, operation: str, tensors: Tensors = ()) -> int:
        """Return the first tag of the next collective. Collective over the group.

        Tags follow program order and repeat: with fixed ones, two collectives in flight would
        receive each other's messages.

        Raises
        ------
        CollectiveMismatch
            In debug mode, if another rank calls something else, or nothing in time.
        """
        number, timeout_s = self._last_call.number + 1, self._context.debug_timeout_s
        tag = USER_TAGS + TAGS_PER_CALL * (number % (USER_TAGS // TAGS_PER_CALL))
        call = Call(number, operation, [])
        if timeout_s is not None and self._transport.size > 1:
            call = Call(number, operation, list(describe_tensors(tensors)))
            self._compare(call, tag + TAGS_PER_CALL - 1, timeout_s)
        self._last_call = call
        return tag

    def _compare(self, call: Call, tag: int, timeout_s: float) -> None:
        """Exchange the calls of all ranks and raise if they differ. Collective over the group."""
        transport = self._transport
        calls = {transport.rank: call}
        data = np.frombuffer(json.dumps(call).encode(), dtype=np.uint8)
        receives = [self._recv_call(calls, rank, tag) for rank in transport.other_ranks()]
        self._open_steps = [self._send_call(data, tag), *receives]
        try:
            if not self._advance():
                description = f"all ranks to call {call.describe(transport.name)}"
                backend = transport.backend
                self._context.wait(
                    self._advance, description, backend.world_ranks, backend, timeout_s
                )
        except CommTimeout as timeout:
            raise CollectiveMismatch(self._timeout_message(call, calls, timeout)) from timeout
        for rank in range(1, transport.size):
            if calls[rank] != calls[0]:
                rank_text, first_text = calls[rank].describe_mismatch(calls[0], transport.name)
                raise CollectiveMismatch(
                    f"{self._describe_rank(rank)} calls {rank_text}, where rank 0 calls "
                    f"{first_text}: all ranks of a group must make the same calls, in the same "
                    "order"
                )

    def _advance(self) -> bool:
        """Advance the open steps; return whether all are done."""
        self._open_steps = [steps for steps in self._open_steps if next(steps, self) is not self]
        return not self._open_steps

    def _send_call(self, data: Bytes, tag: int) -> Steps:
        """Send this rank's call to all others: its length, then its text."""
        transport = self._transport
        size = np.array([data.size], dtype=np.int64).view(np.uint8)
        yield from wait_all(
            *[
                transport.isend(part, rank, tag, False)
                for rank in transport.other_ranks()
                for part in (size, data)
            ]
        )

    def _recv_call(self, calls: dict[int, Call], rank: int, tag: int) -> Steps:
        """Receive the call of another rank into `calls`."""
        size = np.zeros(1, dtype=np.int64)
        yield from wait_all(self._transport.irecv(size.view(np.uint8), rank, tag))
        data = np.empty(int(size[0]), dtype=np.uint8)
        yield from wait_all(self._transport.irecv(data, rank, tag))
        calls[rank] = Call(*json.loads(data.tobytes()))

    def _timeout_message(self, call: Call, calls: Mapping[int, Call], timeout: CommTimeout) -> str:
        transport = self._transport
        missing_ranks = " and ".join(
            self._describe_rank(rank) for rank in transport.other_ranks() if rank not in calls
        )
        return (
            f"{missing_ranks} has not called {call.describe(transport.name)}, as rank "
            f"{transport.rank} has; the last call of all ranks there was "
            f"{self._last_call.describe(transport.name)} ({timeout})"
        )

    def _describe_rank(self, rank: int) -> str:
        """Return group rank and world rank as text that lets a person find the process."""
        world_rank = self._transport.backend.world_ranks[rank]
        return f"rank {rank} of {self._transport.name} (world rank {world_rank})"


def unnamed_tensors(tensors: Tensors) -> Sequence[Tensor]:
    """Return the tensors without their names."""
    return list(tensors.values()) if isinstance(tensors, Mapping) else tensors


def describe_tensors(tensors: Tensors) -> Iterator[str]:
    """Yield number, name, shape and dtype of each tensor as text."""
    names = list(tensors) if isinstance(tensors, Mapping) else [""] * len(tensors)
    for number, (name, tensor) in enumerate(zip(names, unnamed_tensors(tensors), strict=True)):
        shape: Any = "nested" if tensor.is_nested else tuple(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield " ".join(filter(None, [f"tensor {number}", name and f"'{name}'", f"{shape} {dtype}"]))
