"""Wrapper: a sync around another, which ``[sync.inner]`` names.

Invariant: what a wrapper does not say the inner sync says; it is opened once, with the same block
and replicas, and hears of every update.

::

    [sync]                      warmup:  every-step for 500 updates, then ...
    name = "warmup"
    updates = 500
    [sync.inner]                         ... terngrad around ...
    name = "terngrad"
    inner = { name = "local-sgd" }             ... local-sgd: what it sends is ternary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dtrain.block import Rule
from dtrain.comm.comm import Comm
from dtrain.early import Group
from dtrain.syncs.parts.carrier import Carrier
from dtrain.syncs.sync import Clock, Entry, Held, Sync, under
from dtrain.tables import Table, make, unfill


def every_step() -> Table:
    """Return the inner sync of those that name none."""
    return {"name": "every-step"}


@dataclass
class Wrapper(Sync):
    """Hands everything to the inner sync; a subclass overrides what it changes.

    Attributes
    ----------
    inner : table
        Name and keys of the inner sync.
    """

    inner: Table = field(default_factory=every_step)

    def __post_init__(self) -> None:
        from dtrain.syncs import SYNCS  # which has the wrappers

        self.inside = make(SYNCS, every_step() | self.inner, "sync.inner")
        self.inner = every_step() | self.inner | unfill(self.inside)  # defaults spelled out
        self.apart, self.horizon = self.inside.apart, self.inside.horizon
        self.copies, self.lossy = self.inside.copies, self.inside.lossy
        self.ruled, self.idles = self.inside.ruled, self.inside.idles
        self.reforms, self.shrinks = self.inside.reforms, self.inside.shrinks

    @property
    def equal(self) -> bool:  # type: ignore[override]
        """What the inner sync says."""
        return self.inside.equal

    def open(self, block: Held, replicas: Comm) -> None:
        """Open the inner sync with the same block and replicas."""
        super().open(block, replicas)
        self.inside.open(block, replicas)

    def carry(self, carrier: Carrier) -> None:
        """Hand the carrier on to who sends."""
        self.carrier = carrier
        self.inside.carry(carrier)

    def steps(self, weight: float, clock: Clock) -> bool:
        """As the inner sync."""
        return self.inside.steps(weight, clock)

    def means(self) -> tuple[float, float]:
        """As the inner sync."""
        return self.inside.means()

    def averages(self, weight: float, clock: Clock) -> Group | None:
        """As the inner sync."""
        return self.inside.averages(weight, clock)

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:
        """Hand the gradients on."""
        self.inside.before_update(gradients, weight, clock)

    def rate(self, clock: Clock) -> float:
        """As the inner sync."""
        return self.inside.rate(clock)

    def rule(self, clock: Clock) -> Rule | None:
        """As the inner sync."""
        return self.inside.rule(clock)

    def after_update(self, clock: Clock) -> None:
        """Let the inner sync agree."""
        self.inside.after_update(clock)

    def end_epoch(self, loss: float) -> None:
        """Hand the loss on."""
        self.inside.end_epoch(loss)

    def settle(self) -> None:
        """Let the inner sync land what is in flight."""
        self.inside.settle()

    def view(self) -> dict[str, Tensor]:
        """Show what the inner sync shows."""
        return self.inside.view()

    def entries(self) -> dict[str, Entry]:
        """As the inner sync; what it sends is counted before it is made smaller."""
        return self.inside.entries()

    def state(self) -> dict[str, Tensor]:
        """Return the inner sync's state."""
        return {f"inner/{name}": each for name, each in self.inside.state().items()}

    def reshape(self, state: Mapping[str, Tensor]) -> None:
        """Let the inner sync give the block its shapes."""
        self.inside.reshape(under(state, "inner/"))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        self.inside.restore(under(state, "inner/"))
