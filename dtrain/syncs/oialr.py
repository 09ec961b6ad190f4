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

from dtrain.comm.comm import Comm
from dtrain.errors import Refusal
from dtrain.syncs.parts.alike import Alike
from dtrain.syncs.parts.ledger import Ledger
from dtrain.syncs.parts.lowrank import entire, hollow, reformed, split
from dtrain.syncs.sync import Clock, Entry, Held, least, under

FLOOR = 0.01
"""The part of its first rank that a matrix keeps."""
THIN = 10
"""Linear maps with one side so many times the other stay whole."""


@final
@dataclass
class OIALR(Alike):
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

    copies = 2
    reforms = True
    delay_updates: int | None = None
    every: int | None = None
    cutoff: float = 0.1
    share: float = 0.1
    rest_rounds: int = 0
    first_rank: float = 1.0
    keep_first: bool = True

    def __post_init__(self) -> None:
        least("delay-updates", self.delay_updates, 1)
        least("every", self.every, 1)
        for key in ("cutoff", "share", "first_rank", "rest_rounds"):
            least(key.replace("_", "-"), getattr(self, key), 0)
        if self.first_rank > 1:
            raise Refusal(f"[sync] first-rank = {self.first_rank} is no part: give at most 1")
        self.horizon = self.delay_updates is None or self.every is None
        self.begun, self._rests = -1, dict[str, int]()

    def open(self, block: Held, replicas: Comm) -> None:
        """Take the block, and find its matrices."""
        super().open(block, replicas)
        self.weights = entire(block, "oialr")
        names = self.weights.matrices(first=not self.keep_first)
        self._names = [name for name in names if self._wide(name)]
        self._ledger = Ledger(self.weights, replicas.hosts)
        self._first = {name: self._count(name) for name in self._names}

    def _wide(self, name: str) -> bool:
        """Say whether a matrix is worth it; convolutions are, whatever their shape."""
        short, long = sorted(self.weights.shape(name))
        linear = self.weights.parameters[name].dim() == 2
        return not linear or short * THIN > long

    def _count(self, name: str) -> int:
        """Return the singular values with which a matrix begins."""
        return max(1, math.ceil(self.first_rank * min(self.weights.shape(name))))

    def lengths(self, clock: Clock) -> tuple[int, int]:
        """Return updates of full rank, and of a round."""
        delay = clock.total // 10 if self.delay_updates is None else self.delay_updates
        return max(delay, 1), self.every or max(clock.total // 50, 1)

    def means(self) -> tuple[float, float]:
        """As if each matrix were at a quarter of its rank."""
        return 1 / 16, 1 / 16

    def after_update(self, clock: Clock) -> None:
        """Split matrices where it is time, all or those of a round. Collective."""
        self._ledger.mean(self.block.values())
        self._ledger.update()
        following, (delay, every) = clock.update + 1, self.lengths(clock)
        if clock.ends_run:
            return
        if self.begun < 0 and following >= delay:
            self._begin()
            self.begun = following
        elif self.begun >= 0 and (following - self.begun) % every == 0:
            self._round((following - self.begun) // every)

    def _begin(self) -> None:
        """Put U, S and V' in the place of every matrix; its moments begin anew. Collective."""
        own, memory = self.weights, self.weights.memory()
        for number, name in enumerate(self._names):
            shape, rank = own.shape(name), self._first[name]
            mine = number % self.replicas.size == self.replicas.rank
            parts = [each.contiguous() for each in self._parts(name, rank)] if mine else None
            self._take(name, parts, shape, rank, number)
        gone = tuple(f"{name}/" for name in self._names)
        rest = {key: each for key, each in memory.items() if not key.startswith(gone)}
        own.reform(reformed(rest, own.values()))

    def _parts(self, name: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first `rank` columns of U, singular values, and rows of V' of a matrix."""
        u, s, v = split(self.weights.parameters[name])
        return u[:, :rank], s[:rank], v[:rank]

    def _round(self, number: int) -> None:
        """Test the matrices whose turn it is, and cut those that can be. Collective."""
        due = min(math.ceil(number * self.share * len(self._names)), len(self._names))
        tested = [n for n in reversed(self._names[len(self._names) - due :]) if self._awake(n)]
        own, memory = self.weights, self.weights.memory()
        size, rank = self.replicas.size, self.replicas.rank
        mine = {
            name: self._rotated(name) for number, name in enumerate(tested) if number % size == rank
        }
        told = self.replicas.exchange({name: len(parts[1]) for name, parts in mine.items()})
        ranks = {name: int(count) for each in told for name, count in each.items()}
        cut = [name for name in tested if ranks[name] < own.factors[name].rank]
        for name in cut:
            self._take(name, mine.get(name), own.shape(name), ranks[name], tested.index(name))
            self._rests[name] = self.rest_rounds
        if cut:
            own.reform(reformed(memory, own.values()))

    def _awake(self, name: str) -> bool:
        """Say whether a matrix is to be tested; it rests one round less from now on."""
        left = self._rests.get(name, 0)
        self._rests[name] = max(left - 1, 0)
        return left == 0

    def _rotated(self, name: str) -> list[Tensor]:
        """Return U, s and V' in the basis of S's own singular vectors, cut."""
        outer, core, inner = (each.detach() for each in self.weights.factors[name].sides)
        u, s, v = split(core)
        least_rank = max(math.ceil(len(s) / 2), int(FLOOR * self._first[name]), 1)
        rank = max(int((s >= self.cutoff * s[0]).sum()), least_rank)
        parts = outer @ u[:, :rank], s[:rank], v[:rank] @ inner
        return [each.contiguous() for each in parts]

    def _take(
        self, name: str, parts: list[Tensor] | None, shape: tuple[int, int], rank: int, number: int
    ) -> None:
        """Let a matrix be U diag(s) V', as the replica of this number found. Collective."""
        like = next(iter(self.block.values().values()))
        if parts is None:
            sizes = (shape[0], rank), (rank,), (rank, shape[1])
            parts = [like.new_empty(size) for size in sizes]
        self.replicas.broadcast_(parts, number % self.replicas.size)
        outer, s, inner = parts
        self.weights.factor(name, outer, s.diag(), inner).train("core")
        self._ledger.add({name: rank * (sum(shape) + 1) / 2})
        self._ledger.ranks({name: rank})

    def view(self) -> dict[str, Tensor]:
        """Return the block's tensors, products in the place of factors."""
        return self.weights.wholes()

    def entries(self) -> dict[str, Entry]:
        """Return rank and traffic of every weight."""
        return self._ledger.entries()

    def state(self) -> dict[str, Tensor]:
        """Return when low rank began, ranks, counts, and who rests."""
        rests = {f"rests/{name}": torch.tensor(each) for name, each in self._rests.items()}
        ledger = {f"ledger/{name}": each for name, each in self._ledger.state().items()}
        return super().state() | {"begun": torch.tensor(self.begun)} | rests | ledger

    def reshape(self, state: Mapping[str, Tensor]) -> None:
        """Give the block the shapes that a state was saved with."""
        if int(state["begun"]) < 0:
            return
        for name in self._names:
            rank = int(state[f"ledger/rank/{name}"])
            hollow(self.weights, name, rank, core=True).train("core")
        self.weights.reform({})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        super().restore(state)
        self.begun = int(state["begun"])
        self._rests = {name: int(each) for name, each in under(state, "rests/").items()}
        self._ledger.restore(under(state, "ledger/"))
