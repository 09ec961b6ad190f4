"""Smaller: a wrapper under which what crosses between nodes is carried smaller.

Invariant: gradients that the inner sync averages over several nodes, and what replicas moved by
since they were equal, go through a carrier each, with memory of their own; all else stays exact.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.base import SyncTarget, UpdateClock, select_prefix
from dtrain.syncs.common.compressor import Compressor
from dtrain.syncs.common.wrapper import Wrapper
from dtrain.syncs.gradient_reducer import WeightedGroup


@dataclass
class CompressedSync(Wrapper):
    """A subclass says how numbers are carried, and which part of a mean that costs.

    Attributes
    ----------
    remembers : bool
        Whether a carrier has memory of its replica's own.
    """

    error_feedback: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inner_sync.compressible:
            name = self.inner["name"]
            advice = "put it around this one" if name == "only-large" else "leave one of them out"
            raise ConfigError(
                "todo.key",
                f"[sync.inner] '{name}' sends nothing that another sync can make smaller: {advice}",
            )
        self.lossy, self.compressible = True, False
        own = self.error_feedback * (1 + self.replicas_diverge)  # one memory per carrier
        self.parameter_copies = (
            self.inner_sync.parameter_copies + own + self.replicas_diverge
        )  # and where all were last equal
        self.replicas_diverge = self.replicas_diverge or self.error_feedback

    @abstractmethod
    def make_compressor(self, payload: str) -> Compressor:
        """Return a new carrier of `what`: gradients or movements."""

    @abstractmethod
    def sent_fraction(self) -> float:
        """Return which part of a mean's bytes between nodes is sent."""

    def setup(self, block: SyncTarget, replicas: Comm) -> None:
        """Open the inner sync, whose transfers are carried smaller from now on."""
        self.block, self.replicas = block, replicas
        self.gradient_compressor, self.delta_compressor = (
            self.make_compressor("gradients"),
            self.make_compressor("movements"),
        )
        self.inner_sync.set_compressor(self.delta_compressor)
        super().setup(block, replicas)

    def communication_cost(self) -> tuple[float, float]:
        """Those of the inner sync; between nodes a part of each."""
        near, far = self.inner_sync.communication_cost()
        return near, far * self.sent_fraction()

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Inside nodes as the inner sync; between nodes see `before_update`."""
        group = self.inner_sync.gradient_group(weight, clock)
        return None if group is None or group.comm.node_count > 1 else group

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Average gradients where the inner sync averages them between nodes."""
        group = self.inner_sync.gradient_group(weight, clock)
        if group is not None and group.comm.node_count > 1:
            named = self.block.name_gradients(gradients)
            self.gradient_compressor.mean_(group.comm, named, group.weight, clock.update)
        self.inner_sync.before_update(gradients, weight, clock)

    def state(self) -> dict[str, Tensor]:
        """Return the states of both carriers and of the inner sync."""
        carriers = {"gradients": self.gradient_compressor, "movements": self.delta_compressor}
        own = {f"{k}/{name}": t for k, each in carriers.items() for name, t in each.state().items()}
        return super().state() | own

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        super().restore(state)
        self.gradient_compressor.restore(select_prefix(state, "gradients/"))
        self.delta_compressor.restore(select_prefix(state, "movements/"))
