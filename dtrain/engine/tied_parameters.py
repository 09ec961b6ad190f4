"""Tied parameters: copies of one parameter in several blocks, kept equal.

Each block that holds a copy computes a gradient of it. All copies take the same steps, each with a
sum of the gradients of all copies, in the order of the blocks; so copies that start equal stay
equal, bit for bit, whatever the number of ranks.

With a flush in every update (`SameUpdateSums`) the gradients are those of the update: all backwards
end before the first step::

    block 0  embedding.weight  g0 --.                    .--> g0 + g2 --> step
                                    +--> exchange, sum --+
    block 2  head.weight       g2 --'                    '--> g0 + g2 --> step

Without (`DelayedSums`) the blocks are updated in different cycles, and a step adds the gradients of
earlier updates of some copies: see `dtrain.schedules.update_lags`. A message goes from an earlier
cycle to a later one, so no rank waits for a later update of another::

    block 0  U(0) sends g0(0) --.    .--> U(3) : g0(3 - 3) + g2(3) --> step
                                |    |
    block 2  U(3) sends g2(3) --|----'
                                '-------> U(3) : g0(0) + g2(3)     --> step

At the end of a segment one more step of the tied parameters alone applies the gradients that are
left, so copies are equal where checkpoints are written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.complex_tensors import real_view
from dtrain.comm.communicator import Comm
from dtrain.models.ties import Tie, TiedCopy, Ties
from dtrain.schedules.update_lags import KeptGradients, Term, UpdateCycles, tied_routes


class TiedParameters(ABC):
    """The copies on one rank, and the exchange of their gradients.

    Parameters
    ----------
    ties : Ties
        The copies of every tied parameter.
    blocks : mapping of int to Block
        The blocks of this rank.
    place : sequence of int
        The stage of every block, which is its rank in `pipeline`.
    pipeline : Comm
        The stages of this replica; nothing else may use it.
    """

    needs_all_blocks: ClassVar[bool]
    """Whether `sum_gradients` needs the gradients of all blocks of the rank, so that it is called
    once per update. Otherwise it is called before the step of every block."""

    def __init__(
        self, ties: Ties, blocks: Mapping[int, Block], place: Sequence[int], pipeline: Comm
    ) -> None:
        self.ties = ties
        self.blocks = blocks
        self.place = place
        self.pipeline = pipeline

    def start_segment(self, updates: int) -> None:  # noqa: B027
        """Prepare for a segment of so many updates."""

    @abstractmethod
    def sum_gradients(self, block: int, update: int) -> None:
        """Replace the gradients of copies by the sums of their next step.

        Parameters
        ----------
        block : int
            The block whose step comes next.
        update : int
            Counted from the start of the segment.
        """

    def finish_segment(self) -> None:  # noqa: B027
        """Apply the gradients that no step of the segment added."""

    @property
    def peak_bytes(self) -> int:
        """The most bytes of gradients that were kept from one update to another."""
        return 0

    def gradients_without_copies(self, block: int) -> list[Tensor]:
        """Return the gradients of a block without those of copies that an earlier block has."""
        repeated = {c.name for tie in self.ties for c in tie.copies[1:] if c.block == block}
        named = self.blocks[block].parameters.items()
        return [
            real_view(parameter.grad)
            for name, parameter in named
            if parameter.grad is not None and name not in repeated
        ]

    def _gradient(self, copy: TiedCopy) -> Tensor:
        parameter = self.blocks[copy.block].parameters[copy.name]
        if parameter.grad is None:  # other copies may have one
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad


@final
class SameUpdateSums(TiedParameters):
    """Sums of the gradients of one update, for schedules that flush with every update."""

    needs_all_blocks: ClassVar[bool] = True

    def sum_gradients(self, block: int, update: int) -> None:
        """Replace the gradients of all copies. Collective over the stages that hold one."""
        received = self._exchange()
        with torch.no_grad():
            for number, tie in enumerate(self.ties):
                mine = [copy for copy in tie.copies if copy.block in self.blocks]
                if not mine:
                    continue
                total = _sum(
                    self._gradient(copy) if copy in mine else received[number, index]
                    for index, copy in enumerate(tie.copies)
                )
                for copy in mine:
                    self._gradient(copy).copy_(total)

    def _exchange(self) -> dict[tuple[int, int], Tensor]:
        """Send this rank's gradients to the other holders; return theirs by (tie, copy)."""
        rank, received, tag = self.pipeline.rank, {}, 0
        expected: list[tuple[tuple[int, int], int, int]] = []
        for number, tie in enumerate(self.ties):
            holders = sorted({self.place[block] for block in tie.blocks})
            for index, copy in enumerate(tie.copies):
                source = self.place[copy.block]
                if rank == source:
                    for dest in holders:
                        if dest != rank:
                            self.pipeline.isend(self._gradient(copy), dest, tag)
                elif rank in holders:
                    like = next(c for c in tie.copies if c.block in self.blocks)
                    gradient = self._gradient(like)
                    self.pipeline.post_recv(source, tag, [(tuple(gradient.shape), gradient.dtype)])
                    expected.append(((number, index), source, tag))
                tag += 1
        for key, source, message_tag in expected:
            message = self.pipeline.recv(source, message_tag)
            assert isinstance(message, Tensor)
            received[key] = message
        self.pipeline.flush()
        return received


@final
class DelayedSums(TiedParameters):
    """Sums of gradients of several updates, for schedules without a flush.

    Parameters
    ----------
    cycles : UpdateCycles
        The cycles of the updates, from which the lags follow.
    """

    needs_all_blocks: ClassVar[bool] = False

    def __init__(
        self,
        ties: Ties,
        blocks: Mapping[int, Block],
        place: Sequence[int],
        pipeline: Comm,
        cycles: UpdateCycles,
    ) -> None:
        super().__init__(ties, blocks, place, pipeline)
        self.cycles = cycles
        self._peak_bytes = 0
        self._kept: dict[Tie, KeptGradients[Tensor]] = {}
        # One tag per message that may be in flight at once, used in turn: by tie, source and stage.
        self._tags: dict[tuple[Tie, int, int], range] = {}
        first_tag = 0
        for tie in ties:
            for route in tied_routes(tie.blocks, place, cycles):
                tags = range(first_tag, first_tag + route.window)
                self._tags[tie, route.source.block, place[route.target.block]] = tags
                first_tag = tags.stop

    def start_segment(self, updates: int) -> None:
        """Declare all messages of a segment: every copy sends its gradient in every update."""
        self._updates = updates
        self._kept = {
            tie: KeptGradients(self.cycles.lags(tie.blocks), len(local))
            for tie in self.ties
            if (local := self._local(tie))
        }
        for (tie, block, stage), tags in self._tags.items():
            if stage == self.pipeline.rank:
                parameter = self._parameter(self._local(tie)[0])
                spec = (tuple(parameter.shape), parameter.dtype)
                for number, tag in enumerate(tags):
                    count = len(range(number, updates, len(tags)))
                    self.pipeline.post_recv(self.place[block], tag, [spec] * count)

    def sum_gradients(self, block: int, update: int) -> None:
        """Replace the gradients of a block's copies; wait for those of earlier cycles."""
        for tie, kept in self._kept.items():
            for index, copy in enumerate(tie.copies):
                if copy.block == block:
                    gradient = self._gradient(copy)
                    self._send(tie, copy, update, gradient)
                    terms = kept.step(index, update, gradient, partial(self._receive, tie))
                    with torch.no_grad():
                        self._set_gradient(copy, _sum(terms) if terms else None)
        kept_bytes = sum(kept.peak * tie.nbytes for tie, kept in self._kept.items())
        self._peak_bytes = max(self._peak_bytes, kept_bytes)

    def finish_segment(self) -> None:
        """Take one more step of the tied parameters, with the gradients that are left.

        They are received, and added, in the order of their updates' cycles, in which they were
        sent: so no sender waits for a rank that waits for a later message.
        """
        totals: dict[Tie, Tensor] = {}
        with torch.no_grad():
            for tie, term in self._remaining():
                gradient = self._kept[tie].pop(term, partial(self._receive, tie))
                if tie in totals:
                    totals[tie].add_(gradient)
                else:
                    totals[tie] = gradient.clone()
        for tie, total in totals.items():
            for copy in self._local(tie):
                self._set_gradient(copy, total.clone())
        for index in sorted({copy.block for tie in totals for copy in self._local(tie)}):
            self.blocks[index].update()
        self.pipeline.flush()

    @property
    def peak_bytes(self) -> int:
        return self._peak_bytes

    def _local(self, tie: Tie) -> list[TiedCopy]:
        return [copy for copy in tie.copies if copy.block in self.blocks]

    def _parameter(self, copy: TiedCopy) -> Tensor:
        return self.blocks[copy.block].parameters[copy.name]

    def _set_gradient(self, copy: TiedCopy, gradient: Tensor | None) -> None:
        self._parameter(copy).grad = gradient

    def _remaining(self) -> list[tuple[Tie, Term]]:
        """Return the gradients that no step has added, by the cycles and blocks of their updates,
        those of one update in the order of the ties."""

        def order(item: tuple[Tie, Term]) -> tuple[int, int]:
            tie, term = item
            block = tie.blocks[term.copy]
            return self.cycles.cycle(block, term.update), block

        left = [
            (tie, term)
            for tie, kept in self._kept.items()
            for term in kept.remaining(self._updates)
        ]
        return sorted(left, key=order)

    def _send(self, tie: Tie, copy: TiedCopy, update: int, gradient: Tensor) -> None:
        """Send a gradient to all other ranks with a copy; its memory does not change any more."""
        for stage in {self.place[block] for block in tie.blocks} - {self.pipeline.rank}:
            self.pipeline.isend(gradient, stage, self._tag(tie, copy.block, stage, update))

    def _receive(self, tie: Tie, term: Term) -> Tensor:
        block, rank = tie.blocks[term.copy], self.pipeline.rank
        tag = self._tag(tie, block, rank, term.update)
        message = self.pipeline.recv(self.place[block], tag)
        assert isinstance(message, Tensor)
        return message

    def _tag(self, tie: Tie, block: int, stage: int, update: int) -> int:
        tags = self._tags[tie, block, stage]
        return tags[update % len(tags)]


def _sum(gradients: Iterable[Tensor]) -> Tensor:
    """Return a new tensor: the sum of gradients, in their order."""
    iterator = iter(gradients)
    total = next(iterator).clone()
    for gradient in iterator:
        total.add_(gradient)
    return total
