"""Broadcast of bytes over a binomial tree, and all-gather of control data.

Invariant: nothing here blocks; each function is a generator that yields until it can continue.

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

from dtrain.comm.backends.base import Bytes, Request
from dtrain.comm.buffers import as_bytes
from dtrain.comm.staging import Staging, copy_back, require_dense, require_disjoint
from dtrain.comm.transport import Transport

T = TypeVar("T")


Steps = Generator[None, None, None]
"""Communication that yields wherever it would have to wait."""


def wait_all(*requests: Request) -> Steps:
    """Yield until all requests are complete."""
    for request in requests:
        while not request.test():
            yield


def run_steps(
    steps: Generator[None, None, T],
    wait: Callable[[Callable[[], bool], str], None],
    description: str,
) -> T:
    """Run a generator to its end, inside one wait, and return its result."""
    result: list[T] = []

    def is_done() -> bool:
        try:
            next(steps)
        except StopIteration as stop:
            result.append(stop.value)
        return bool(result)

    wait(is_done, description)
    return result[0]


def tree_neighbours(rank: int, size: int, root: int) -> tuple[int | None, list[int]]:
    """Return a rank's parent (None at the root) and its children, the largest subtree first."""
    relative = (rank - root) % size
    # The lowest set bit is the span of the subtree.
    span = relative & -relative if relative else 1 << size.bit_length()
    parent = None if relative == 0 else (relative - span + root) % size
    offsets = [1 << bit for bit in reversed(range(span.bit_length() - 1))]
    children = [relative + offset for offset in offsets if relative + offset < size]
    return parent, [(child + root) % size for child in children]


def broadcast_bytes(
    transport: Transport, data: Bytes, root: int, tag: int, count_bytes: bool
) -> Steps:
    """Overwrite `data` by the root's, of the same size. Collective over the group."""
    parent, children = tree_neighbours(transport.rank, transport.size, root)
    if parent is not None:
        yield from wait_all(transport.irecv(data, parent, tag))
    yield from wait_all(*[transport.isend(data, child, tag, count_bytes) for child in children])


def broadcast_tensors(
    transport: Transport, tensors: Sequence[Tensor], root: int, tag: int, staging: Staging
) -> Steps:
    """Overwrite tensors by the root's, one after the other. Collective over the group."""
    for number, tensor in enumerate(tensors):
        require_dense(tensor, "broadcast_", number)
    require_disjoint(tensors, "broadcast_")
    counted = transport.traffic.enabled
    for tensor in tensors:
        data = staging.to_host(tensor)
        yield from broadcast_bytes(transport, as_bytes(data), root, tag, counted)
        copy_back(tensor, data)


def allgather_bytes(transport: Transport, item: bytes, tag: int) -> Generator[None, None, bytes]:
    """Return the JSON items of all ranks as one JSON list. Collective over the group.

    Rank 0 gathers the items and broadcasts the list. Sizes are unknown, so a message of eight bytes
    with the size precedes each item and the list.
    """
    size = np.array([len(item)], dtype=np.int64)
    if transport.rank:
        data = np.frombuffer(item, dtype=np.uint8)
        yield from wait_all(
            transport.isend(size.view(np.uint8), 0, tag, False),
            transport.isend(data, 0, tag, False),
        )
        json_list = b""
    else:
        others = yield from _gather_bytes(transport, tag)
        json_list = b"[" + b",".join([item, *others]) + b"]"
    size[0] = len(json_list)
    yield from broadcast_bytes(transport, size.view(np.uint8), 0, tag, False)
    result = np.frombuffer(json_list, np.uint8) if json_list else np.empty(size[0], np.uint8)
    yield from broadcast_bytes(transport, result, 0, tag, False)
    return result.tobytes()


def _gather_bytes(transport: Transport, tag: int) -> Generator[None, None, list[bytes]]:
    """Return the items of all ranks but 0, on rank 0."""
    sizes = np.zeros((transport.size, 1), dtype=np.int64)
    others = transport.other_ranks()
    yield from wait_all(
        *[transport.irecv(sizes[rank].view(np.uint8), rank, tag) for rank in others]
    )
    items = [np.empty(sizes[rank, 0], np.uint8) for rank in others]
    yield from wait_all(
        *[transport.irecv(item, rank, tag) for rank, item in zip(others, items, strict=True)]
    )
    return [item.tobytes() for item in items]
