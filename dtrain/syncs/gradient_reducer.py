"""Bucketed all-reduce of gradients, overlapped with the backward pass: the reducer of DDP.

Invariant: buckets start in one order on all replicas, whatever the order in which their gradients
are ready; the sums do not depend on the buckets. So overlapping changes nothing but the time.

The gradients of the last layers are ready first, so buckets go from the last parameters to the
first::

    backward     |  layer 3  |  layer 2  |  layer 1  |
    all-reduce               |   bucket of 3   |   bucket of 2 and 1   |  update

Source: Li et al. 2020, "PyTorch Distributed", arXiv 2006.15704, section 3.2.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from dtrain.block.block import Block, GradientHook
from dtrain.comm.allreduce import MeanReduction
from dtrain.comm.communicator import Comm

BUCKET_BYTES = 16 << 20
"""Least size of a bucket, the last excepted: pieces of a mean are at most 1 MiB."""


class WeightedGroup(NamedTuple):
    """The replicas over which gradients are averaged, and the weight of this replica."""

    comm: Comm
    weight: float


@final
class GradientReducer:
    """Averages the gradients of one block, update by update.

    Attributes
    ----------
    started : bool
        Whether the reduction of the present update has started; `finish` ends it.
    group : WeightedGroup or None
        The replicas of the present or last reduction; None where nothing is averaged.
    """

    def __init__(self) -> None:
        self.started = False
        self.group: WeightedGroup | None = None
        self._parametrisation_version = -1
        self._buckets: list[dict[str, nn.Parameter]] = []
        self._ready_parameters: set[int] = set()
        self._pending_means: list[MeanReduction] = []
        self._sends_flags = False
        self._flags: list[Tensor] = []

    def start(
        self, block: Block, group: WeightedGroup | None, sends_flags: bool = False
    ) -> GradientHook | None:
        """Start the reduction of an update; return the hook for its last backward.

        With None, or with one replica, it averages nothing and returns None.

        Parameters
        ----------
        sends_flags : bool
            Whether each bucket has one more number per parameter, by which the replicas agree on
            the parameters without a gradient.
        """
        self.started = True
        self._sends_flags = sends_flags
        self.group = group if group is not None and group.comm.size > 1 else None
        if self.group is None:
            return None
        if self._parametrisation_version != block.parametrisation_version:
            names = bucket_names(block.trainable_tensors())
            self._buckets = [{name: block.parameters[name] for name in bucket} for bucket in names]
            self._parametrisation_version = block.parametrisation_version
        return self.gradient_ready

    def gradient_ready(self, parameter: Tensor) -> None:
        """Start the all-reduce of each bucket that is complete; a hook of the backward.

        `parameter` has its complete gradient now.
        """
        if parameter.device.type != "cpu":
            return  # an accelerator's hooks run in threads of their own; MPI runs in one thread
        assert self.group is not None
        self._ready_parameters.add(id(parameter))
        for bucket in self._buckets[len(self._pending_means) :]:
            if not self._ready_parameters.issuperset(map(id, bucket.values())):
                break
            self._reduce(bucket, self.group, ())
        if self._pending_means:
            self.group.comm.progress()

    def finish(self, missing: Sequence[nn.Parameter] = ()) -> list[nn.Parameter]:
        """Start the other buckets and wait for all all-reduces of the update.

        After them each gradient is ``sum of weight * gradient``.

        Parameters
        ----------
        missing : sequence of Parameter
            The parameters whose gradients are zeros in place of missing ones.

        Returns
        -------
        list of Parameter
            Those that have no gradient on any replica.
        """
        if self.group is not None:
            for bucket in self._buckets[len(self._pending_means) :]:
                self._reduce(bucket, self.group, missing)
        for mean in self._pending_means:
            mean.wait()
        if self._flags:
            pairs = zip(self._buckets, self._flags, strict=True)
            missing = [p for b, flags in pairs for p in missing_parameters(b.values(), flags)]
        self._pending_means, self._flags = [], []
        self._ready_parameters.clear()
        self.started = False
        return list(missing)

    def _reduce(
        self,
        bucket: Mapping[str, nn.Parameter],
        group: WeightedGroup,
        missing: Sequence[nn.Parameter],
    ) -> None:
        tensors = {name: p.grad for name, p in bucket.items() if p.grad is not None}
        if self._sends_flags:
            self._flags.append(gradient_flags(bucket.values(), missing))
            tensors["flags"] = self._flags[-1]
        self._pending_means.append(group.comm.imean_(tensors, group.weight))


def gradient_flags(parameters: Iterable[nn.Parameter], missing: Sequence[nn.Parameter]) -> Tensor:
    """Return 1 for each parameter with a gradient and 0 for each of `missing`."""
    parameters, without = list(parameters), set(map(id, missing))
    dtype = parameters[0].dtype.to_real()
    flags = [float(id(parameter) not in without) for parameter in parameters]
    return torch.tensor(flags, dtype=dtype, device=parameters[0].device)


def missing_parameters(parameters: Iterable[nn.Parameter], flags: Tensor) -> list[nn.Parameter]:
    """Return the parameters without a gradient on any replica, given the mean of their flags."""
    return [p for p, flag in zip(parameters, flags.tolist(), strict=True) if not flag > 0]


def bucket_names(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of `tensors` from the last to the first, in buckets of `BUCKET_BYTES`.

    >>> import torch
    >>> bucket_names({name: torch.empty(1 << 21) for name in "abc"})
    [['c', 'b'], ['a']]
    """
    buckets: list[list[str]] = []
    room = 0
    for name, tensor in reversed([*tensors.items()]):
        if room <= 0:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(name)
        room -= tensor.nbytes
    return buckets
