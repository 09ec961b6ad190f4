"""Only large: another sync for the large tensors; the gradients of small ones are averaged.

Biases and norms are a small part of what is sent, and lose most where it is made smaller. Sends
the gradients of small tensors as `every-step`, the rest as the inner sync.

Invariant: the inner sync never sees a small tensor, and small tensors are equal on all replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import SyncTarget, UpdateClock, require_at_least
from dtrain.syncs.common.wrapper import Wrapper
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass
class OnlyLarge(Wrapper):
    """Two syncs, by size.

    Attributes
    ----------
    elements : int
        Tensors of as many elements or more are large.
    """

    elements: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        self.compressible = False
        require_at_least("elements", self.elements, 1)

    def setup(self, block: SyncTarget, replicas: Comm) -> None:
        """Open the inner sync with the large tensors."""
        self.block, self.replicas = block, replicas
        large = {
            name
            for name, each in block.trainable_tensors().items()
            if each.numel() >= self.elements
        }
        self.large_tensors = TensorSubset(block, large)
        self.inner_sync.setup(self.large_tensors, replicas)

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """Every replica steps: small tensors have the gradient of all samples."""
        return True

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """All of it is done before the update."""
        return None

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Average the small ones, and the large ones where the inner sync does."""
        named, large = self.block.name_gradients(gradients), self.large_tensors.trainable_tensors()
        self.replicas.mean_({n: each for n, each in named.items() if n not in large}, weight)
        inner = {name: named[name] for name in large}
        group = self.inner_sync.gradient_group(weight, clock)
        if group is not None:
            group.comm.mean_(inner, group.weight)
        self.inner_sync.before_update(list(inner.values()), weight, clock)


@final
class TensorSubset:
    """Some of a block's trained tensors, for a sync that is to see no others."""

    def __init__(self, block: SyncTarget, names: set[str]) -> None:
        self.block, self.names = block, names
        self.index, self.seed = block.index, block.seed

    @property
    def unsynced_buffers(self) -> dict[str, Tensor]:
        """The buffers, all of them."""
        return self.block.unsynced_buffers

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return those that are trained."""
        return {
            name: each
            for name, each in self.block.trainable_tensors().items()
            if name in self.names
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers, which a view needs."""
        return self.block.tensors()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state of the part."""
        own = self.block.optimizer_state().items()
        return {name: each for name, each in own if name.rpartition("/")[0] in self.names}

    def name_gradients(self, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return one tensor for each of `values`, under their names."""
        return dict(zip(self.trainable_tensors(), gradients, strict=True))
