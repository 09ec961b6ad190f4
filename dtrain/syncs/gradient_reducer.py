"""Early: means of gradients that begin while the backward still computes others.

Invariant: buckets begin in one order on all replicas, whoever hears of which gradient first; no sum
follows from how the gradients are cut into buckets, so nothing changes but time.

The gradients of the last layers come first, so buckets go from the last parameters to the first::

    backward   |  layer 3  |  layer 2  |  layer 1  |
    means                  |   bucket of 3   |   bucket of 2 and 1   |  update

Source: Li et al. 2020, "PyTorch Distributed", arXiv 2006.15704, section 3.2.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

from torch import Tensor

from dtrain.block.block import Block
from dtrain.comm.allreduce import MeanReduction
from dtrain.comm.communicator import Comm

BUCKET_BYTES = 4 << 20
"""Least size of a bucket, the last excepted: pieces of a mean are at most 1 MiB."""


class WeightedGroup(NamedTuple):
    """Over which replicas gradients are averaged, and the weight of mine."""

    comm: Comm
    weight: float


@final
class GradientReducer:
    """The means of one block's gradients, update by update."""

    def __init__(self, block: Block) -> None:
        self.block, self._parametrisation_version = block, -1
        self._buckets: list[list[str]] = []
        self._ready_parameters: set[int] = set()
        self._pending_means: list[MeanReduction] = []

    def on_gradient_ready(self, parameter: Tensor, group: WeightedGroup) -> None:
        """Hear, inside a backward, that a gradient is complete: start the means that can be."""
        if parameter.device.type != "cpu":
            return  # an accelerator's hooks run in threads of their own, and MPI in one alone
        self._ready_parameters.add(id(parameter))
        own = self.block.parameters
        for names in self._current_buckets()[len(self._pending_means) :]:
            if not all(id(own[name]) in self._ready_parameters for name in names):
                break
            self._start({name: own[name].grad for name in names}, group)
        if self._pending_means:
            group.comm.progress()

    def finish(self, gradients: Sequence[Tensor], group: WeightedGroup) -> None:
        """Start the others; return when all gradients are ``sum of weight * gradient``."""
        named = self.block.name_gradients(gradients)
        for names in self._current_buckets()[len(self._pending_means) :]:
            self._start({name: named[name] for name in names}, group)
        for mean in self._pending_means:
            mean.wait()
        self._pending_means, self._ready_parameters = [], set()

    def _current_buckets(self) -> list[list[str]]:
        """Return the buckets of what the block trains now."""
        if self._parametrisation_version != self.block.parametrisation_version:
            self._buckets, self._parametrisation_version = (
                buckets(self.block.trainable_tensors()),
                self.block.parametrisation_version,
            )
        return self._buckets

    def _start(self, gradients: Mapping[str, Tensor | None], group: WeightedGroup) -> None:
        whole = {name: each for name, each in gradients.items() if each is not None}
        self._pending_means.append(group.comm.imean_(whole, group.weight))


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
