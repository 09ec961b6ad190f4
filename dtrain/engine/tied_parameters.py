"""Tied parameters: copies of one parameter in several blocks, kept equal.

Each block that holds a copy computes a gradient of it. Before the optimizer steps of an update,
every copy gets the sum of these gradients, so that all copies take the same step::

    block 0  embedding.weight  g0 --.                    .--> g0 + g2 --> step
                                    +--> exchange, sum --+
    block 2  head.weight       g2 --'                    '--> g0 + g2 --> step

Invariant: the sum is in the order of the blocks, whatever the number of ranks; so copies that start
equal stay equal, bit for bit. The schedule ends all backwards of an update before its first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.complex_tensors import real_view
from dtrain.comm.communicator import Comm
from dtrain.models.ties import TiedCopy


@final
class TiedParameters:
    """The copies on one rank, and the exchange of their gradients.

    Parameters
    ----------
    ties : sequence of sequence of TiedCopy
        The copies of every tied parameter, in the order of their blocks.
    blocks : mapping of int to Block
        The blocks of this rank.
    place : sequence of int
        The stage of every block, which is its rank in `pipeline`.
    pipeline : Comm
        The stages of this replica; nothing else may use it.
    """

    def __init__(
        self,
        ties: Sequence[Sequence[TiedCopy]],
        blocks: Mapping[int, Block],
        place: Sequence[int],
        pipeline: Comm,
    ) -> None:
        self.ties = ties
        self.blocks = blocks
        self.place = place
        self.pipeline = pipeline

    def sum_gradients(self) -> None:
        """Replace the gradient of every copy by the sum over all copies. Collective over the
        stages that hold one."""
        received = self._exchange()
        with torch.no_grad():
            for number, copies in enumerate(self.ties):
                mine = [copy for copy in copies if copy.block in self.blocks]
                if not mine:
                    continue
                gradients = [
                    self._gradient(copy) if copy in mine else received[number, index]
                    for index, copy in enumerate(copies)
                ]
                total = gradients[0].clone()
                for gradient in gradients[1:]:
                    total.add_(gradient)
                for copy in mine:
                    self._gradient(copy).copy_(total)

    def gradients_without_copies(self, block: int) -> list[Tensor]:
        """Return the gradients of a block without those of copies that an earlier block has."""
        repeated = {c.name for copies in self.ties for c in copies[1:] if c.block == block}
        named = self.blocks[block].parameters.items()
        return [
            real_view(parameter.grad)
            for name, parameter in named
            if parameter.grad is not None and name not in repeated
        ]

    def _exchange(self) -> dict[tuple[int, int], Tensor]:
        """Send this rank's gradients to the other holders; return theirs by (tie, copy)."""
        rank, received, tag = self.pipeline.rank, {}, 0
        expected: list[tuple[tuple[int, int], int, int]] = []
        for number, copies in enumerate(self.ties):
            holders = sorted({self.place[copy.block] for copy in copies})
            for index, copy in enumerate(copies):
                source = self.place[copy.block]
                if rank == source:
                    for dest in holders:
                        if dest != rank:
                            self.pipeline.isend(self._gradient(copy), dest, tag)
                elif rank in holders:
                    like = next(c for c in copies if c.block in self.blocks)
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

    def _gradient(self, copy: TiedCopy) -> Tensor:
        parameter = self.blocks[copy.block].parameters[copy.name]
        if parameter.grad is None:  # other copies may have one
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad
