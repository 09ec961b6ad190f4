"""How the replicas of one block agree.

Invariant: a sync sees tensors and a `Comm` of its block's replicas, never the world; every replica
calls the same methods in the same order, so all of them are collective over the replicas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, final

from torch import Tensor

from dtrain.block import Rule
from dtrain.comm.comm import Comm
from dtrain.early import Group
from dtrain.errors import Refusal
from dtrain.syncs.parts.carrier import EXACT, Carrier


@final
@dataclass(frozen=True)
class Clock:
    """When something happens, and how much of the run there is.

    Attributes
    ----------
    update, epoch : int
        Counted from the start of the run.
    per_epoch, total : int
        Updates in an epoch, and in the whole run.
    lr, peak : float
        The learning rate of this update, and the optimizer's own, which the schedule scales.
    warming : bool
        Whether the schedule still raises the rate.
    rows : tuple of int
        Samples of this update in each replica.
    """

    update: int
    epoch: int
    per_epoch: int
    total: int
    lr: float
    peak: float
    warming: bool
    rows: tuple[int, ...]

    @property
    def epochs(self) -> int:
        """Epochs begun when the run is done."""
        return -(-self.total // self.per_epoch)

    @property
    def ends_epoch(self) -> bool:
        """Whether this is the last update of its epoch, or of the run."""
        return self.left == 0

    @property
    def ends_run(self) -> bool:
        """Whether this is the last update of the run."""
        return self.update + 1 == self.total

    @property
    def offset(self) -> int:
        """Updates of this epoch before this one."""
        return self.update % self.per_epoch

    @property
    def left(self) -> int:
        """Updates of this epoch after this one; a run may end inside its last epoch."""
        return min((self.epoch + 1) * self.per_epoch, self.total) - self.update - 1


class Entry(TypedDict):
    """What is known of a weight that may be a product for a while.

    `numbers` are those it has, `held` those of its factors; `sent` those that have crossed between
    nodes, `plain` those that `every-step` would have sent. `rank` is None where it stays whole.
    """

    rank: int | None
    numbers: int
    held: int
    sent: float
    plain: float


class Held(Protocol):
    """What a sync sees of a block, or of a part of it; see `dtrain.block.Block`."""

    index: int
    seed: int

    @property
    def drifting(self) -> dict[str, Tensor]:
        """The buffers in which replicas may differ."""

    def values(self) -> dict[str, Tensor]:
        """Return what is trained, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers, by name."""

    def memory(self) -> dict[str, Tensor]:
        """Return the optimizer's state as ``<parameter>/<key>``."""

    def named(self, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return one tensor for each of `values`, under their names."""


class Sync(ABC):
    """One way of agreeing, for one block. Fields of a subclass are its keys in the run file.

    Attributes
    ----------
    apart : bool
        Whether replicas may differ at a segment's end; if not, one of them is checkpointed.
    horizon : bool
        Whether what it does follows from the length of the run, which then cannot be changed.
    copies : int
        Copies of what is trained that it keeps, at most: for the memory planned and counted.
    lossy : bool
        Whether what replicas are told of each other is less than what there is to tell.
    ruled : bool
        Whether `rule` replaces the optimizer's own, in some updates at least.
    idles : bool
        Whether it does so in all of them, so that the optimizer keeps nothing.
    reforms : bool
        Whether it puts others in the place of a block's parameters.
    shrinks : bool
        Whether what it sends between nodes can be made smaller by a wrapper around it.
    carrier : Carrier
        What takes movements of weights from node to node.
    equal : bool
        Whether all replicas hold the same parameters, bit for bit, since the last update.
    """

    apart: bool
    horizon = False
    copies = 0
    lossy = False
    ruled = False
    idles = False
    reforms = False
    shrinks = True
    equal = True
    carrier: Carrier = EXACT

    def open(self, block: Held, replicas: Comm) -> None:
        """Take the block and the communicator of its replicas; may re-parametrise the block."""
        self.block = block
        self.replicas = replicas

    def carry(self, carrier: Carrier) -> None:
        """Let movements of weights travel by a carrier; before `open`."""
        self.carrier = carrier

    def steps(self, weight: float, clock: Clock) -> bool:
        """Say whether this replica's optimizer takes a step in an update.

        Where replicas train apart, one without a sample has nothing to learn from.
        """
        return weight > 0 or not self.apart

    def means(self) -> tuple[float, float]:
        """Return how many means of the block an update costs, inside nodes and between them.

        For predicted times; where it varies, of the phase that most updates are in.
        """
        return 1.0, 1.0

    def averages(self, weight: float, clock: Clock) -> Group | None:
        """Return over whom the gradients of an update are averaged, None for nobody.

        Those means may begin in the last backward before the update; `weight` as in
        `before_update`. Pure in the clock, and asked more than once.
        """
        return None

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:  # noqa: B027
        """Change the gradients in place, averaged as they are now; `weight` = rows of this replica
        / rows of the update."""

    def rate(self, clock: Clock) -> float:
        """Return by what the learning rate of an update is multiplied."""
        return 1.0

    def rule(self, clock: Clock) -> Rule | None:
        """Return what takes the optimizer's step in its place, None for nothing."""
        return None

    @abstractmethod
    def after_update(self, clock: Clock) -> None:
        """Change the parameters in place, once the optimizer has moved them."""

    @abstractmethod
    def end_epoch(self, loss: float) -> None:
        """Hear the training loss of an epoch, the same number on all stages and replicas."""

    @abstractmethod
    def settle(self) -> None:
        """Land what is in flight at a segment's end, and decide nothing."""

    @abstractmethod
    def view(self) -> dict[str, Tensor]:
        """Return the parameters and buffers that are evaluated, saved and digested."""

    def entries(self) -> dict[str, Entry]:
        """Return rank and traffic of every weight, where there are products."""
        return {}

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return by name what must survive a restart and is not the block's own."""

    def reshape(self, state: Mapping[str, Tensor]) -> None:
        """Give the block's parameters the shapes that they had with a state; before `restore`."""
        return None

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""


def least(key: str, value: float | None, low: float) -> None:
    """Refuse a number of a run file's ``[sync]`` that is below `low`; None is left out."""
    if value is not None and value < low:
        raise Refusal(f"[sync] {key} = {value} is too small: give at least {low}")


def moving(block: Held) -> dict[str, Tensor]:
    """Return the tensors in which replicas that train apart differ, under their global names.

    A mean of equal numbers is not always that number: what is frozen is in no mean.
    """
    return block.values() | block.drifting


def averaged(replicas: Comm, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of `tensors`: means over the replicas; integers are this replica's own."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    replicas.mean_([tensor for tensor in copies.values() if tensor.is_floating_point()])
    return copies


def under(state: Mapping[str, Tensor], root: str) -> dict[str, Tensor]:
    """Return the part of a state whose names begin with `root`, without that beginning."""
    own = {name: each for name, each in state.items() if name.startswith(root)}
    return {name.removeprefix(root): each for name, each in own.items()}
