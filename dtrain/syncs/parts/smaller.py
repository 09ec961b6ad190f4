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

from dtrain.comm.comm import Comm
from dtrain.early import Group
from dtrain.errors import Refusal
from dtrain.syncs.parts.carrier import Carrier
from dtrain.syncs.parts.wrapper import Wrapper
from dtrain.syncs.sync import Clock, Held, under


@dataclass
class Smaller(Wrapper):
    """A subclass says how numbers are carried, and which part of a mean that costs.

    Attributes
    ----------
    remembers : bool
        Whether a carrier has memory of its replica's own.
    """

    remembers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inside.shrinks:
            name = self.inner["name"]
            advice = "put it around this one" if name == "only-large" else "leave one of them out"
            raise Refusal(
                f"[sync.inner] '{name}' sends nothing that another sync can make smaller: {advice}"
            )
        self.lossy, self.shrinks = True, False
        own = self.remembers * (1 + self.apart)  # one memory per carrier
        self.copies = self.inside.copies + own + self.apart  # and where all were last equal
        self.apart = self.apart or self.remembers

    @abstractmethod
    def carries(self, what: str) -> Carrier:
        """Return a new carrier of `what`: gradients or movements."""

    @abstractmethod
    def share(self) -> float:
        """Return which part of a mean's bytes between nodes is sent."""

    def open(self, block: Held, replicas: Comm) -> None:
        """Open the inner sync, whose transfers are carried smaller from now on."""
        self.block, self.replicas = block, replicas
        self.gradients, self.movements = self.carries("gradients"), self.carries("movements")
        self.inside.carry(self.movements)
        super().open(block, replicas)

    def means(self) -> tuple[float, float]:
        """Those of the inner sync; between nodes a part of each."""
        near, far = self.inside.means()
        return near, far * self.share()

    def averages(self, weight: float, clock: Clock) -> Group | None:
        """Inside nodes as the inner sync; between nodes see `before_update`."""
        group = self.inside.averages(weight, clock)
        return None if group is None or group.comm.nodes > 1 else group

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:
        """Average gradients where the inner sync averages them between nodes."""
        group = self.inside.averages(weight, clock)
        if group is not None and group.comm.nodes > 1:
            named = self.block.named(gradients)
            self.gradients.mean_(group.comm, named, group.weight, clock.update)
        self.inside.before_update(gradients, weight, clock)

    def state(self) -> dict[str, Tensor]:
        """Return the states of both carriers and of the inner sync."""
        carriers = {"gradients": self.gradients, "movements": self.movements}
        own = {f"{k}/{name}": t for k, each in carriers.items() for name, t in each.state().items()}
        return super().state() | own

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        super().restore(state)
        self.gradients.restore(under(state, "gradients/"))
        self.movements.restore(under(state, "movements/"))
