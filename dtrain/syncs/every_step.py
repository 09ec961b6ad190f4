"""Every step: the mean gradient of all replicas before each update, begun while it is computed.

Sends 2 (n - 1) / n times the block's parameters per replica and update; staleness 0.
With one replica it is the identity.

The gradients of the last layers come first in a backward, so buckets of parameters, from the last
to the first, begin their means as soon as they are complete, in that order on all replicas::

    backward   |  layer 3  |  layer 2  |  layer 1  |
    means                  |   bucket of 3   |   bucket of 2 and 1   |  update

Source of the buckets: Li et al. 2020, "PyTorch Distributed", arXiv 2006.15704, section 3.2.3.

Invariant: replicas that start equal stay equal bit for bit, because all apply the same sum, and no
sum follows from how the gradients are cut into buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dtrain.block import Block
from dtrain.comm.comm import Comm
from dtrain.comm.mean import Mean
from dtrain.syncs.sync import Clock, Sync, averaged

BUCKET_BYTES = 4 << 20
"""Least size of a bucket, the last excepted: pieces of a mean are at most 1 MiB."""


@dataclass
class EveryStep(Sync):
    """All-reduce of gradients, weighted by samples: a mean over samples."""

    apart: ClassVar[bool] = False

    def open(self, block: Block, replicas: Comm) -> None:
        """Take the block and the communicator of its replicas."""
        super().open(block, replicas)
        self._buckets = buckets(block.values())
        self._heard: set[int] = set()
        self._means: list[Mean] = []

    def hear(self, parameter: Tensor, weight: float) -> None:
        """Start the means whose gradients are complete; go on with those under way."""
        if self.replicas.size == 1 or parameter.device.type != "cpu":
            return  # an accelerator's hooks run in threads of their own, and MPI in one alone
        self._heard.add(id(parameter))
        own = self.block.parameters
        for names in self._buckets[len(self._means) :]:
            if not all(id(own[name]) in self._heard for name in names):
                break
            self._start({name: own[name].grad for name in names}, weight)
        if self._means:
            self.replicas.progress()

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:
        """Replace each gradient by ``sum over replicas of weight * gradient``."""
        if self.replicas.size == 1:
            return
        named = self.block.named(gradients)
        for names in self._buckets[len(self._means) :]:
            self._start({name: named[name] for name in names}, weight)
        for mean in self._means:
            mean.wait()
        self._means, self._heard = [], set()

    def _start(self, gradients: Mapping[str, Tensor | None], weight: float) -> None:
        whole = {name: each for name, each in gradients.items() if each is not None}
        self._means.append(self.replicas.imean_(whole, weight))

    def after_update(self, clock: Clock) -> None:
        """Nothing: equal gradients moved equal parameters."""

    def end_epoch(self, loss: float) -> None:
        """Nothing follows from the loss."""

    def settle(self) -> None:
        """Average the buffers (batch statistics) over replicas, in place; counts are the first's.

        The counts of replicas may differ by an update that had no sample for one of them.
        """
        buffers = self.block.drifting
        for name, mean in averaged(self.replicas, buffers).items():
            buffers[name].copy_(mean)
        self.replicas.broadcast_([b for b in buffers.values() if not b.is_floating_point()])

    def view(self) -> dict[str, Tensor]:
        """Return the block's own tensors, not copied: all replicas hold the same."""
        return self.block.tensors()

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the block."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing beyond the block."""


def buckets(values: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of `values` from the last to the first, in buckets of `BUCKET_BYTES`.

    >>> import torch
    >>> buckets({name: torch.empty(1 << 19) for name in "abc"})
    [['c', 'b'], ['a']]
    """
    found: list[list[str]] = []
    room = 0
    for name, value in reversed([*values.items()]):
        if room <= 0:
            found.append([])
            room = BUCKET_BYTES
        found[-1].append(name)
        room -= value.nbytes
    return found
