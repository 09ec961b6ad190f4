"""Tree: bytes from one rank to all, and control data from all to all.

Invariant: nothing here blocks; each function is a generator that yields where it cannot go on.

    binomial tree of 8 ranks; the numbers are rounds, ranks are relative to the root

    0 --1--> 4 --2--> 6 --3--> 7
    |        +--3--> 5
    +--2--> 2 --3--> 3
    +--3--> 1
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from dtrain.comm.dock import Dock, apart, dense, settle
from dtrain.comm.line import Line
from dtrain.comm.memory import raw
from dtrain.comm.wire import Bytes, Request

T = TypeVar("T")
Steps = Generator[None, None, None]


def until(*requests: Request) -> Steps:
    """Yield until all requests are complete."""
    for request in requests:
        while not request.test():
            yield


def finish(
    steps: Generator[None, None, T], wait: Callable[[Callable[[], bool], str], None], what: str
) -> T:
    """Run such a generator to its end, inside one wait, and return its result."""
    result: list[T] = []

    def done() -> bool:
        try:
            next(steps)
        except StopIteration as stop:
            result.append(stop.value)
        return bool(result)

    wait(done, what)
    return result[0]


def family(rank: int, size: int, root: int) -> tuple[int | None, list[int]]:
    """Return a rank's parent (None at the root) and its children, the largest subtree first."""
    me = (rank - root) % size
    low = me & -me if me else 1 << size.bit_length()  # the lowest set bit spans my subtree
    parent = None if me == 0 else (me - low + root) % size
    spans = [1 << bit for bit in reversed(range(low.bit_length() - 1))]
    return parent, [(me + span + root) % size for span in spans if me + span < size]


def broadcast(line: Line, data: Bytes, root: int, tag: int, counted: bool) -> Steps:
    """Overwrite `data` by the root's, of the same size, down a binomial tree."""
    parent, children = family(line.rank, line.size, root)
    if parent is not None:
        yield from until(line.pull(data, parent, tag))
    yield from until(*[line.push(data, child, tag, counted) for child in children])


def spread(line: Line, tensors: Sequence[Tensor], root: int, tag: int, dock: Dock) -> Steps:
    """Overwrite tensors by the root's, one after the other."""
    for number, tensor in enumerate(tensors):
        dense(tensor, "broadcast_", number)
    apart(tensors, "broadcast_")
    counted = line.traffic.on
    for tensor in tensors:
        data = dock.lower(tensor)
        yield from broadcast(line, raw(data), root, tag, counted)
        settle(tensor, data)


def gather(line: Line, item: bytes, tag: int) -> Generator[None, None, bytes]:
    """Return the JSON items of all ranks as one JSON list, collected and dealt out by rank 0.

    Sizes are unknown, so each message has a header of eight bytes: first its size, then itself.
    """
    mine = np.frombuffer(item, dtype=np.uint8)
    size = np.array([len(item)], dtype=np.int64)
    if line.rank:
        yield from until(
            line.push(size.view(np.uint8), 0, tag, False), line.push(mine, 0, tag, False)
        )
        joined = b""
    else:
        others = yield from _collect(line, tag)
        joined = b"[" + b",".join([item, *others]) + b"]"
    size[0] = len(joined)
    yield from broadcast(line, size.view(np.uint8), 0, tag, False)
    everything = np.frombuffer(joined, np.uint8) if joined else np.empty(size[0], np.uint8)
    yield from broadcast(line, everything, 0, tag, False)
    return everything.tobytes()


def _collect(line: Line, tag: int) -> Generator[None, None, list[bytes]]:
    sizes = np.zeros((line.size, 1), dtype=np.int64)
    others = line.others()
    yield from until(*[line.pull(sizes[rank].view(np.uint8), rank, tag) for rank in others])
    items = [np.empty(sizes[rank, 0], np.uint8) for rank in others]
    yield from until(
        *[line.pull(item, rank, tag) for rank, item in zip(others, items, strict=True)]
    )
    return [item.tobytes() for item in items]
