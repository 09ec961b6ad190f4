"""Boundaries between ranks that never stall: late outputs are left out, late inputs replayed.

Invariant: a message says of which micro-batch it is, so that a block trains an input with its own
targets. At the end of a segment every sender sends an end mark, and every receiver takes all that
was sent; so no message and no buffer outlives a segment.

::

    sender     credit within the patience?   send : leave out
    receiver   arrived within the patience?  take it, keep it in the buffer : replay from the buffer
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast, final

import torch
from torch import Tensor

from dtrain.comm.buffers import TensorSpec
from dtrain.comm.channels import RecvChannel, SendChannel
from dtrain.comm.communicator import Comm

END = -1
"""The update of an end mark."""


class Source(NamedTuple):
    """The micro-batch of an input: update of the segment, and micro-batch in it."""

    update: int
    micro: int


@dataclass
class _Kept:
    """An input in the buffer, and how often it was trained on."""

    source: Source
    payload: Tensor
    rows: int
    uses: int = 0


@final
class ReplaySender:
    """Sends the outputs of a block to another rank, or leaves them out.

    Parameters
    ----------
    spec : (shape, dtype)
        Of the largest message; smaller ones are padded.
    patience_s : float
        Seconds to wait for a credit.
    """

    def __init__(
        self, comm: Comm, dest: int, tag: int, spec: TensorSpec, patience_s: float
    ) -> None:
        self._comm = comm
        self._dest = dest
        self._channel: SendChannel = comm.send_channel(dest, tag)
        self._spec = spec
        self._patience_s = patience_s

    def send(self, tensor: Tensor, source: Source) -> bool:
        """Send an output, and return whether there was a credit."""
        has_credit = self._has_credit()
        if not has_credit:
            _wait_at_most(self._comm, self._has_credit, self._patience_s, "a credit", self._dest)
        if not self._has_credit():
            return False
        payload = tensor.new_zeros(self._spec[0])
        payload[: len(tensor)] = tensor
        self._channel.send((payload, torch.tensor([*source, len(tensor)])))
        return True

    def end(self) -> None:
        """Send the end mark; waits for a credit."""
        shape, dtype = self._spec
        with self._comm.without_counting():
            mark = torch.tensor([END, 0, 0])
            self._channel.send((torch.zeros(shape, dtype=dtype), mark))

    def _has_credit(self) -> bool:
        self._channel.release_completed()
        return len(self._channel) < self._comm.credits


@final
class ReplayReceiver:
    """Receives the inputs of a block from another rank, or replays them.

    Parameters
    ----------
    spec : (shape, dtype)
        Of the largest message.
    buffer : int
        Inputs that are kept.
    patience_s : float
        Seconds to wait for an input.

    Attributes
    ----------
    peak_bytes : int
        The most bytes of inputs that were kept at once.
    """

    def __init__(
        self,
        comm: Comm,
        source: int,
        tag: int,
        spec: TensorSpec,
        buffer: int,
        patience_s: float,
    ) -> None:
        self._comm = comm
        self._source = source
        self._channel: RecvChannel = comm.recv_channel(source, tag)
        self._specs = (spec, ((3,), torch.int64))
        self._patience_s = patience_s
        self._kept: deque[_Kept] = deque(maxlen=buffer)
        self._ended = False
        self.peak_bytes = 0
        self._channel.post_recv([self._specs])

    def receive(self) -> tuple[Tensor, Source]:
        """Return an input, in memory of its own, and its micro-batch."""
        arrived = self._next()
        if arrived is not None:
            self._kept.append(arrived)
            kept_bytes = sum(kept.payload.nbytes for kept in self._kept)
            self.peak_bytes = max(self.peak_bytes, kept_bytes)
        kept = arrived or min(reversed(self._kept), key=lambda kept: kept.uses)
        kept.uses += 1
        return kept.payload[: kept.rows].clone(), kept.source

    def drain(self) -> None:
        """Take all that was sent, up to the end mark, and forget the buffer."""
        while not self._ended:
            self._take()
        self._kept.clear()

    def _next(self) -> _Kept | None:
        """Return the next input; None if it is late, and the buffer has one."""
        if self._ended:
            return None
        if self._kept and self._channel.is_open():
            _wait_at_most(
                self._comm,
                lambda: not self._channel.is_open(),
                self._patience_s,
                "an input",
                self._source,
            )
            if self._channel.is_open():
                return None
        return self._take()

    def _take(self) -> _Kept | None:
        """Wait for the next message and return it, None at the end mark."""
        payload, header = cast(tuple[Tensor, Tensor], self._channel.receive())
        update, micro, rows = header.tolist()
        if update == END:
            self._ended = True
            return None
        self._channel.post_recv([self._specs])
        return _Kept(Source(update, micro), payload, rows)


def _wait_at_most(
    comm: Comm, is_done: Callable[[], bool], patience_s: float, noun: str, peer: int
) -> None:
    """Wait until `is_done()`, but no longer than the patience."""
    until = time.monotonic() + patience_s
    comm.progress()
    comm.wait(
        lambda: is_done() or time.monotonic() >= until, f"{noun} within {patience_s:g} s", peer
    )
