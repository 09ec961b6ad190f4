"""Carrier: how differences travel between nodes: as they are, or smaller.

Invariant: all ranks of a group end with the same bits, which the leads of nodes have worked out
from the same messages in the order of nodes; what stays inside a node is exact.

::

    near mean of the node  ->  lead: encode -> to all leads -> decode, add up  ->  near broadcast

Gradients are differences, and so is what a replica moved by since all were equal; weights are not,
and are never made smaller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, final

from torch import Tensor

from dtrain.comm.comm import Comm

Land = Callable[[], None]
"""Finishes what was begun. Collective."""


class Carrier(ABC):
    """Makes weighted means of tensors over a group, in place.

    Attributes
    ----------
    exact : bool
        Whether what comes is the mean itself, so that weights may travel too.
    """

    exact: ClassVar[bool] = False

    @abstractmethod
    def begin(self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int) -> Land:
        """Start ``sum of weight * tensor`` over the group; the tensors hold it once the returned
        function was called. Collective, and nobody may touch them in between.

        `update` and the tensors' names key what is random.
        """

    @final
    def mean_(self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int) -> None:
        """Make the mean at once. Collective."""
        self.begin(group, tensors, weight, update)()

    def state(self) -> dict[str, Tensor]:
        """Return by name what must survive a restart: this rank's own."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take back what `state()` returned."""


@final
class Exact(Carrier):
    """The mean as `Comm` makes it."""

    exact: ClassVar[bool] = True

    def begin(self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int) -> Land:
        """Start the mean."""
        return group.imean_(tensors, weight).wait


EXACT = Exact()
