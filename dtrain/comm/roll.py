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

from dtrain.comm.desk import TAGS
from dtrain.comm.family import Family
from dtrain.comm.line import Line
from dtrain.comm.tree import Steps, until
from dtrain.comm.wire import Bytes, Stall

SPAN = 64
"""Tags that one collective may use; the last of them is the roll's."""

Tensors = Sequence[Tensor] | Mapping[str, Tensor]
"""What a collective is given: with names, those stand in the errors of the debug mode."""


@final
class Discord(RuntimeError):
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
    verb: str
    tensors: list[str]

    def words(self, group: str) -> str:
        """Return what is called where."""
        return f"{self.verb} (collective {self.number} of {group})"

    def against(self, other: Call, group: str) -> tuple[str, str]:
        """Return in words what it is, and what `other` is, where they differ first."""
        if self[:2] != other[:2]:
            return self.words(group), other.words(group)
        both = self.tensors, other.tensors
        first = next(
            (n for n, pair in enumerate(zip(*both, strict=False)) if pair[0] != pair[1]),
            min(map(len, both)),
        )
        return f"{self.words(group)} with {self._at(first)}", f"it with {other._at(first)}"

    def _at(self, place: int) -> str:
        return self.tensors[place] if self.tensors[place:] else f"no tensor {place}"


@final
class Roll:
    """The collectives of one group, seen by one of its ranks."""

    def __init__(self, line: Line, family: Family) -> None:
        self._line, self._family = line, family
        self._last = Call(0, "nothing", [])
        self._open: list[Steps] = []  # kept after an error: the wire may still write there

    def call(self, verb: str, tensors: Tensors = ()) -> int:
        """Reserve the tags of the next collective and return the first. Collective.

        They go round in program order: fixed ones cross-match as soon as two are in flight.

        Raises
        ------
        Discord
            In debug mode, where another rank calls something else, or nothing in time.
        """
        number, limit_s = self._last.number + 1, self._family.limit_s
        call, tag = Call(number, verb, []), TAGS + SPAN * (number % (TAGS // SPAN))
        if limit_s is not None and self._line.size > 1:
            call = Call(number, verb, list(described(tensors)))
            self._compare(call, tag + SPAN - 1, limit_s)
        self._last = call
        return tag

    def _compare(self, mine: Call, tag: int, limit_s: float) -> None:
        line = self._line
        heard = {line.rank: mine}
        item = np.frombuffer(json.dumps(mine).encode(), dtype=np.uint8)
        self._open = [self._tell(item, tag), *(self._hear(heard, r, tag) for r in line.others())]

        def done() -> bool:
            self._open = [steps for steps in self._open if next(steps, self) is not self]
            return not self._open

        what = f"the roll of {mine.words(line.name)}"
        try:
            if not done():
                self._family.wait(done, what, line.wire.world, line.wire, limit_s)
        except Stall as stall:
            raise Discord(self._silence(mine, heard, stall)) from stall
        first = heard[0]
        for rank in range(1, line.size):
            if heard[rank] != first:
                theirs, ours = heard[rank].against(first, line.name)
                raise Discord(
                    f"{self._who(rank)} calls {theirs}, where rank 0 calls {ours}: all ranks of a "
                    "group make the same calls, in the same order"
                )

    def _tell(self, item: Bytes, tag: int) -> Steps:
        """Tell all others my call: its length, then itself."""
        line, size = self._line, np.array([item.size], dtype=np.int64)
        parts = size.view(np.uint8), item
        told = [line.push(part, rank, tag, False) for rank in line.others() for part in parts]
        yield from until(*told)

    def _hear(self, heard: dict[int, Call], rank: int, tag: int) -> Steps:
        """Learn the call of another rank."""
        size = np.zeros(1, dtype=np.int64)
        yield from until(self._line.pull(size.view(np.uint8), rank, tag))
        item = np.empty(int(size[0]), dtype=np.uint8)
        yield from until(self._line.pull(item, rank, tag))
        heard[rank] = Call(*json.loads(item.tobytes()))

    def _silence(self, mine: Call, heard: Mapping[int, Call], stall: Stall) -> str:
        name, missing = self._line.name, [r for r in self._line.others() if r not in heard]
        who = " and ".join(map(self._who, missing))
        return (
            f"{who} has not called {mine.words(name)}, as rank {self._line.rank} has; the last "
            f"call of all ranks there was {self._last.words(name)} ({stall})"
        )

    def _who(self, rank: int) -> str:
        """Return a rank, so that a person finds the process."""
        wire = self._line.wire
        return f"rank {rank} of {self._line.name} (world rank {wire.world[rank]})"


def plain(tensors: Tensors) -> Sequence[Tensor]:
    """Return the tensors without their names."""
    return list(tensors.values()) if isinstance(tensors, Mapping) else tensors


def described(tensors: Tensors) -> Iterator[str]:
    """Yield number, name, shape and dtype of each tensor."""
    names = list(tensors) if isinstance(tensors, Mapping) else [""] * len(tensors)
    for number, (name, tensor) in enumerate(zip(names, plain(tensors), strict=True)):
        shape: Any = "nested" if tensor.is_nested else tuple(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield " ".join(filter(None, [f"tensor {number}", name and f"'{name}'", f"{shape} {dtype}"]))
