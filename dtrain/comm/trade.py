"""Trade: a tensor from each rank to each other, at once (all-to-all).

Invariant: nothing is computed here; what a rank is given has the shape and dtype of what it would
have given itself, so nobody has to ask for sizes.

    rank 0 has a0 b0 c0            rank 0 gets a0 a1 a2
    rank 1 has a1 b1 c1     ->     rank 1 gets b0 b1 b2
    rank 2 has a2 b2 c2            rank 2 gets c0 c1 c2

Sent, for n ranks: (n - 1) parts each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor

from dtrain.comm.dock import Dock, dense
from dtrain.comm.line import Line
from dtrain.comm.memory import raw
from dtrain.comm.wire import Request, joined


@final
class Trade(Request):
    """An all-to-all in flight; made by `Comm.iall_to_all`, which says what it means."""

    def __init__(
        self,
        line: Line,
        parts: Sequence[Tensor],
        tag: int,
        dock: Dock,
        wait: Callable[[Callable[[], bool], str], None],
    ) -> None:
        if len(parts) != line.size:
            raise ValueError(f"all_to_all of {len(parts)} parts among {line.size} ranks")
        for number, part in enumerate(parts):
            dense(part, "all_to_all", number)
        self._line, self._tag, self._dock, self._wait = line, tag, dock, wait
        self.since = time.perf_counter()
        self._parts, own = list(parts), parts[line.rank]
        others = line.others()
        self._landed = {rank: dock.land(own.shape, own.dtype) for rank in others}
        self._lowered = [dock.lower(parts[rank]) for rank in others]  # kept while it is sent
        counted = line.traffic.on
        pulls = [line.pull(raw(self._landed[rank]), rank, tag) for rank in others]
        sends = zip(others, self._lowered, strict=True)
        self._open = joined([*pulls, *(line.push(raw(p), r, tag, counted) for r, p in sends)])

    def test(self, whole: bool = False) -> bool:
        """Return whether all parts have come and gone."""
        return self._open.test()

    def wait(self) -> list[Tensor]:
        """Return, once all have come, what each rank gave me; my own part is not copied."""
        if not self.test():
            name, tag = self._line.name, self._tag
            self._wait(self.test, f"{self.words()} of {name} with tag {tag}")
        landed, dock, me = self._landed, self._dock, self._line.rank
        ranks = range(self._line.size)
        return [self._parts[r] if r == me else dock.lift(landed[r]) for r in ranks]

    def words(self) -> str:
        """Return what it is, for people."""
        return f"an exchange of {len(self._parts)} parts"
