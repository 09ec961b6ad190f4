"""DASO: node-local synchronous training with asynchronous averages of weights between nodes.

A run has a blocking warm-up, a cycling phase and a blocking cool-down. In the blocking phases
gradients are averaged over all replicas, as `every-step` does. While cycling, gradients are
averaged inside a node; every S updates one replica of each node, another one each time, sends its
weights. Their mean over the P nodes is computed during the next B updates, then merged (k = 2 B)::

    x <- (k x + sum over nodes of x_i) / (k + P)

    update      0    1    2    3    4    5    6    7  | end of the epoch     S = 4, B = 2
                send      merge     send      merge   | mean of weights and optimizer state

An epoch ends on a blocking mean of weights and optimizer state. After three epochs without progress
of the training loss S and B are halved; when both are 1 they start again.

Sends, for n replicas on P nodes of g, N bytes of parameters: in a blocking phase 2 (n - 1) N per
update in all, 2 (P - 1) N of it between nodes; cycling, 2 (P - 1) N / S per update between nodes,
and inside each node 2 (g - 1) N of gradients and (g - 1) N / S of merged weights. Staleness: B
updates while cycling, else 0. On one node it is `every-step`, bit for bit.

Source: Coquelin et al. 2022, "Accelerating neural network training with distributed asynchronous
and selective optimization (DASO)", arXiv 2104.05588. Its implementation in heat differs from the
paper in some points; `tests/witness/heat.py` has that order of operations.

Invariant: what is sent and merged, and when, follows from the clock and from the losses of epochs.
Neither segments nor resuming change a run. Replicas are equal, optimizer state included, in both
blocking phases and at the end of every epoch; a mean is merged with the weight of its real delay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import (
    SyncTarget,
    SyncTraits,
    UpdateClock,
    complete_optimizer_state,
    has_mean,
    require_at_least,
)
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.common.local_updates import LocalUpdates
from dtrain.syncs.common.node_groups import NodeGroups, inter_node_groups
from dtrain.syncs.daso.async_merge import AsyncMean
from dtrain.syncs.daso.plateau import PlateauDetector
from dtrain.syncs.gradient_reducer import WeightedGroup

MAX_BLOCKING_EPOCHS = 4
"""The longest blocking phase whose length is left out of the run file, as in heat."""


@final
@dataclass
class DASO(LocalUpdates):
    """Distributed asynchronous and selective optimization. Nodes may be of unequal size.

    Attributes
    ----------
    warmup_epochs, cooldown_epochs : int, optional
        Epochs of the blocking phases; left out: a tenth of the run, at least 1 and at most 4.
    max_global_skips : int
        Updates between two sends (S) when cycling starts.
    skip_reduction_factor : int
        The divisor of S and B on a plateau.
    wait_factor : int
        S / B when cycling starts; heat calls it ``local_skip_factor``.
    stability_level : float
        The part of the best training loss by which another must be lower to be progress.
    local_every : int
        1: gradients are averaged inside a node in every update. Else the replicas of a node take
        local steps, and their weights are averaged every so many updates and before each send.
    downcast : "none" or "bfloat16"
        The dtype of gradients between nodes in the blocking phases. Sums are made in float32.
    """

    warmup_epochs: int | None = None
    cooldown_epochs: int | None = None
    max_global_skips: int = 8
    skip_reduction_factor: int = 2
    wait_factor: int = 4
    stability_level: float = 0.05
    local_every: int = 1
    downcast: Literal["none", "bfloat16"] = "none"

    def __post_init__(self) -> None:
        require_at_least("warmup-epochs", self.warmup_epochs, 0)
        require_at_least("cooldown-epochs", self.cooldown_epochs, 0)
        require_at_least("max-global-skips", self.max_global_skips, 1)
        require_at_least("skip-reduction-factor", self.skip_reduction_factor, 2)
        require_at_least("wait-factor", self.wait_factor, 1)
        require_at_least("stability-level", self.stability_level, 0)
        require_at_least("local-every", self.local_every, 1)

    def traits(self) -> SyncTraits:
        """Return traits of diverging replicas with one copy of the weights in flight."""
        return replace(super().traits(), depends_on_run_length=True, parameter_copies=1)

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Attach the sync to a block, and group its replicas. Collective over the replicas."""
        super().setup(block, replicas, compressor)
        self._nodes = NodeGroups(replicas)
        groups = inter_node_groups(replicas, self._nodes) if self._nodes.node_count > 1 else []
        self._async_mean = AsyncMean(block, self._nodes, groups, compressor)
        self._plateau = PlateauDetector(self.stability_level)
        self._last_clock: UpdateClock | None = None
        self._reset_skips()

    def communication_cost(self) -> tuple[float, float]:
        """Return the means of the cycling phase: one inside nodes, 1 / S between them."""
        return 1 / self.local_every, 1 / self.max_global_skips

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """Return True: all replicas step, so that their optimizers count the same steps."""
        return True

    def is_blocking(self, clock: UpdateClock) -> bool:
        """Return whether an update is in a blocking phase."""
        first_cooldown_epoch = clock.total_epochs - _phase_epochs(self.cooldown_epochs, clock)
        return self._in_warmup(clock.epoch, clock) or clock.epoch >= first_cooldown_epoch

    def _in_warmup(self, epoch: int, clock: UpdateClock) -> bool:
        return epoch < _phase_epochs(self.warmup_epochs, clock)

    def _reset_skips(self) -> None:
        """Set S and B to their values at the start of cycling."""
        self._skips = self.max_global_skips
        self._delay = max(self._skips // self.wait_factor, 1)

    @property
    def _spans_nodes(self) -> bool:
        return self._nodes.node_count > 1

    @property
    def _downcasts(self) -> bool:
        return self.downcast == "bfloat16" and self._spans_nodes

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return all replicas in the blocking phases, else those of the node.

        `before_update` averages gradients that are downcast; with `local_every` > 1 they are not
        averaged while cycling.
        """
        if self.is_blocking(clock):
            return None if self._downcasts else WeightedGroup(self.replicas, weight)
        if self.local_every > 1:
            return None
        return self._nodes.weighted_group(clock.rows_per_replica)

    def averaging_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return all replicas where gradients are downcast, in the blocking phases."""
        return WeightedGroup(self.replicas, weight) if self.is_blocking(clock) else None

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Average downcast gradients; copy the weights from which deltas are counted."""
        if self.is_blocking(clock):
            if self._downcasts and gradients:
                self._average_downcast(gradients, clock)
        elif self.in_sync:
            self._async_mean.save_base_weights()

    def _average_downcast(self, gradients: Sequence[Tensor], clock: UpdateClock) -> None:
        """Average over all replicas, in bfloat16 between nodes. Collective over the replicas."""
        node, async_mean = self._nodes.weighted_group(clock.rows_per_replica), self._async_mean
        if node is not None:
            node.comm.mean_(self.block.name_gradients(gradients), node.weight)
        if (group := async_mean.active_group) is not None:
            narrow = [gradient.to(torch.bfloat16) for gradient in gradients]
            node_rows = self._nodes.node_rows(clock.rows_per_replica)
            group.mean_(narrow, node_rows / sum(clock.rows_per_replica))
            for gradient, mean in zip(gradients, narrow, strict=True):
                gradient.copy_(mean)
        self._nodes.node_group.broadcast_(gradients, self._nodes.root(async_mean.active_index))
        async_mean.rotate()

    def after_update(self, clock: UpdateClock) -> None:
        """Merge and send while cycling, and synchronise all at the end of an epoch.

        Collective over the replicas.
        """
        self._last_clock = clock
        if self.is_blocking(clock) or (self.local_every == 1 and not self._spans_nodes):
            return
        self.in_sync = False
        if self.local_every > 1 and (clock.update + 1) % self.local_every == 0:
            self._average_in_node()
        async_mean = self._async_mean
        if (sent := async_mean.in_flight) is not None and clock.update >= sent.due_update:
            async_mean.in_flight = None
            async_mean.merge(sent)
        if clock.ends_epoch:
            self._synchronise()
        elif self._spans_nodes and self._sends(clock):
            if self.local_every > 1:  # what is sent stands for the whole node
                self._average_in_node()
            async_mean.in_flight = async_mean.send(clock, self._delay)
            async_mean.rotate()

    def _sends(self, clock: UpdateClock) -> bool:
        """Return whether to send a mean; it must be merged before the epoch ends."""
        return clock.epoch_offset % self._skips == 0 and self._delay < clock.epoch_updates_left

    def _average_in_node(self) -> None:
        self._nodes.node_group.mean_(self.block.trainable_tensors())

    def _synchronise(self) -> None:
        """Make all replicas equal: weights, moments and step counts. Collective over them."""
        state = self.block.optimizer_state()
        complete = complete_optimizer_state(self.replicas, state)
        if complete.keys() != state.keys():
            self.block.add_optimizer_state(complete)
            state = self.block.optimizer_state()
        state = {key: state[key] for key in complete}
        moments = {
            key: tensor for key, tensor in state.items() if tensor.dim() and has_mean(tensor)
        }
        self.replicas.mean_(self.block.trainable_tensors() | moments)
        self.replicas.broadcast_({key: count for key, count in state.items() if not count.dim()})
        self.in_sync = True

    def end_epoch(self, loss: float) -> None:
        """Reduce S and B on a plateau of the training loss; from 1 they start again."""
        clock = self._last_clock
        assert clock is not None
        if self._in_warmup(clock.epoch + 1, clock) or not self._plateau.observe(loss):
            return
        if self._skips > 1:
            self._skips = max(self._skips // self.skip_reduction_factor, 1)
            self._delay = max(self._delay // self.skip_reduction_factor, 1)
        else:
            self._reset_skips()

    def finish_pending(self) -> None:
        """Wait for the mean in flight, which is merged later."""
        if self._async_mean.in_flight is not None:
            self._async_mean.in_flight.finish()

    def state(self) -> dict[str, Tensor]:
        """Return the counters, and the mean that is not merged yet."""
        return {
            **super().state(),
            "skips": torch.tensor(self._skips),
            "wait": torch.tensor(self._delay),
            "bad": torch.tensor(self._plateau.bad_epochs),
            "best": torch.tensor(self._plateau.best, dtype=torch.float64),
            **self._async_mean.state(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the counters, and the mean that is not merged yet."""
        super().restore(state)
        self._skips = int(state["skips"])
        self._delay = int(state["wait"])
        self._plateau.bad_epochs = int(state["bad"])
        self._plateau.best = float(state["best"])
        self._async_mean.restore(state)


def _phase_epochs(setting: int | None, clock: UpdateClock) -> int:
    """Return the epochs of a blocking phase."""
    if setting is not None:
        return setting
    return min(max(round(clock.total_epochs / 10), 1), MAX_BLOCKING_EPOCHS)
