"""The interface of a sync: it keeps the data-parallel replicas of one block consistent.

Invariant: a sync has the tensors of one block and a `Comm` of that block's replicas, never the
world. All replicas call the same methods in the same order, so each method may communicate.

::

    setup (restore)
    per update      lr_factor  gradient_group  before_update
                    takes_step, optimizer_step -> the step -> after_update
    per segment     finish_pending; then evaluation_weights and state for tests and checkpoints
    per epoch       end_epoch
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypedDict, dataclass_transform, final

import torch
from torch import Tensor, nn

from dtrain.block.block import Block, GradientHook, OptimizerStep
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.schema import Strategy
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.gradient_reducer import GradientReducer, WeightedGroup


@final
@dataclass(frozen=True)
class UpdateClock:
    """The place of an update in the run, and the length of the run.

    Attributes
    ----------
    update, epoch : int
        Counted from 0 at the start of the run.
    updates_per_epoch, total_updates : int
        Updates of a full epoch, and of the whole run.
    lr, base_lr : float
        The learning rate of this update, and the optimizer's own, which the schedule scales.
    in_lr_warmup : bool
        Whether the learning-rate schedule is still in its warm-up.
    rows_per_replica : tuple of float
        Samples of this update in each replica, or their positions that count in the loss.
    """

    update: int
    epoch: int
    updates_per_epoch: int
    total_updates: int
    lr: float
    base_lr: float
    in_lr_warmup: bool
    rows_per_replica: tuple[float, ...]

    @property
    def total_epochs(self) -> int:
        """Epochs of the run; the last may be shorter."""
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
    """Rank and traffic of a trained tensor under a sync that factorizes matrices.

    `numbers` counts its elements and `held` those of its factors. `sent` counts the elements that
    crossed between nodes, `plain` those that `every-step` would have sent. `rank` is None where it
    is not factorized.
    """

    rank: int | None
    numbers: int
    held: int
    sent: float
    plain: float


class SyncTarget(Protocol):
    """The tensors that a sync works on: a `dtrain.block.Block`, or a subset of its tensors."""

    index: int
    seed: int

    @property
    def unsynced_buffers(self) -> dict[str, Tensor]:
        """The buffers in which replicas may differ."""

    @property
    def first_replica_buffers(self) -> set[str]:
        """The names of the unsynced buffers that are not averaged, but those of replica 0."""

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return the trained parameters by name, detached, not copied."""

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name, detached, not copied."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state as ``<parameter>/<entry>``."""

    def add_optimizer_state(self, entries: Mapping[str, Tensor]) -> None:
        """Add entries to the optimizer's state, or replace those of the same keys."""

    def name_gradients(self, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return one gradient for each trained parameter, by its name."""


@final
@dataclass(frozen=True)
class SyncTraits:
    """Properties of a sync that the planner, the engine and checkpoints rely on.

    Attributes
    ----------
    replicas_diverge : bool
        Whether replicas may differ at the end of a segment. If not, one of them is checkpointed.
    state_diverges : bool
        Whether they differ in the state of the sync alone, never in their parameters.
    depends_on_run_length : bool
        Whether its phases follow from the length of the run, which then cannot be changed.
    parameter_copies : int
        Copies of the trained parameters that it keeps, at most. Planned and counted memory
        include them.
    lossy : bool
        Whether transfers between replicas lose information.
    replaces_optimizer : bool
        Whether `optimizer_step` replaces the optimizer's own step in some updates.
    keeps_no_optimizer_state : bool
        Whether it does so in all updates, so that the optimizer keeps no state.
    reparametrises : bool
        Whether it replaces parameters of the block by others (AB: a matrix becomes a product).
    compressible : bool
        Whether a compressing wrapper can make its transfers between nodes smaller.
    """

    replicas_diverge: bool
    depends_on_run_length: bool = False
    parameter_copies: int = 0
    lossy: bool = False
    replaces_optimizer: bool = False
    keeps_no_optimizer_state: bool = False
    reparametrises: bool = False
    compressible: bool = True
    state_diverges: bool = False

    @property
    def weighs_samples(self) -> bool:
        """Whether a replica with more samples counts more: means are over samples."""
        return not self.replicas_diverge or (self.state_diverges and not self.replaces_optimizer)

    @property
    def keeps_weights_equal(self) -> bool:
        """Whether all replicas hold the same parameters after each update, of fixed shapes."""
        return not self.reparametrises and (not self.replicas_diverge or self.state_diverges)


@dataclass_transform(field_specifiers=(field,))
@dataclass
class Sync(Strategy, ABC):
    """Synchronisation of the replicas of one block. Dataclass fields are keys of the run file.

    Attributes
    ----------
    block : SyncTarget
        The block, after `setup`.
    replicas : Comm
        The communicator of its replicas, after `setup`.
    compressor : Compressor
        Averages weight deltas between nodes; a compressing wrapper passes its own to `setup`.
    in_sync : bool
        Whether all replicas hold the same parameters, bit for bit, since the last update. The
        debug mode verifies it.
    """

    in_sync = True

    @abstractmethod
    def traits(self) -> SyncTraits:
        """Return the properties of this sync; pure in its fields."""

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Attach the sync to a block before the first update. Collective over the replicas."""
        self.block = block
        self.replicas = replicas
        self.compressor = compressor

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """Say whether this replica's optimizer takes a step in an update.

        By default a replica without samples skips it where replicas diverge: it has no gradient.
        """
        return weight > 0 or not self.traits().replicas_diverge

    def communication_cost(self) -> tuple[float, float]:
        """Return the means of the block per update, inside nodes and between them.

        The time estimate multiplies them by the time of one mean. A sync with phases returns those
        of its longest phase.
        """
        return 1.0, 1.0

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return the replicas over which the gradients of an update are averaged, None for none.

        The all-reduce may start in the last backward before the update; `weight` is that of
        `before_update`. Called once per update.
        """
        return None

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Change the gradients in place, after they were averaged over the `gradient_group`.

        Parameters
        ----------
        weight : float
            Rows of this replica over the rows of all replicas, in this update.
        """

    def before_skipped_update(self, clock: UpdateClock) -> None:
        """Prepare for an update in which no replica takes a step, in place of `before_update`.

        Called where a loss or a gradient is not finite; `after_update` follows. By default
        `before_update` without gradients.
        """
        self.before_update([], 0.0, clock)

    @cached_property
    def reducer(self) -> GradientReducer:
        """The bucketed all-reduce of the block's gradients."""
        return GradientReducer()

    @final
    def gradient_hook(self, block: Block, weight: float, clock: UpdateClock) -> GradientHook | None:
        """Return the hook of the last backward before an update; it starts the all-reduce.

        None where no gradients are averaged. `reduce_gradients` must follow.
        """
        return self._start_reducer(block, weight, clock)

    @final
    def reduce_gradients(self, block: Block, weight: float, clock: UpdateClock) -> None:
        """Average the gradients of an update, then `before_update`. Collective over the replicas.

        Parameters that have no gradient on any replica of the group have none afterwards.
        """
        missing = block.fill_gradients()
        if self.replicas.size > 1:
            if not self.reducer.started:
                self._start_reducer(block, weight, clock)
            missing = self.reducer.finish(missing)
            agreed = self.reducer.group is not None and block.may_skip_parameters
            if not agreed and (block.may_skip_parameters or 0 in clock.rows_per_replica):
                missing = self._agree_on_missing(block, missing, weight, clock)
        self.before_update(block.gradients(), weight, clock)
        if missing:
            block.drop_gradients(missing)

    def averaging_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return the replicas over which `before_update` averages gradients, None for none.

        Called where `gradient_group` returned None, and replicas may have gradients of different
        parameters.
        """
        return None

    def _start_reducer(
        self, block: Block, weight: float, clock: UpdateClock
    ) -> GradientHook | None:
        return self.reducer.start(
            block, self.gradient_group(weight, clock), block.may_skip_parameters
        )

    def _agree_on_missing(
        self, block: Block, missing: list[nn.Parameter], weight: float, clock: UpdateClock
    ) -> list[nn.Parameter]:
        """Return the parameters without a gradient on all replicas that average gradients.

        Collective over these. A replica without samples lacks all gradients.
        """
        group = self.reducer.group or self.averaging_group(weight, clock)
        if group is None or group.comm.size == 1:
            return missing
        missing_ids = set(map(id, missing))
        parameters = list(enumerate(block.trainable_parameters))
        own_numbers = [number for number, p in parameters if id(p) in missing_ids]
        first, *others = map(set, group.comm.allgather_object(own_numbers))
        common = first.intersection(*others)
        return [parameter for number, parameter in parameters if number in common]

    def lr_factor(self, clock: UpdateClock) -> float:
        """Return the factor by which the learning rate of an update is multiplied."""
        return 1.0

    def optimizer_step(self, clock: UpdateClock) -> OptimizerStep | None:
        """Return the function that replaces the optimizer's step, None to keep it."""
        return None

    @abstractmethod
    def after_update(self, clock: UpdateClock) -> None:
        """Change the parameters in place after the optimizer's step, and set `in_sync`."""

    @abstractmethod
    def end_epoch(self, loss: float) -> None:
        """Receive the training loss of an epoch, the same number on all stages and replicas."""

    @abstractmethod
    def finish_pending(self) -> None:
        """Wait for communication in flight at a segment's end, without deciding anything."""

    @abstractmethod
    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return the parameters and buffers that are evaluated, saved and digested."""

    def low_rank_stats(self) -> dict[str, LowRankStats]:
        """Return rank and traffic of every trained tensor; empty unless it factorizes matrices."""
        return {}

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return by name the state that a restart needs beyond the block's own."""

    def restore_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Give the block's parameters the shapes that they had with a state; before `restore`."""
        return None

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors that `state` returned; those of the block are loaded before."""


def require_at_least(key: str, value: float | None, minimum: float) -> None:
    """Raise `ConfigError` if a number of ``[sync]`` is below `minimum`; None is accepted."""
    if value is not None and value < minimum:
        raise ConfigError("sync.too-small", f"[sync] {key} = {value} must be at least {minimum}")


def diverging_tensors(block: SyncTarget) -> dict[str, Tensor]:
    """Return the tensors that differ between diverging replicas, by name.

    Frozen parameters are left out, because a mean of equal numbers need not be that number.
    """
    return block.trainable_tensors() | block.unsynced_buffers


def replica_mean(
    replicas: Comm, tensors: Mapping[str, Tensor], first_replica: Container[str] = ()
) -> dict[str, Tensor]:
    """Return the means of `tensors` over the replicas, as copies. Collective over the replicas.

    Integers are not averaged: they are this replica's own. Tensors whose names are in
    `first_replica` are those of replica 0.
    """
    copies = clone_all(tensors)
    averaged = {name: tensor for name, tensor in copies.items() if name not in first_replica}
    replicas.mean_([tensor for tensor in averaged.values() if has_mean(tensor)])
    replicas.broadcast_([tensor for name, tensor in copies.items() if name not in averaged])
    return copies


def complete_optimizer_state(
    replicas: Comm, optimizer_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return an optimizer state with the entries that any replica has. Collective over them.

    A replica has no entries for a parameter that never had a gradient there. Its moments are zeros
    then, and its counts those of the first replica that has them. The order of the entries is the
    same on all replicas.
    """
    own_entries = {}
    for key, tensor in optimizer_state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        own_entries[key] = list(tensor.shape), dtype, None if tensor.dim() else float(tensor)
    complete: dict[str, Tensor] = {}
    for entries in replicas.allgather_object(own_entries):
        for key, (shape, dtype, count) in entries.items():
            if key not in complete:
                missing = torch.full(shape, count or 0.0, dtype=getattr(torch, dtype))
                complete[key] = optimizer_state.get(key, missing)
    return complete


def has_mean(tensor: Tensor) -> bool:
    """Return whether a tensor has a mean over replicas: it holds no integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def clone_all(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of each tensor."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under names that begin with `prefix`; the reverse of `select_prefix`."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def select_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries of a state whose names begin with `prefix`, under the rest of the name."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
