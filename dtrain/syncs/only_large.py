"""Only-large: another sync for large tensors, while gradients of small ones are averaged exactly.

Biases and norms are a small part of the traffic, and lose most by compression. Gradients of small
tensors are sent as `every-step` does, everything else as the inner sync does.

Invariant: the inner sync never sees a small tensor, and small tensors are equal on all replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import Sync, SyncTarget, SyncTraits, UpdateClock, require_at_least
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.common.wrapper import Wrapper
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass
class OnlyLarge(Wrapper):
    """The inner sync for large tensors, `every-step` for small ones.

    Attributes
    ----------
    elements : int
        Tensors with at least so many elements are large.
    """

    elements: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("elements", self.elements, 1)

    def traits(self) -> SyncTraits:
        """Return the traits of the inner sync; compressing wrappers belong inside."""
        return replace(super().traits(), compressible=False)

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Attach the inner sync to the large tensors. Collective over the replicas."""
        Sync.setup(self, block, replicas, compressor)
        large = {
            name
            for name, tensor in block.trainable_tensors().items()
            if tensor.numel() >= self.elements
        }
        self.large_tensors = TensorSubset(block, large)
        self.inner_sync.setup(self.large_tensors, replicas, compressor)

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """Return True: small tensors have the gradient of all samples on every replica."""
        return True

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return None: `before_update` averages all gradients."""
        return None

    def averaging_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return all replicas."""
        return WeightedGroup(self.replicas, weight)

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Average small gradients, and large ones where the inner sync does."""
        named, large = self.block.name_gradients(gradients), self.large_tensors.trainable_tensors()
        self.replicas.mean_({n: tensor for n, tensor in named.items() if n not in large}, weight)
        inner = {name: named[name] for name in large}
        group = self.inner_sync.gradient_group(weight, clock)
        if group is not None:
            group.comm.mean_(inner, group.weight)
        self.inner_sync.before_update(list(inner.values()), weight, clock)


@final
class TensorSubset:
    """Some of a block's trained tensors, as the target of a sync that must not see the others."""

    def __init__(self, block: SyncTarget, names: set[str]) -> None:
        self.block = block
        self.names = names
        self.index = block.index
        self.seed = block.seed

    @property
    def unsynced_buffers(self) -> dict[str, Tensor]:
        """All unsynced buffers of the block."""
        return self.block.unsynced_buffers

    @property
    def first_replica_buffers(self) -> set[str]:
        """The names of the buffers that are not averaged."""
        return self.block.first_replica_buffers

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors of the subset."""
        return {
            name: tensor
            for name, tensor in self.block.trainable_tensors().items()
            if name in self.names
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers of the block, which `evaluation_weights` needs."""
        return self.block.tensors()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state of the subset."""
        return {
            key: tensor
            for key, tensor in self.block.optimizer_state().items()
            if key.rpartition("/")[0] in self.names
        }

    def add_optimizer_state(self, entries: Mapping[str, Tensor]) -> None:
        """Add entries to the optimizer's state."""
        self.block.add_optimizer_state(entries)

    def name_gradients(self, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return one gradient for each trained tensor of the subset, by its name."""
        return dict(zip(self.trainable_tensors(), gradients, strict=True))
