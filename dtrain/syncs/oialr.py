"""OIALR: orthogonal bases that rest, and small matrices between them that learn.

After a delay of full rank a matrix W (a x b) is split by its singular values, W = U S V', and only
S (k x k), now a full matrix, learns and is averaged. In rounds, S = U' s V'' is split in its turn::

    update    0 ... delay | every ...          | every ...               | ...
    learns    W           | S, full rank       | S of the last layers    | S of more layers ...
                        W = U S V'        U <- U U'  S <- s  V' <- V'' V'    each cut to fewer s

Singular values below `cutoff` times the largest go, at most half of them in one round, and a
hundredth of the first stays. Each round tests a larger share of the matrices, the last of the model
first; matrix i is split by replica i modulo their number, which tells the others. One that loses
nothing stays as it is. First and last weights, heads, linear maps with one side ten times the
other, and all that is no matrix stay whole.

Sends, for n replicas on m nodes: 2 (m - 1) numbers between nodes per update for each that learns,
k^2 of a matrix; a split (m - 1) k (a + b + 1). Staleness 0. With one replica it trains the same.

Source: Coquelin et al. 2024, "Harnessing Orthogonality to Train Low-Rank Neural Networks", arXiv
2401.08505, and its code. Not kept: an optimizer's moments of W are not taken for those of S, which
begin at zero; a matrix that is not cut is not sent; how similar bases are from round to round,
which decides nothing there, is not measured.

Invariant: all replicas hold the same U, S and V', since one has worked them out for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.base import LowRankStats, SyncTarget, UpdateClock, require_at_least, select_prefix
from dtrain.syncs.common.low_rank import (
    TrafficLedger,
    factorize_with_zeros,
    require_whole_block,
    resize_optimizer_state,
    svd,
)
from dtrain.syncs.common.synchronous import SynchronousSync

MIN_RANK_FRACTION = 0.01
"""The part of its first rank that a matrix keeps."""


MAX_ASPECT_RATIO = 10
"""Linear maps with one side so many times the other stay whole."""


@final
@dataclass
class OIALR(SynchronousSync):
    """Low rank in a basis that was learnt first.

    Attributes
    ----------
    delay_updates : int, optional
        Of full rank at the start; left out: a tenth of the run.
    every : int, optional
        Updates between two rounds; left out: a fiftieth of the run.
    cutoff : float
        Singular values below this part of the largest are cut (beta).
    share : float
        By which the part of the matrices that a round tests grows with each.
    rest_rounds : int
        For how many rounds a matrix that was cut is not tested.
    first_rank : float
        Which part of its singular values a matrix keeps at first.
    keep_first : bool
        Whether the first weight of the model stays whole.
    """

    parameter_copies = 2
    reparametrises = True
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
        for key in ("cutoff", "share", "first_rank", "rest_rounds"):
            require_at_least(key.replace("_", "-"), getattr(self, key), 0)
        if self.first_rank > 1:
            raise ConfigError(
                "todo.key", f"[sync] first-rank = {self.first_rank} is no part: give at most 1"
            )
        self.depends_on_run_length = self.delay_updates is None or self.every is None
        self.low_rank_start, self._rounds_to_skip = -1, dict[str, int]()

    def setup(self, block: SyncTarget, replicas: Comm) -> None:
        """Take the block, and find its matrices."""
        super().setup(block, replicas)
        self.weights = require_whole_block(block, "oialr")
        names = self.weights.factorizable_weights(include_first=not self.keep_first)
        self._matrix_names = [name for name in names if self._is_worth_factorizing(name)]
        self._ledger = TrafficLedger(self.weights, replicas.hosts)
        self._initial_ranks = {name: self._initial_rank(name) for name in self._matrix_names}

    def _is_worth_factorizing(self, name: str) -> bool:
        """Say whether a matrix is worth it; convolutions are, whatever their shape."""
        short, long = sorted(self.weights.matrix_shape(name))
        linear = self.weights.parameters[name].dim() == 2
        return not linear or short * MAX_ASPECT_RATIO > long

    def _initial_rank(self, name: str) -> int:
        """Return the singular values with which a matrix begins."""
        return max(1, math.ceil(self.first_rank * min(self.weights.matrix_shape(name))))

    def phase_lengths(self, clock: UpdateClock) -> tuple[int, int]:
        """Return updates of full rank, and of a round."""
        delay = clock.total_updates // 10 if self.delay_updates is None else self.delay_updates
        return max(delay, 1), self.every or max(clock.total_updates // 50, 1)

    def communication_cost(self) -> tuple[float, float]:
        """As if each matrix were at a quarter of its rank."""
        return 1 / 16, 1 / 16

    def after_update(self, clock: UpdateClock) -> None:
        """Split matrices where it is time, all or those of a round. Collective."""
        self._ledger.count_mean(self.block.trainable_tensors())
        self._ledger.count_update()
        following, (delay, every) = clock.update + 1, self.phase_lengths(clock)
        if clock.ends_run:
            return
        if self.low_rank_start < 0 and following >= delay:
            self._factorize_all()
            self.low_rank_start = following
        elif self.low_rank_start >= 0 and (following - self.low_rank_start) % every == 0:
            self._truncate_round((following - self.low_rank_start) // every)

    def _factorize_all(self) -> None:
        """Put U, S and V' in the place of every matrix; its moments begin anew. Collective."""
        own, memory = self.weights, self.weights.optimizer_state()
        for number, name in enumerate(self._matrix_names):
            shape, rank = own.matrix_shape(name), self._initial_ranks[name]
            mine = number % self.replicas.size == self.replicas.rank
            parts = (
                [each.contiguous() for each in self._truncated_svd(name, rank)] if mine else None
            )
            self._set_factors(name, parts, shape, rank, number)
        gone = tuple(f"{name}/" for name in self._matrix_names)
        rest = {key: each for key, each in memory.items() if not key.startswith(gone)}
        own.rebuild_optimizer(resize_optimizer_state(rest, own.trainable_tensors()))

    def _truncated_svd(self, name: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first `rank` columns of U, singular values, and rows of V' of a matrix."""
        u, s, v = svd(self.weights.parameters[name])
        return u[:, :rank], s[:rank], v[:rank]

    def _truncate_round(self, round_index: int) -> None:
        """Test the matrices whose turn it is, and cut those that can be. Collective."""
        due = min(
            math.ceil(round_index * self.share * len(self._matrix_names)), len(self._matrix_names)
        )
        tested = [
            n
            for n in reversed(self._matrix_names[len(self._matrix_names) - due :])
            if self._is_due_for_test(n)
        ]
        own, memory = self.weights, self.weights.optimizer_state()
        size, rank = self.replicas.size, self.replicas.rank
        mine = {
            name: self._rotated_svd(name)
            for number, name in enumerate(tested)
            if number % size == rank
        }
        told = self.replicas.allgather_object({name: len(parts[1]) for name, parts in mine.items()})
        ranks = {name: int(count) for each in told for name, count in each.items()}
        cut = [name for name in tested if ranks[name] < own.low_rank_weights[name].rank]
        for name in cut:
            self._set_factors(
                name, mine.get(name), own.matrix_shape(name), ranks[name], tested.index(name)
            )
            self._rounds_to_skip[name] = self.rest_rounds
        if cut:
            own.rebuild_optimizer(resize_optimizer_state(memory, own.trainable_tensors()))

    def _is_due_for_test(self, name: str) -> bool:
        """Say whether a matrix is to be tested; it rests one round less from now on."""
        left = self._rounds_to_skip.get(name, 0)
        self._rounds_to_skip[name] = max(left - 1, 0)
        return left == 0

    def _rotated_svd(self, name: str) -> list[Tensor]:
        """Return U, s and V' in the basis of S's own singular vectors, cut."""
        outer, core, inner = (each.detach() for each in self.weights.low_rank_weights[name].factors)
        u, s, v = svd(core)
        least_rank = max(
            math.ceil(len(s) / 2), int(MIN_RANK_FRACTION * self._initial_ranks[name]), 1
        )
        rank = max(int((s >= self.cutoff * s[0]).sum()), least_rank)
        parts = outer @ u[:, :rank], s[:rank], v[:rank] @ inner
        return [each.contiguous() for each in parts]

    def _set_factors(
        self,
        name: str,
        factors: list[Tensor] | None,
        shape: tuple[int, int],
        rank: int,
        matrix_index: int,
    ) -> None:
        """Let a matrix be U diag(s) V', as the replica of this number found. Collective."""
        like = next(iter(self.block.trainable_tensors().values()))
        if factors is None:
            sizes = (shape[0], rank), (rank,), (rank, shape[1])
            factors = [like.new_empty(size) for size in sizes]
        self.replicas.broadcast_(factors, matrix_index % self.replicas.size)
        outer, s, inner = factors
        self.weights.factorize(name, outer, s.diag(), inner).set_trainable("core")
        self._ledger.count_elements({name: rank * (sum(shape) + 1) / 2})
        self._ledger.set_ranks({name: rank})

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return the block's tensors, products in the place of factors."""
        return self.weights.merged_tensors()

    def low_rank_stats(self) -> dict[str, LowRankStats]:
        """Return rank and traffic of every weight."""
        return self._ledger.low_rank_stats()

    def state(self) -> dict[str, Tensor]:
        """Return when low rank began, ranks, counts, and who rests."""
        rests = {f"rests/{name}": torch.tensor(each) for name, each in self._rounds_to_skip.items()}
        ledger = {f"ledger/{name}": each for name, each in self._ledger.state().items()}
        return super().state() | {"begun": torch.tensor(self.low_rank_start)} | rests | ledger

    def restore_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Give the block the shapes that a state was saved with."""
        if int(state["begun"]) < 0:
            return
        for name in self._matrix_names:
            rank = int(state[f"ledger/rank/{name}"])
            factorize_with_zeros(self.weights, name, rank, with_core=True).set_trainable("core")
        self.weights.rebuild_optimizer({})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        super().restore(state)
        self.low_rank_start = int(state["begun"])
        self._rounds_to_skip = {
            name: int(each) for name, each in select_prefix(state, "rests/").items()
        }
        self._ledger.restore(select_prefix(state, "ledger/"))
