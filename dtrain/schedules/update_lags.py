"""Update lags: which gradients the copies of a tied parameter add in one step, without a flush.

Invariant: lags follow from the cycles of the updates, which count blocks and not ranks. Every copy
takes the same steps S(u), and no step needs a gradient of its own cycle or of a later one.

::

    S(u) = sum over copies c, in the order of blocks, of g_c(u - L_c)

    pipelined, three blocks, copies in 0 and 2: L = 3, 0       S(3) = g_0(0) + g_2(3)

    cycle         2     3     4     5     6
    block 0                   U(0)  U(1)  U(2)       U(u) in cycle u + 4
    block 2       U(0)  U(1)  U(2)  U(3)  U(4)       U(u) in cycle u + 2: U(3) is after U(0) of 0

The last L_c gradients of a segment are in no S(u); at its end all copies add them in one more step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar, final

from dtrain.schedules.actions import Action, Point, Route

T = TypeVar("T")


TIED_GRADIENT = "tied-gradient"
"""Name of the routes of the gradients of tied parameters."""


@final
@dataclass(frozen=True)
class UpdateCycles:
    """Cycles of the updates: update u of block b is in cycle ``offsets[b] + length * u``.

    Attributes
    ----------
    offsets : tuple of int
        Cycle of the first update of each block.
    length : int
        Cycles from one update to the next.
    """

    offsets: tuple[int, ...]
    length: int

    def cycle(self, block: int, update: int) -> int:
        """Return the cycle of an update of the segment."""
        return self.offsets[block] + self.length * update

    def lags(self, holders: Sequence[int]) -> tuple[int, ...]:
        """Return by how many updates the gradient of each holder is applied later.

        It is the smallest lag L with which U(u - L) of the holder is in an earlier cycle than U(u)
        of every other holder; so it is 0 for a holder that is updated before all others.

        Parameters
        ----------
        holders : sequence of int
            Blocks with a copy of one parameter; two or more.

        >>> UpdateCycles((4, 3, 2), 1).lags((0, 2))
        (3, 0)
        """
        lags = []
        for block in holders:
            first = min(self.offsets[other] for other in holders if other != block)
            lags.append(max(0, (self.offsets[block] - first) // self.length + 1))
        return tuple(lags)

    def in_flight(self, source: int, target: int, lag: int) -> int:
        """Return how many gradients one block sends until another applies the first, those of the
        same cycle included: two blocks may send to each other in it.

        >>> UpdateCycles((4, 3, 2), 1).in_flight(2, 0, lag=0)
        3
        """
        return (self.cycle(target, lag) - self.cycle(source, 0)) // self.length + 1

    def first_updated(self, blocks: Sequence[int]) -> int:
        """Return the block that is updated first, in each update."""
        return min(blocks, key=lambda block: (self.offsets[block], block))


class Term(NamedTuple):
    """The gradient of one copy in one update of the segment."""

    copy: int
    update: int


@final
class KeptGradients(Generic[T]):
    """The gradients of one tied parameter that a rank keeps until all its copies applied them.

    Parameters
    ----------
    lags : sequence of int
        Lag of each copy, in the order of the blocks.
    local_copies : int
        Number of copies on this rank.

    Attributes
    ----------
    peak : int
        Most gradients that were kept from one action to the next.
    """

    def __init__(self, lags: Sequence[int], local_copies: int) -> None:
        self._lags = lags
        self._local_copies = local_copies
        self._gradients: dict[Term, T] = {}
        self._uses_left: dict[Term, int] = {}
        self.peak = 0

    def step(self, copy: int, update: int, gradient: T, receive: Callable[[Term], T]) -> list[T]:
        """Keep the gradient of a copy on this rank, and return the terms of S(update).

        Parameters
        ----------
        receive : callable
            Returns a gradient of another rank; called once for each.
        """
        self._keep(Term(copy, update), gradient)
        terms = [self._use(term, receive) for term in self._terms(update)]
        self.peak = max(self.peak, len(self._gradients))
        return terms

    def remaining(self, updates: int) -> list[Term]:
        """Return the gradients that no step of a segment of so many updates adds."""
        return [
            Term(copy, update)
            for copy, lag in enumerate(self._lags)
            for update in range(max(0, updates - lag), updates)
        ]

    def pop(self, term: Term, receive: Callable[[Term], T]) -> T:
        """Return a remaining gradient, and do not keep it any longer."""
        self._uses_left.pop(term, None)
        return self._gradients.pop(term) if term in self._gradients else receive(term)

    def _terms(self, update: int) -> list[Term]:
        lags = enumerate(self._lags)
        return [Term(copy, update - lag) for copy, lag in lags if update >= lag]

    def _keep(self, term: Term, gradient: T) -> None:
        self._gradients[term], self._uses_left[term] = gradient, self._local_copies

    def _use(self, term: Term, receive: Callable[[Term], T]) -> T:
        if term not in self._gradients:
            self._keep(term, receive(term))
        self._uses_left[term] -= 1
        if self._uses_left[term]:
            return self._gradients[term]
        return self.pop(term, receive)


def tied_routes(
    holders: Sequence[int], place: Sequence[int], cycles: UpdateCycles | None
) -> Iterator[Route]:
    """Yield the routes on which the copies of one parameter send their gradients to other ranks.

    A rank with several copies receives each gradient once, for the copy that is updated first.

    Parameters
    ----------
    holders : sequence of int
        The blocks with a copy, in order.
    place : sequence of int
        `place[b]` is the stage of block b.
    cycles : UpdateCycles or None
        None where the pipeline flushes with every update, so that nothing is late.
    """
    lags = [0] * len(holders) if cycles is None else cycles.lags(holders)
    for source, lag in zip(holders, lags, strict=True):
        for stage in sorted({place[block] for block in holders} - {place[source]}):
            copies = [block for block in holders if place[block] == stage]
            target = copies[0] if cycles is None else cycles.first_updated(copies)
            window = 1 if cycles is None else cycles.in_flight(source, target, lag)
            points = Point(source, "U"), Point(target, "U")
            yield Route(*points, TIED_GRADIENT, lag, window=window)


def peak_kept_gradients(
    actions: Sequence[Action], holders: Sequence[int], lags: Sequence[int]
) -> int:
    """Return the most gradients of one tied parameter that one rank's actions keep at once."""
    updates = [action for action in actions if action.kind == "U" and action.block in holders]
    local_blocks = {action.block for action in updates}
    kept = KeptGradients[None](lags, len(local_blocks))
    for action in updates:
        kept.step(holders.index(action.block), action.update, None, lambda _: None)
    return kept.peak
