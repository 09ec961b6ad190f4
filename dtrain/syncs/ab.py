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

from dtrain.comm.comm import Comm
from dtrain.early import Group
from dtrain.syncs.parts.apart import Apart
from dtrain.syncs.parts.groups import Groups, Mode
from dtrain.syncs.parts.ledger import Ledger
from dtrain.syncs.parts.lowrank import entire, followed, halves, hollow, kept, parted, split
from dtrain.syncs.parts.phases import Phases
from dtrain.syncs.sync import Clock, Entry, Held, averaged, least, under
from dtrain.weights import whole


@final
@dataclass
class AB(Apart):
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

    horizon = True
    copies = 5
    reforms = True
    mode: Mode = "only-learned"
    warmup_updates: int | None = None
    every: int | None = None
    full_updates: int | None = None
    rebound_updates: int | None = None
    cutoff: float = 0.15
    group_size: int = 0

    def __post_init__(self) -> None:
        for key, low in (("warmup", 0), ("full", 1), ("rebound", 0)):
            least(f"{key}-updates", getattr(self, f"{key}_updates"), low)
        least("every", self.every, 2)
        least("cutoff", self.cutoff, 0)
        least("group-size", self.group_size, 0)
        self.low, self._changed = False, -1
        self._resting = dict[str, Tensor]()  # the optimizer's state of matrices that are products

    def open(self, block: Held, replicas: Comm) -> None:
        """Take the block, find its matrices, and join a group. Collective."""
        super().open(block, replicas)
        self.weights = entire(block, "ab")
        self._names = self.weights.matrices()
        self._groups = Groups.of(replicas.size, self.group_size, self.mode)
        own = self._groups.of_rank(replicas.rank)
        self._members, self.learns_a = self._groups.members[own], self._groups.takes_a(own)
        self._group = replicas.split(own, name=f"group {own}")
        self._near = replicas.by_node()
        self._ledger = Ledger(self.weights, replicas.hosts)

    def phases(self, clock: Clock) -> Phases:
        """Return the lengths of phases, those that are left out by the length of the run."""
        every = self.every or max(clock.total // 15, 2)
        warmup = 2 * clock.total // 5 if self.warmup_updates is None else self.warmup_updates
        rebound = every // 10 if self.rebound_updates is None else self.rebound_updates
        return Phases(warmup, every, self.full_updates or max(every // 10, 1), rebound)

    def means(self) -> tuple[float, float]:
        """One per update inside nodes; between them two fifths, and a tenth of the rest."""
        return 1.0, 0.46

    def rate(self, clock: Clock) -> float:
        """By what the learning rate is multiplied: it rises again after a change."""
        since = clock.update - self._changed
        return 1.0 if self._changed < 0 else self.phases(clock).rate(since)

    def steps(self, weight: float, clock: Clock) -> bool:
        """A group without a sample rests."""
        return not self.low or self._rows(clock) > 0

    def averages(self, weight: float, clock: Clock) -> Group | None:
        """Over all replicas in full rank, else inside the group."""
        if not self.low:
            return Group(self.replicas, weight)
        rows = self._rows(clock)
        return Group(self._group, clock.rows[self.replicas.rank] / rows) if rows else None

    def _rows(self, clock: Clock) -> int:
        return sum(clock.rows[rank] for rank in self._members)

    def after_update(self, clock: Clock) -> None:
        """Split or merge, where the next update is of the other kind. Collective."""
        self._count()
        if self.replicas.size == 1:
            return
        following, phases = clock.update + 1, self.phases(clock)
        low = phases.low(following) and not clock.ends_run
        if low != self.low:
            if low:
                self._split(phases.cuts(following))
            else:
                self._merge()
            self._changed = following

    def _count(self) -> None:
        """Count the means of an update, those of other groups, too."""
        self._ledger.update()
        values = self.weights.values()
        if not self.low:
            self._ledger.mean(values)
            return
        for group, members in enumerate(self._groups.members):
            learns_b = not self._groups.takes_a(group)
            sides = {name: self._sides(name)[learns_b] for name in self._names}
            self._ledger.mean(self._rest(values), members)
            self._ledger.add(sides, members)

    def _sides(self, name: str) -> tuple[int, int]:
        """Return the numbers of A and of B."""
        tall, flat = sorted(self.weights.shape(name), reverse=True)
        rank = self.weights.factors[name].rank
        return tall * rank, flat * rank

    def _rest(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is part of no product."""
        return {name: each for name, each in values.items() if whole(name) not in self._names}

    def _a_is_left(self, name: str) -> bool:
        """Say whether the tall factor stands left."""
        rows, columns = self.weights.shape(name)
        return rows >= columns

    def _learnt(self, name: str) -> str:
        """Return which factor learns here."""
        return "left" if self.learns_a == self._a_is_left(name) else "right"

    def _split(self, cuts: bool) -> None:
        """Put factors in the place of matrices. All replicas agree on their ranks. Collective.

        Matrix i is split by replica i of a node, modulo their number, which tells the others.
        """
        own, memory, near = self.weights, self.weights.memory(), self._near
        mine = self._names[near.rank :: near.size]
        parts = {name: split(own.parameters[name]) for name in mine}
        limit = self.cutoff if cuts else -1.0
        told = self.replicas.exchange({name: kept(s, limit) for name, (_, s, _) in parts.items()})
        ranks = {name: max(each.get(name, 0) for each in told) for name in self._names}
        for number, (name, rank) in enumerate(ranks.items()):
            sides = halves(own.parameters[name], rank, parts.pop(name, None))
            near.broadcast_(sides, number % near.size)
            own.factor(name, *sides).train(self._learnt(name))
        self._ledger.ranks(ranks)
        state, self._resting = parted(memory, self._names)
        for name in self._names:
            state |= followed(self._resting, name, own.factors[name])
        own.reform(state)
        self.low, self.equal = True, False

    def _merge(self) -> None:
        """Put matrices back in the place of factors; make optimizers equal. Collective."""
        own, memory = self.weights, self.weights.memory()
        self._ledger.mean(self._rest(own.values()))
        self._ledger.add({name: self._told(name) for name in self._names})
        merged = self._merged()
        for name in self._names:
            own.whole(name)
        for name, each in own.values().items():
            each.copy_(merged[name])
        state, _ = parted(memory, self._names)
        moments = {name: each for name, each in state.items() if each.dim()}
        self.replicas.mean_(moments)
        for key, each in moments.items():
            self._ledger.mean({key.rpartition("/")[0]: each})
        self.replicas.broadcast_({n: count for n, count in state.items() if not count.dim()})
        own.reform(state | self._resting)
        self._resting = {}
        self.low, self.equal = False, True

    def _told(self, name: str) -> int:
        """Return how many numbers of a matrix a merge averages."""
        a, b = self._sides(name)
        kinds = {"full": math.prod(self.weights.shape(name)), "only-b": b}
        return kinds.get(self.mode, a + b)

    def _merged(self) -> dict[str, Tensor]:
        """Return all that is trained, and what rests, as a merge makes it. Collective."""
        own = self.weights
        pairs = {name: own.factors[name] for name in self._names}
        found = averaged(self.replicas, self._rest(own.values()))
        if self.mode == "full":
            whole = {n: (f.left @ f.right).detach() for n, f in pairs.items()}
            return found | self._shaped(averaged(self.replicas, whole))
        tall = {n: f.left if self._a_is_left(n) else f.right for n, f in pairs.items()}
        flat = {n: f.right if self._a_is_left(n) else f.left for n, f in pairs.items()}
        a = {name: each.detach().clone() for name, each in tall.items()}
        b = {name: each.detach().clone() for name, each in flat.items()}
        if self.mode == "only-learned":
            learners = self._groups.learners()
            others = self.replicas.size - learners
            self.replicas.mean_(a, 1 / learners if self.learns_a else 0.0)
            self.replicas.mean_(b, 0.0 if self.learns_a else 1 / others)
        else:
            if self.mode == "with-stale":
                self.replicas.mean_(a)
            self.replicas.mean_(b)
        product = {n: a[n] @ b[n] if self._a_is_left(n) else b[n] @ a[n] for n in pairs}
        return found | self._shaped(product)

    def _shaped(self, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: each.view(self.weights.factors[n].product.shape) for n, each in products.items()}

    def view(self) -> dict[str, Tensor]:
        """Return what a merge would make; collective."""
        if not self.low:
            return super().view()
        drifting = averaged(self.replicas, self.block.drifting)
        return self.weights.wholes() | self._merged() | drifting

    def state(self) -> dict[str, Tensor]:
        """Return the phase, when it began, ranks and counts, and moments that rest."""
        told = {"low": torch.tensor(int(self.low)), "changed": torch.tensor(self._changed)}
        ledger = {f"ledger/{name}": each for name, each in self._ledger.state().items()}
        resting = {f"resting/{key}": each for key, each in self._resting.items()}
        return super().state() | told | ledger | resting

    def reshape(self, state: Mapping[str, Tensor]) -> None:
        """Give the block the shapes that a state was saved with."""
        if not int(state["low"]):
            return
        for name in self._names:
            made = hollow(self.weights, name, int(state[f"ledger/rank/{name}"]))
            made.train(self._learnt(name))
        self.weights.reform({})
        self.low = True

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        super().restore(state)
        self._changed = int(state["changed"])
        self._ledger.restore(under(state, "ledger/"))
        self._resting = under(state, "resting/")

    def entries(self) -> dict[str, Entry]:
        """Return rank and traffic of every weight."""
        return self._ledger.entries()
