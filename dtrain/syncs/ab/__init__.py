"""AB: replicas in two halves, each training one of two factors of every matrix, apart.

A run has a full-rank warm-up, and then periods: full rank for some updates, then low rank. For low
rank a matrix W (a x b) is split by its singular values, W = A B with A = U sqrt(S), B = sqrt(S) V',
those below `cutoff` times the largest cut away. Groups of replicas train A or B, the other factor
resting; nothing crosses between groups until they agree again::

    update    0 ... warm-up | low rank, nothing cut ... | full | low rank, cut ... | full | low ...
    gradients   all           inside each group           all    inside each group
                            split                     merge  split              merge

What a merge makes of W, by `mode`::

    full           mean of A B over replicas
    with-stale     (mean of A) (mean of B), those that rested included
    only-learned   (mean of A over those who trained it) (the same of B)
    only-b         A (mean of B): nobody trains A

First and last weights of the model, heads, and all that is no matrix stay as they are and are
averaged inside groups, and over all replicas at a merge; so are their moments of the optimizer. A
factor begins with the moments that its matrix has by the chain rule; those of the matrix rest
meanwhile, and go on after the merge. After each change the learning rate starts at a 300th and
comes back over `rebound-updates`.

Sends, for n replicas on m nodes, N bytes of parameters, F of those that cross at a merge (in
`full` N, else the factors with the rest): in full rank 2 (m - 1) N per update between nodes, in low
rank nothing where groups stay inside nodes; a merge 2 (m - 1) (F + moments of what is no matrix).
Staleness: a period. One replica is the identity.

Source: Coquelin et al. 2024, "AB-Training: A Communication-Efficient Approach for Distributed
Low-Rank Learning", arXiv 2405.01067, and its code. Not kept: its rebound adds up over parameter
groups, so that later ones rise too steeply; its moments are cut or filled up with zeros to each
new shape, so that those of an element of W become those of an element of A.

Invariant: in full rank all replicas are equal, optimizers included; ranks of a group always are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dtrain.block.parameters import matrix_name
from dtrain.comm.communicator import Comm
from dtrain.syncs.ab.phases import FactorGroups, MergeMode, Phases
from dtrain.syncs.base import (
    LowRankStats,
    SyncTarget,
    UpdateClock,
    replica_mean,
    require_at_least,
    select_prefix,
)
from dtrain.syncs.common.local_updates import LocalUpdates
from dtrain.syncs.common.low_rank import (
    TrafficLedger,
    balanced_factors,
    factor_optimizer_state,
    factorize_with_zeros,
    kept_rank,
    require_whole_block,
    split_optimizer_state,
    svd,
)
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass
class AB(LocalUpdates):
    """Low-rank training in groups.

    The defaults are those that cost little accuracy in short runs (benchmark `ab_traffic`).

    Attributes
    ----------
    mode : str
        What a merge makes of the factors.
    warmup_updates : int, optional
        Of full rank at the start; left out: two fifths of the run.
    every : int, optional
        Updates of a period; left out: a fifteenth of the run.
    full_updates : int, optional
        Of full rank at the start of a period; left out: a tenth of it.
    rebound_updates : int, optional
        Over which the learning rate comes back; left out: a tenth of a period.
    cutoff : float
        Singular values up to this part of the largest are cut.
    group_size : int
        Replicas of a group; 0: half of them, with `only-b` all.
    """

    depends_on_run_length = True
    parameter_copies = 5
    reparametrises = True
    mode: MergeMode = "only-learned"
    warmup_updates: int | None = None
    every: int | None = None
    full_updates: int | None = None
    rebound_updates: int | None = None
    cutoff: float = 0.15
    group_size: int = 0

    def __post_init__(self) -> None:
        for key, low in (("warmup", 0), ("full", 1), ("rebound", 0)):
            require_at_least(f"{key}-updates", getattr(self, f"{key}_updates"), low)
        require_at_least("every", self.every, 2)
        require_at_least("cutoff", self.cutoff, 0)
        require_at_least("group-size", self.group_size, 0)
        self.in_low_rank, self._last_change = False, -1
        self._matrix_optimizer_state = dict[
            str, Tensor
        ]()  # the optimizer's state of matrices that are products

    def setup(self, block: SyncTarget, replicas: Comm) -> None:
        """Take the block, find its matrices, and join a group. Collective."""
        super().setup(block, replicas)
        self.weights = require_whole_block(block, "ab")
        self._matrix_names = self.weights.factorizable_weights()
        self._groups = FactorGroups.build(replicas.size, self.group_size, self.mode)
        own = self._groups.group_of_rank(replicas.rank)
        self._group_ranks, self.trains_a = self._groups.members[own], self._groups.trains_a(own)
        self._group = replicas.split(own, name=f"group {own}")
        self._node_group = replicas.split_by_node()
        self._ledger = TrafficLedger(self.weights, replicas.hosts)

    def phases(self, clock: UpdateClock) -> Phases:
        """Return the lengths of phases, those that are left out by the length of the run."""
        every = self.every or max(clock.total_updates // 15, 2)
        warmup = (
            2 * clock.total_updates // 5 if self.warmup_updates is None else self.warmup_updates
        )
        rebound = every // 10 if self.rebound_updates is None else self.rebound_updates
        return Phases(warmup, every, self.full_updates or max(every // 10, 1), rebound)

    def communication_cost(self) -> tuple[float, float]:
        """One per update inside nodes; between them two fifths, and a tenth of the rest."""
        return 1.0, 0.46

    def lr_factor(self, clock: UpdateClock) -> float:
        """By what the learning rate is multiplied: it rises again after a change."""
        since = clock.update - self._last_change
        return 1.0 if self._last_change < 0 else self.phases(clock).lr_factor(since)

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """A group without a sample rests."""
        return not self.in_low_rank or self._group_rows(clock) > 0

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Over all replicas in full rank, else inside the group."""
        if not self.in_low_rank:
            return WeightedGroup(self.replicas, weight)
        rows = self._group_rows(clock)
        return (
            WeightedGroup(self._group, clock.rows_per_replica[self.replicas.rank] / rows)
            if rows
            else None
        )

    def _group_rows(self, clock: UpdateClock) -> int:
        return sum(clock.rows_per_replica[rank] for rank in self._group_ranks)

    def after_update(self, clock: UpdateClock) -> None:
        """Split or merge, where the next update is of the other kind. Collective."""
        self._count_traffic()
        if self.replicas.size == 1:
            return
        following, phases = clock.update + 1, self.phases(clock)
        low = phases.is_low_rank(following) and not clock.ends_run
        if low != self.in_low_rank:
            if low:
                self._factorize(phases.truncates(following))
            else:
                self._merge()
            self._last_change = following

    def _count_traffic(self) -> None:
        """Count the means of an update, those of other groups, too."""
        self._ledger.count_update()
        values = self.weights.trainable_tensors()
        if not self.in_low_rank:
            self._ledger.count_mean(values)
            return
        for group, members in enumerate(self._groups.members):
            learns_b = not self._groups.trains_a(group)
            sides = {name: self._factor_sizes(name)[learns_b] for name in self._matrix_names}
            self._ledger.count_mean(self._other_tensors(values), members)
            self._ledger.count_elements(sides, members)

    def _factor_sizes(self, name: str) -> tuple[int, int]:
        """Return the numbers of A and of B."""
        tall, flat = sorted(self.weights.matrix_shape(name), reverse=True)
        rank = self.weights.low_rank_weights[name].rank
        return tall * rank, flat * rank

    def _other_tensors(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is part of no product."""
        return {
            name: each
            for name, each in values.items()
            if matrix_name(name) not in self._matrix_names
        }

    def _a_is_left(self, name: str) -> bool:
        """Say whether the tall factor stands left."""
        rows, columns = self.weights.matrix_shape(name)
        return rows >= columns

    def _trained_side(self, name: str) -> str:
        """Return which factor learns here."""
        return "left" if self.trains_a == self._a_is_left(name) else "right"

    def _factorize(self, truncate: bool) -> None:
        """Put factors in the place of matrices. All replicas agree on their ranks. Collective.

        Matrix i is split by replica i of a node, modulo their number, which tells the others.
        """
        own, memory, near = self.weights, self.weights.optimizer_state(), self._node_group
        mine = self._matrix_names[near.rank :: near.size]
        parts = {name: svd(own.parameters[name]) for name in mine}
        limit = self.cutoff if truncate else -1.0
        told = self.replicas.allgather_object(
            {name: kept_rank(s, limit) for name, (_, s, _) in parts.items()}
        )
        ranks = {name: max(each.get(name, 0) for each in told) for name in self._matrix_names}
        for number, (name, rank) in enumerate(ranks.items()):
            sides = balanced_factors(own.parameters[name], rank, parts.pop(name, None))
            near.broadcast_(sides, number % near.size)
            own.factorize(name, *sides).set_trainable(self._trained_side(name))
        self._ledger.set_ranks(ranks)
        state, self._matrix_optimizer_state = split_optimizer_state(memory, self._matrix_names)
        for name in self._matrix_names:
            state |= factor_optimizer_state(
                self._matrix_optimizer_state, name, own.low_rank_weights[name]
            )
        own.rebuild_optimizer(state)
        self.in_low_rank, self.in_sync = True, False

    def _merge(self) -> None:
        """Put matrices back in the place of factors; make optimizers equal. Collective."""
        own, memory = self.weights, self.weights.optimizer_state()
        self._ledger.count_mean(self._other_tensors(own.trainable_tensors()))
        self._ledger.count_elements({name: self._merge_size(name) for name in self._matrix_names})
        merged = self._merged_tensors()
        for name in self._matrix_names:
            own.merge_factors(name)
        for name, each in own.trainable_tensors().items():
            each.copy_(merged[name])
        state, _ = split_optimizer_state(memory, self._matrix_names)
        moments = {name: each for name, each in state.items() if each.dim()}
        self.replicas.mean_(moments)
        for key, each in moments.items():
            self._ledger.count_mean({key.rpartition("/")[0]: each})
        self.replicas.broadcast_({n: count for n, count in state.items() if not count.dim()})
        own.rebuild_optimizer(state | self._matrix_optimizer_state)
        self._matrix_optimizer_state = {}
        self.in_low_rank, self.in_sync = False, True

    def _merge_size(self, name: str) -> int:
        """Return how many numbers of a matrix a merge averages."""
        a, b = self._factor_sizes(name)
        kinds = {"full": math.prod(self.weights.matrix_shape(name)), "only-b": b}
        return kinds.get(self.mode, a + b)

    def _merged_tensors(self) -> dict[str, Tensor]:
        """Return all that is trained, and what rests, as a merge makes it. Collective."""
        own = self.weights
        pairs = {name: own.low_rank_weights[name] for name in self._matrix_names}
        found = replica_mean(self.replicas, self._other_tensors(own.trainable_tensors()))
        if self.mode == "full":
            whole = {n: (f.left @ f.right).detach() for n, f in pairs.items()}
            return found | self._reshape_products(replica_mean(self.replicas, whole))
        tall = {n: f.left if self._a_is_left(n) else f.right for n, f in pairs.items()}
        flat = {n: f.right if self._a_is_left(n) else f.left for n, f in pairs.items()}
        a = {name: each.detach().clone() for name, each in tall.items()}
        b = {name: each.detach().clone() for name, each in flat.items()}
        if self.mode == "only-learned":
            learners = self._groups.replicas_training_a()
            others = self.replicas.size - learners
            self.replicas.mean_(a, 1 / learners if self.trains_a else 0.0)
            self.replicas.mean_(b, 0.0 if self.trains_a else 1 / others)
        else:
            if self.mode == "with-stale":
                self.replicas.mean_(a)
            self.replicas.mean_(b)
        product = {n: a[n] @ b[n] if self._a_is_left(n) else b[n] @ a[n] for n in pairs}
        return found | self._reshape_products(product)

    def _reshape_products(self, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            n: each.view(self.weights.low_rank_weights[n].product.shape)
            for n, each in products.items()
        }

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return what a merge would make; collective."""
        if not self.in_low_rank:
            return super().evaluation_weights()
        drifting = replica_mean(self.replicas, self.block.unsynced_buffers)
        return self.weights.merged_tensors() | self._merged_tensors() | drifting

    def state(self) -> dict[str, Tensor]:
        """Return the phase, when it began, ranks and counts, and moments that rest."""
        told = {
            "low": torch.tensor(int(self.in_low_rank)),
            "changed": torch.tensor(self._last_change),
        }
        ledger = {f"ledger/{name}": each for name, each in self._ledger.state().items()}
        resting = {f"resting/{key}": each for key, each in self._matrix_optimizer_state.items()}
        return super().state() | told | ledger | resting

    def restore_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Give the block the shapes that a state was saved with."""
        if not int(state["low"]):
            return
        for name in self._matrix_names:
            made = factorize_with_zeros(self.weights, name, int(state[f"ledger/rank/{name}"]))
            made.set_trainable(self._trained_side(name))
        self.weights.rebuild_optimizer({})
        self.in_low_rank = True

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        super().restore(state)
        self._last_change = int(state["changed"])
        self._ledger.restore(select_prefix(state, "ledger/"))
        self._matrix_optimizer_state = select_prefix(state, "resting/")

    def low_rank_stats(self) -> dict[str, LowRankStats]:
        """Return rank and traffic of every weight."""
        return self._ledger.low_rank_stats()
