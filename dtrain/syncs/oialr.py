"""OIALR: low-rank training of small core matrices between frozen orthogonal bases.

After a delay of full rank a matrix W (a x b) is factorized by its SVD, W = U S V'. Only the core S
(k x k), from then on a full matrix, is trained and averaged. In rounds the core is decomposed in
its turn, S = U' s V'', and truncated::

    update    0 ... delay | every ...          | every ...               | ...
    trains    W           | S, full rank       | S of the last layers    | S of more layers ...
                        W = U S V'        U <- U U'  S <- s  V' <- V'' V'    each truncated

A round removes singular values below `cutoff` times the largest, at most half of them; 1/100 of the
first rank is kept. Each round tests a larger share of the matrices, from the last of the model on.
Replica i decomposes matrix i, modulo their number, and broadcasts the result. A matrix that loses
nothing is left as it is. First and last weights of the model, heads, linear maps with an aspect
ratio of 10 or more, and everything that is not a matrix stay full rank.

Sends, for n replicas on m nodes: 2 (m - 1) elements between nodes per update for each trained
element, k^2 of a matrix; a factorization (m - 1) k (a + b + 1). Staleness 0. With one replica it
trains the same low-rank model.

Source: Coquelin et al. 2024, "Harnessing Orthogonality to Train Low-Rank Neural Networks", arXiv
2401.08505, and its code. Three differences to that code: moments of S start at zero instead of
taking those of W; a matrix that is not truncated is not sent; the similarity of bases from round to
round, which decides nothing there, is not measured.

Invariant: all replicas hold the same U, S and V', since one of them computed them for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.base import (
    LowRankStats,
    SyncTarget,
    SyncTraits,
    UpdateClock,
    add_prefix,
    require_at_least,
    select_prefix,
)
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.common.low_rank import (
    TrafficLedger,
    factorize_with_zeros,
    require_whole_block,
    resize_optimizer_state,
    svd,
)
from dtrain.syncs.common.synchronous import SynchronousSync
from dtrain.syncs.gradient_reducer import WeightedGroup

MIN_RANK_FRACTION = 0.01
"""The part of its first rank that a matrix keeps."""

MAX_ASPECT_RATIO = 10
"""Linear maps whose sides have this ratio or a larger one stay full rank."""


@final
@dataclass
class OIALR(SynchronousSync):
    """Orthogonality-informed adaptive low-rank training.

    Attributes
    ----------
    delay_updates : int, optional
        Full-rank updates at the start; left out: a tenth of the run.
    every : int, optional
        Updates between two rounds; left out: a fiftieth of the run.
    cutoff : float
        The part of the largest singular value below which others are removed (beta).
    share : float
        The part of the matrices by which a round tests more than the one before.
    rest_rounds : int
        Rounds in which a truncated matrix is not tested again.
    first_rank : float
        The part of its singular values that a matrix keeps at first.
    keep_first : bool
        Whether the first weight of the model stays full rank.
    """

    delay_updates: int | None = None
    every: int | None = None
    cutoff: float = 0.1
    share: float = 0.1
    rest_rounds: int = 0
    first_rank: float = 1.0
    keep_first: bool = True

    def __post_init__(self) -> None:
        require_at_least("delay-updates", self.delay_updates, 1)
        require_at_least("every", self.every, 1)
        require_at_least("cutoff", self.cutoff, 0)
        require_at_least("share", self.share, 0)
        require_at_least("first-rank", self.first_rank, 0)
        require_at_least("rest-rounds", self.rest_rounds, 0)
        if self.first_rank > 1:
            raise ConfigError(
                "sync.first-rank", f"[sync] first-rank = {self.first_rank} must be at most 1"
            )
        self.low_rank_start = -1
        self._rounds_to_skip: dict[str, int] = {}

    def traits(self) -> SyncTraits:
        """Return traits of a sync that replaces matrices by products of three factors."""
        return replace(
            super().traits(),
            depends_on_run_length=self.delay_updates is None or self.every is None,
            parameter_copies=2,
            reparametrises=True,
        )

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Find the matrices of the block that can be factorized."""
        super().setup(block, replicas, compressor)
        self.weights = require_whole_block(block, "oialr")
        names = self.weights.factorizable_weights(include_first=not self.keep_first)
        self._matrix_names = [name for name in names if self._is_worth_factorizing(name)]
        self._initial_ranks = {name: self._initial_rank(name) for name in self._matrix_names}
        self._ledger = TrafficLedger(self.weights, replicas.nodes)

    def _is_worth_factorizing(self, name: str) -> bool:
        """Return whether a matrix is square enough; a convolution always is."""
        short, long = sorted(self.weights.matrix_shape(name))
        linear = self.weights.parameters[name].dim() == 2
        return not linear or short * MAX_ASPECT_RATIO > long

    def _initial_rank(self, name: str) -> int:
        return max(1, math.ceil(self.first_rank * min(self.weights.matrix_shape(name))))

    def phase_lengths(self, clock: UpdateClock) -> tuple[int, int]:
        """Return the updates of the full-rank delay, and of a round."""
        delay = clock.total_updates // 10 if self.delay_updates is None else self.delay_updates
        return max(delay, 1), self.every or max(clock.total_updates // 50, 1)

    def communication_cost(self) -> tuple[float, float]:
        """Return the means of cores at a quarter of full rank."""
        return 1 / 16, 1 / 16

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return all replicas, in every update."""
        return WeightedGroup(self.replicas, weight)

    def after_update(self, clock: UpdateClock) -> None:
        """Factorize all matrices, or truncate those of a round. Collective over the replicas."""
        self._ledger.count_mean(self.block.trainable_tensors())
        self._ledger.count_update()
        next_update, (delay, every) = clock.update + 1, self.phase_lengths(clock)
        if clock.ends_run:
            return
        if self.low_rank_start < 0:
            if next_update >= delay:
                self._factorize_all()
                self.low_rank_start = next_update
        elif (next_update - self.low_rank_start) % every == 0:
            self._truncate_round((next_update - self.low_rank_start) // every)

    def _factorize_all(self) -> None:
        """Replace every matrix by U, S and V'; S has no moments yet. Collective over replicas."""
        weights, optimizer_state = self.weights, self.weights.optimizer_state()
        for index, name in enumerate(self._matrix_names):
            shape, rank = weights.matrix_shape(name), self._initial_ranks[name]
            factors = None
            if index % self.replicas.size == self.replicas.rank:
                u, s, v = svd(weights.parameters[name])
                factors = [part.contiguous() for part in (u[:, :rank], s[:rank], v[:rank])]
            self._set_factors(name, factors, shape, rank, index)
        replaced = tuple(f"{name}/" for name in self._matrix_names)
        others = {
            key: tensor for key, tensor in optimizer_state.items() if not key.startswith(replaced)
        }
        weights.rebuild_optimizer(resize_optimizer_state(others, weights.trainable_tensors()))

    def _truncate_round(self, round_index: int) -> None:
        """Truncate the matrices of a round where they lose rank. Collective over the replicas."""
        weights, optimizer_state = self.weights, self.weights.optimizer_state()
        size, rank = self.replicas.size, self.replicas.rank
        tested = self._tested_matrices(round_index)
        decompositions = {name: self._rotated_svd(name) for name in tested[rank::size]}
        local_ranks = {name: len(s) for name, (_, s, _) in decompositions.items()}
        new_ranks: dict[str, int] = {}
        for ranks in self.replicas.allgather_object(local_ranks):
            new_ranks |= ranks
        truncated = [
            name for name in tested if new_ranks[name] < weights.low_rank_weights[name].rank
        ]
        for name in truncated:
            factors, shape = decompositions.get(name), weights.matrix_shape(name)
            self._set_factors(name, factors, shape, new_ranks[name], tested.index(name))
            self._rounds_to_skip[name] = self.rest_rounds
        if truncated:
            weights.rebuild_optimizer(
                resize_optimizer_state(optimizer_state, weights.trainable_tensors())
            )

    def _tested_matrices(self, round_index: int) -> list[str]:
        """Return the matrices that a round tests, from the last on; others skip a round less."""
        count = len(self._matrix_names)
        candidates = min(math.ceil(round_index * self.share * count), count)
        tested = []
        for name in reversed(self._matrix_names[count - candidates :]):
            rounds = self._rounds_to_skip.get(name, 0)
            self._rounds_to_skip[name] = max(rounds - 1, 0)
            if rounds == 0:
                tested.append(name)
        return tested

    def _rotated_svd(self, name: str) -> list[Tensor]:
        """Return U, s and V' in the basis of the core's singular vectors, truncated."""
        left, core, right = (
            factor.detach() for factor in self.weights.low_rank_weights[name].factors
        )
        u, s, v = svd(core)
        first_rank = self._initial_ranks[name]
        least_rank = max(math.ceil(len(s) / 2), int(MIN_RANK_FRACTION * first_rank), 1)
        rank = max(int((s >= self.cutoff * s[0]).sum()), least_rank)
        parts = left @ u[:, :rank], s[:rank], v[:rank] @ right
        return [part.contiguous() for part in parts]

    def _set_factors(
        self,
        name: str,
        factors: list[Tensor] | None,
        shape: tuple[int, int],
        rank: int,
        matrix_index: int,
    ) -> None:
        """Set a matrix to U diag(s) V' of the replica that computed them. Collective over replicas.

        That replica has the number `matrix_index` modulo their number; others pass None.
        """
        if factors is None:
            like = next(iter(self.block.trainable_tensors().values()))
            sizes = (shape[0], rank), (rank,), (rank, shape[1])
            factors = [like.new_empty(size) for size in sizes]
        self.replicas.broadcast_(factors, matrix_index % self.replicas.size)
        u, s, v = factors
        self.weights.factorize(name, u, s.diag(), v).set_trainable("core")
        self._ledger.count_elements({name: rank * (sum(shape) + 1) / 2})
        self._ledger.set_ranks({name: rank})

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return the block's tensors, with matrices in place of their factors."""
        return self.weights.merged_tensors()

    def low_rank_stats(self) -> dict[str, LowRankStats]:
        """Return rank and traffic of every trained tensor."""
        return self._ledger.low_rank_stats()

    def state(self) -> dict[str, Tensor]:
        """Return the start of low rank, the rounds to skip, ranks and counts."""
        rounds = {name: torch.tensor(count) for name, count in self._rounds_to_skip.items()}
        return {
            **super().state(),
            "begun": torch.tensor(self.low_rank_start),
            **add_prefix("rests/", rounds),
            **add_prefix("ledger/", self._ledger.state()),
        }

    def restore_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Factorize the matrices of a state in low rank, with zeros for their factors."""
        if int(state["begun"]) < 0:
            return
        for name in self._matrix_names:
            rank = int(state[f"ledger/rank/{name}"])
            factorize_with_zeros(self.weights, name, rank, with_core=True).set_trainable("core")
        self.weights.rebuild_optimizer({})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the start of low rank, the rounds to skip, ranks and counts."""
        super().restore(state)
        self.low_rank_start = int(state["begun"])
        rounds = select_prefix(state, "rests/")
        self._rounds_to_skip = {name: int(count) for name, count in rounds.items()}
        self._ledger.restore(select_prefix(state, "ledger/"))
