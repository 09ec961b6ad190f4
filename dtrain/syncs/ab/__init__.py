"""AB training: groups of replicas train one of two low-rank factors of every matrix.

A run has a full-rank warm-up, and then periods: full rank for some updates, then low rank. For the
low-rank phase a matrix W (a x b) is factorized by its SVD, W = A B with A = U sqrt(S) and
B = sqrt(S) V'; singular values below `cutoff` times the largest are truncated. Each group trains
A or B, while the other factor is frozen. Groups do not communicate until the merge::

    update    0 ... warm-up | low rank, not truncated | full | low rank, truncated | full | low ...
    gradients   all           inside each group         all    inside each group
                          factorize                  merge  factorize            merge

A merge makes of W, by `mode`::

    full           mean of A B over replicas
    with-stale     (mean of A) (mean of B), frozen factors included
    only-learned   (mean of A over the replicas that trained it) (the same of B)
    only-b         A (mean of B): no group trains A

First and last weights of the model, heads and everything that is not a matrix stay full rank. They
are averaged inside groups, and over all replicas at a merge, together with their optimizer moments.
A factor starts with the moments that follow from those of its matrix by the chain rule. Those of
the matrix are kept unchanged meanwhile, and continue after the merge. After each change the
learning rate starts at 1/300 and rises again over `rebound_updates`.

Sends, for n replicas on m nodes, N bytes of parameters, F bytes of those that are averaged at a
merge (in mode "full" N, else the factors and everything that stays full rank): in full rank
2 (m - 1) N per update between nodes; in low rank nothing where groups are inside nodes; a merge
2 (m - 1) (F + moments of what stays full rank). Staleness: a period. One replica is the identity.

Source: Coquelin et al. 2024, "AB-Training: A Communication-Efficient Approach for Distributed
Low-Rank Learning", arXiv 2405.01067, and its code. Two differences to that code: its rebound adds
up over parameter groups, so that later ones rise too steeply; its moments are cut or zero-padded to
each new shape, so that moments of an element of W become those of an unrelated element of A.

Invariant: in full rank all replicas are equal, optimizers included; replicas of a group always are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from dtrain.block.complex_tensors import view_as_originals
from dtrain.block.parameters import matrix_name
from dtrain.comm.communicator import Comm
from dtrain.syncs.ab.phases import FactorGroups, MergeMode, Phases
from dtrain.syncs.base import (
    LowRankStats,
    SyncTarget,
    SyncTraits,
    UpdateClock,
    add_prefix,
    clone_all,
    complete_optimizer_state,
    replica_mean,
    require_at_least,
    select_prefix,
)
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
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
    """AB training.

    The defaults are those that cost little accuracy in short runs (benchmark `ab_traffic`).

    Attributes
    ----------
    mode : str
        How a merge combines the factors of the groups.
    warmup_updates : int, optional
        Full-rank updates at the start; left out: two fifths of the run.
    every : int, optional
        Updates of a period; left out: a fifteenth of the run.
    full_updates : int, optional
        Full-rank updates at the start of a period; left out: a tenth of it.
    rebound_updates : int, optional
        Updates over which the learning rate rises again; left out: a tenth of a period.
    cutoff : float
        The part of the largest singular value up to which others are truncated.
    group_size : int
        Replicas of a group; 0: half of them, in mode "only-b" all.
    """

    mode: MergeMode = "only-learned"
    warmup_updates: int | None = None
    every: int | None = None
    full_updates: int | None = None
    rebound_updates: int | None = None
    cutoff: float = 0.15
    group_size: int = 0

    def __post_init__(self) -> None:
        require_at_least("warmup-updates", self.warmup_updates, 0)
        require_at_least("every", self.every, 2)
        require_at_least("full-updates", self.full_updates, 1)
        require_at_least("rebound-updates", self.rebound_updates, 0)
        require_at_least("cutoff", self.cutoff, 0)
        require_at_least("group-size", self.group_size, 0)
        self.in_low_rank = False
        self._last_change = -1
        self._matrix_optimizer_state: dict[str, Tensor] = {}  # of matrices that are factorized

    def traits(self) -> SyncTraits:
        """Return traits of a sync that replaces matrices by products of two factors."""
        return replace(
            super().traits(),
            depends_on_run_length=True,
            parameter_copies=5,
            reparametrises=True,
        )

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Find the block's matrices and join a group. Collective over the replicas."""
        super().setup(block, replicas, compressor)
        self.weights = require_whole_block(block, "ab")
        self._matrix_names = self.weights.factorizable_weights()
        self._groups = FactorGroups.build(replicas.size, self.group_size, self.mode)
        group = self._groups.group_of_rank(replicas.rank)
        self._group_ranks = self._groups.members[group]
        self.trains_a = self._groups.trains_a(group)
        self._group = replicas.split(group, name=f"group {group}")
        self._node_group = replicas.split_by_node()
        self._ledger = TrafficLedger(self.weights, replicas.nodes)

    def phases(self, clock: UpdateClock) -> Phases:
        """Return the lengths of the phases; those left out follow from the length of the run."""
        total = clock.total_updates
        every = self.every or max(total // 15, 2)
        return Phases(
            warmup=2 * total // 5 if self.warmup_updates is None else self.warmup_updates,
            period=every,
            full_rank=self.full_updates or max(every // 10, 1),
            rebound=every // 10 if self.rebound_updates is None else self.rebound_updates,
        )

    def communication_cost(self) -> tuple[float, float]:
        """Return one mean inside nodes; between them two fifths, and a tenth of the rest."""
        return 1.0, 0.46

    def lr_factor(self, clock: UpdateClock) -> float:
        """Return the factor of the rebound after a phase change."""
        if self._last_change < 0:
            return 1.0
        return self.phases(clock).lr_factor(clock.update - self._last_change)

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """Return whether the replica's group has samples, or all replicas average in full rank."""
        return not self.in_low_rank or self._group_rows(clock) > 0

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return all replicas in full rank, else those of the group."""
        if not self.in_low_rank:
            return WeightedGroup(self.replicas, weight)
        rows = self._group_rows(clock)
        if not rows:
            return None
        return WeightedGroup(self._group, clock.rows_per_replica[self.replicas.rank] / rows)

    def _group_rows(self, clock: UpdateClock) -> float:
        return sum(clock.rows_per_replica[rank] for rank in self._group_ranks)

    def after_update(self, clock: UpdateClock) -> None:
        """Factorize or merge before the phase changes. Collective over the replicas."""
        self._count_traffic()
        if self.replicas.size == 1:
            return
        next_update, phases = clock.update + 1, self.phases(clock)
        low_rank_next = phases.is_low_rank(next_update) and not clock.ends_run
        if low_rank_next != self.in_low_rank:
            if low_rank_next:
                self._factorize(phases.truncates(next_update))
            else:
                self._merge()
            self._last_change = next_update

    # ---- factorize

    def _factorize(self, truncate: bool) -> None:
        """Replace matrices by factors, of equal ranks on all replicas. Collective over them.

        Replica i of a node decomposes matrix i, modulo their number, and broadcasts its factors
        inside the node.
        """
        weights, node = self.weights, self._node_group
        optimizer_state = weights.optimizer_state()
        decompositions = {
            name: svd(weights.parameters[name])
            for name in self._matrix_names[node.rank :: node.size]
        }
        ranks = self._agree_on_ranks(
            {name: singular_values for name, (_, singular_values, _) in decompositions.items()},
            self.cutoff if truncate else -1.0,
        )
        for index, (name, rank) in enumerate(ranks.items()):
            weight = weights.parameters[name]
            factors = balanced_factors(weight, rank, decompositions.pop(name, None))
            node.broadcast_(factors, index % node.size)
            weights.factorize(name, *factors).set_trainable(self._trained_side(name))
        self._ledger.set_ranks(ranks)
        state, matrix_state = split_optimizer_state(optimizer_state, self._matrix_names)
        for name in self._matrix_names:
            product = weights.low_rank_weights[name]
            state |= factor_optimizer_state(matrix_state, name, product)
        self._matrix_optimizer_state = matrix_state
        weights.rebuild_optimizer(state)
        self.in_low_rank = True
        self.in_sync = False

    def _agree_on_ranks(
        self, singular_values: Mapping[str, Tensor], cutoff: float
    ) -> dict[str, int]:
        """Return the largest rank that any node keeps of each matrix. Collective over replicas."""
        local_ranks = {name: kept_rank(values, cutoff) for name, values in singular_values.items()}
        all_ranks = self.replicas.allgather_object(local_ranks)
        return {name: max(ranks.get(name, 0) for ranks in all_ranks) for name in self._matrix_names}

    def _a_is_left(self, name: str) -> bool:
        """Return whether A, the tall factor, is the left one."""
        rows, columns = self.weights.matrix_shape(name)
        return rows >= columns

    def _trained_side(self, name: str) -> str:
        """Return which factor this replica trains."""
        return "left" if self.trains_a == self._a_is_left(name) else "right"

    # ---- merge

    def _merge(self) -> None:
        """Replace factors by matrices, and make optimizers equal. Collective over the replicas."""
        weights = self.weights
        optimizer_state = weights.optimizer_state()
        self._ledger.count_mean(self._full_rank_tensors())
        self._ledger.count_elements({name: self._merge_size(name) for name in self._matrix_names})
        merged = self._merged_tensors()
        for name in self._matrix_names:
            weights.merge_factors(name)
        for name, weight in weights.trainable_tensors().items():
            weight.copy_(merged[name])
        others, _ = split_optimizer_state(optimizer_state, self._matrix_names)
        state = complete_optimizer_state(self.replicas, others)
        moments = {key: tensor for key, tensor in state.items() if tensor.dim()}
        self.replicas.mean_(moments)
        for key, moment in moments.items():
            self._ledger.count_mean({key.rpartition("/")[0]: moment})
        self.replicas.broadcast_({key: count for key, count in state.items() if not count.dim()})
        weights.rebuild_optimizer(state | self._matrix_optimizer_state)
        self._matrix_optimizer_state = {}
        self.in_low_rank = False
        self.in_sync = True

    def _merged_tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors as a merge makes them. Collective over the replicas."""
        products = {name: self.weights.low_rank_weights[name] for name in self._matrix_names}
        merged = replica_mean(self.replicas, self._full_rank_tensors())
        if self.mode == "full":
            matrices = replica_mean(
                self.replicas,
                {name: (p.left @ p.right).detach() for name, p in products.items()},
            )
        else:
            a = clone_all({name: self._factors(name)[0] for name in products})
            b = clone_all({name: self._factors(name)[1] for name in products})
            self._average_factors(a, b)
            matrices = {
                name: a[name] @ b[name] if self._a_is_left(name) else b[name] @ a[name]
                for name in products
            }
        return merged | {
            name: matrix.view(products[name].shape) for name, matrix in matrices.items()
        }

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a matrix, detached."""
        product = self.weights.low_rank_weights[name]
        left, right = product.left.detach(), product.right.detach()
        return (left, right) if self._a_is_left(name) else (right, left)

    def _average_factors(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
        """Average the factors in place, by the mode. Collective over the replicas."""
        if self.mode == "only-learned":
            training_a = self._groups.replicas_training_a()
            training_b = self.replicas.size - training_a
            self.replicas.mean_(a, 1 / training_a if self.trains_a else 0.0)
            self.replicas.mean_(b, 0.0 if self.trains_a else 1 / training_b)
            return
        if self.mode == "with-stale":
            self.replicas.mean_(a)
        self.replicas.mean_(b)

    def _full_rank_tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors that never become products."""
        return {
            name: tensor
            for name, tensor in self.weights.trainable_tensors().items()
            if matrix_name(name) not in self._matrix_names
        }

    # ---- traffic

    def _count_traffic(self) -> None:
        """Count the means of an update, those of other groups included."""
        self._ledger.count_update()
        if not self.in_low_rank:
            self._ledger.count_mean(self.weights.trainable_tensors())
            return
        for group, ranks in enumerate(self._groups.members):
            side = 0 if self._groups.trains_a(group) else 1
            sizes = {name: self._factor_sizes(name)[side] for name in self._matrix_names}
            self._ledger.count_mean(self._full_rank_tensors(), ranks)
            self._ledger.count_elements(sizes, ranks)

    def _factor_sizes(self, name: str) -> tuple[int, int]:
        """Return the elements of A and of B."""
        tall, flat = sorted(self.weights.matrix_shape(name), reverse=True)
        rank = self.weights.low_rank_weights[name].rank
        return tall * rank, flat * rank

    def _merge_size(self, name: str) -> int:
        """Return how many elements of a matrix a merge averages."""
        a, b = self._factor_sizes(name)
        sizes = {"full": math.prod(self.weights.matrix_shape(name)), "only-b": b}
        return sizes.get(self.mode, a + b)

    # ---- evaluation and state

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return the tensors as a merge would make them. Collective over the replicas."""
        if not self.in_low_rank:
            return super().evaluation_weights()
        buffers = replica_mean(
            self.replicas, self.block.unsynced_buffers, self.block.first_replica_buffers
        )
        tensors = self.weights.merged_tensors()
        return tensors | view_as_originals(self._merged_tensors(), tensors) | buffers

    def low_rank_stats(self) -> dict[str, LowRankStats]:
        """Return rank and traffic of every trained tensor."""
        return self._ledger.low_rank_stats()

    def state(self) -> dict[str, Tensor]:
        """Return phase, last change, ranks, counts, and the moments of factorized matrices."""
        return {
            **super().state(),
            "low": torch.tensor(int(self.in_low_rank)),
            "changed": torch.tensor(self._last_change),
            **add_prefix("ledger/", self._ledger.state()),
            **add_prefix("resting/", self._matrix_optimizer_state),
        }

    def restore_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Factorize the matrices of a state in low rank, with zeros for their factors."""
        if not int(state["low"]):
            return
        for name in self._matrix_names:
            rank = int(state[f"ledger/rank/{name}"])
            product = factorize_with_zeros(self.weights, name, rank)
            product.set_trainable(self._trained_side(name))
        self.weights.rebuild_optimizer({})
        self.in_low_rank = True

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load phase, last change, ranks, counts, and the moments of factorized matrices."""
        super().restore(state)
        self._last_change = int(state["changed"])
        self._ledger.restore(select_prefix(state, "ledger/"))
        self._matrix_optimizer_state = select_prefix(state, "resting/")
