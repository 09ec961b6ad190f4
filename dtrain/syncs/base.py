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

from dtrain.block.block import OptimizerStep
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass(frozen=True)
class UpdateClock:
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
    updates_per_epoch: int
    total_updates: int
    lr: float
    base_lr: float
    in_lr_warmup: bool
    rows_per_replica: tuple[int, ...]

    @property
    def total_epochs(self) -> int:
        """Epochs begun when the run is done."""
        return -(-self.total_updates // self.updates_per_epoch)

    @property
    def ends_epoch(self) -> bool:
        """Whether this is the last update of its epoch, or of the run."""
        return self.epoch_updates_left == 0

    @property
    def ends_run(self) -> bool:
        """Whether this is the last update of the run."""
        return self.update + 1 == self.total_updates

    @property
    def epoch_offset(self) -> int:
        """Updates of this epoch before this one."""
        return self.update % self.updates_per_epoch

    @property
    def epoch_updates_left(self) -> int:
        """Updates of this epoch after this one; a run may end inside its last epoch."""
        return min((self.epoch + 1) * self.updates_per_epoch, self.total_updates) - self.update - 1


class LowRankStats(TypedDict):
    """What is known of a weight that may be a product for a while.

    `numbers` are those it has, `held` those of its factors; `sent` those that have crossed between
    nodes, `plain` those that `every-step` would have sent. `rank` is None where it stays whole.
    """

    rank: int | None
    numbers: int
    held: int
    sent: float
    plain: float


class SyncTarget(Protocol):
    """What a sync sees of a block, or of a part of it; see `dtrain.block.Block`."""

    index: int
    seed: int

    @property
    def unsynced_buffers(self) -> dict[str, Tensor]:
        """The buffers in which replicas may differ."""

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return what is trained, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers, by name."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state as ``<parameter>/<key>``."""

    def name_gradients(self, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
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

    replicas_diverge: bool
    depends_on_run_length = False
    parameter_copies = 0
    lossy = False
    replaces_optimizer = False
    keeps_no_optimizer_state = False
    reparametrises = False
    compressible = True
    in_sync = True
    compressor: Compressor = NO_COMPRESSION

    def setup(self, block: SyncTarget, replicas: Comm) -> None:
        """Take the block and the communicator of its replicas; may re-parametrise the block."""
        self.block = block
        self.replicas = replicas

    def set_compressor(self, compressor: Compressor) -> None:
        """Let movements of weights travel by a carrier; before `open`."""
        self.compressor = compressor

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """Say whether this replica's optimizer takes a step in an update.

        Where replicas train apart, one without a sample has nothing to learn from.
        """
        return weight > 0 or not self.replicas_diverge

    def communication_cost(self) -> tuple[float, float]:
        """Return how many means of the block an update costs, inside nodes and between them.

        For predicted times; where it varies, of the phase that most updates are in.
        """
        return 1.0, 1.0

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return over whom the gradients of an update are averaged, None for nobody.

        Those means may begin in the last backward before the update; `weight` as in
        `before_update`. Pure in the clock, and asked more than once.
        """
        return None

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:  # noqa: B027
        """Change the gradients in place, averaged as they are now; `weight` = rows of this replica
        / rows of the update."""

    def lr_factor(self, clock: UpdateClock) -> float:
        """Return by what the learning rate of an update is multiplied."""
        return 1.0

    def optimizer_step(self, clock: UpdateClock) -> OptimizerStep | None:
        """Return what takes the optimizer's step in its place, None for nothing."""
        return None

    @abstractmethod
    def after_update(self, clock: UpdateClock) -> None:
        """Change the parameters in place, once the optimizer has moved them."""

    @abstractmethod
    def end_epoch(self, loss: float) -> None:
        """Hear the training loss of an epoch, the same number on all stages and replicas."""

    @abstractmethod
    def finish_pending(self) -> None:
        """Land what is in flight at a segment's end, and decide nothing."""

    @abstractmethod
    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return the parameters and buffers that are evaluated, saved and digested."""

    def low_rank_stats(self) -> dict[str, LowRankStats]:
        """Return rank and traffic of every weight, where there are products."""
        return {}

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return by name what must survive a restart and is not the block's own."""

    def restore_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Give the block's parameters the shapes that they had with a state; before `restore`."""
        return None

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""


def require_at_least(key: str, value: float | None, minimum: float) -> None:
    """Refuse a number of a run file's ``[sync]`` that is below `low`; None is left out."""
    if value is not None and value < minimum:
        raise ConfigError(
            "todo.key", f"[sync] {key} = {value} is too small: give at least {minimum}"
        )


def diverging_tensors(block: SyncTarget) -> dict[str, Tensor]:
    """Return the tensors in which replicas that train apart differ, under their global names.

    A mean of equal numbers is not always that number: what is frozen is in no mean.
    """
    return block.trainable_tensors() | block.unsynced_buffers


def replica_mean(replicas: Comm, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of `tensors`: means over the replicas; integers are this replica's own."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    replicas.mean_([tensor for tensor in copies.values() if tensor.is_floating_point()])
    return copies


def select_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the part of a state whose names begin with `root`, without that beginning."""
    own = {name: each for name, each in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): each for name, each in own.items()}
