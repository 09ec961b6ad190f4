"""The base class of compressing wrappers: they make the transfers of another sync smaller.

Two kinds of transfers between nodes are compressed: gradients that the inner sync averages over
several nodes, and deltas of the weights since all replicas were equal.

Invariant: gradients and deltas each have a compressor, with an error memory of its own. Everything
else is exact.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.base import (
    Sync,
    SyncTarget,
    SyncTraits,
    UpdateClock,
    add_prefix,
    select_prefix,
)
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.common.wrapper import Wrapper
from dtrain.syncs.gradient_reducer import WeightedGroup


@dataclass
class CompressedSync(Wrapper):
    """A wrapper whose subclass makes the compressors.

    Attributes
    ----------
    error_feedback : bool
        Whether a compressor keeps the error of each replica and adds it to the next transfer.

    Raises
    ------
    ConfigError
        The inner sync has no transfers that can be compressed.
    """

    error_feedback: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inner_sync.traits().compressible:
            name = self.inner["name"]
            advice = "put it around this one" if name == "only-large" else "leave one of them out"
            raise ConfigError(
                "sync.inner-not-compressible",
                f"[sync.inner] '{name}' has no transfers that another sync can compress: {advice}",
            )

    def traits(self) -> SyncTraits:
        """Return the traits of the inner sync, lossy; error feedback makes replicas diverge."""
        inner = self.inner_sync.traits()
        diverge = inner.replicas_diverge
        # Each compressor in use keeps errors; deltas need the weights at which replicas were equal.
        copies = self.error_feedback * (1 + diverge) + diverge
        return replace(
            inner,
            lossy=True,
            compressible=False,
            parameter_copies=inner.parameter_copies + copies,
            replicas_diverge=diverge or self.error_feedback,
            state_diverges=inner.state_diverges or not diverge,
        )

    @abstractmethod
    def make_compressor(self, payload: str) -> Compressor:
        """Return a new compressor; `payload` is "gradients" or "movements" (weight deltas)."""

    @abstractmethod
    def sent_fraction(self) -> float:
        """Return the bytes sent between nodes over those of a mean, for the time estimate."""

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Attach the inner sync with a compressor for its deltas. Collective over the replicas."""
        Sync.setup(self, block, replicas, compressor)
        self.gradient_compressor = self.make_compressor("gradients")
        self.delta_compressor = self.make_compressor("movements")
        self.inner_sync.setup(block, replicas, self.delta_compressor)

    def communication_cost(self) -> tuple[float, float]:
        """Return the means of the inner sync, between nodes times `sent_fraction`."""
        inside, between = self.inner_sync.communication_cost()
        return inside, between * self.sent_fraction()

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return the group of the inner sync inside a node; `before_update` averages others."""
        group = self.inner_sync.gradient_group(weight, clock)
        return None if group is None or group.comm.node_count > 1 else group

    def averaging_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return the group over whose nodes `before_update` averages, or that of the inner sync."""
        group = self.inner_sync.gradient_group(weight, clock)
        return group or self.inner_sync.averaging_group(weight, clock)

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Average gradients, compressed, where the inner sync averages them over several nodes."""
        group = self.inner_sync.gradient_group(weight, clock)
        if group is not None and group.comm.node_count > 1:
            named = self.block.name_gradients(gradients)
            self.gradient_compressor.mean_(group.comm, named, group.weight, clock.update)
        self.inner_sync.before_update(gradients, weight, clock)

    def state(self) -> dict[str, Tensor]:
        """Return the states of the inner sync and of both compressors."""
        return {
            **super().state(),
            **add_prefix("gradients/", self.gradient_compressor.state()),
            **add_prefix("movements/", self.delta_compressor.state()),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the states of the inner sync and of both compressors."""
        super().restore(state)
        self.gradient_compressor.restore(select_prefix(state, "gradients/"))
        self.delta_compressor.restore(select_prefix(state, "movements/"))
