"""Layer collaboration: forward-forward whose blocks see the goodness of all blocks.

Lorberbom et al., arXiv 2305.12393 (AAAI-24). With g_j the goodness of the same sample in block j
and sg a detached tensor, block k learns as in forward-forward, but from::

    P(real) = sigma(g_k + gamma_k - theta),    gamma_k = gamma sum_{j != k} sg(g_j)

With gamma = 1 this is the gradient of one loss of G = sum_j g_j in which nothing flows between
blocks. A public re-implementation has the coefficient; the paper's value is unverified. Prediction
sums the goodness of all blocks, which is the G that was learnt (`first`, *our reading*).

::

    F   block 0 --pairs, g_0--> block 1 --pairs, g_0 + g_1--> block 2      two numbers per sample
    B   block 0 <--G----------- block 1 <--G----------------- block 2      are sent from block 2
        gamma (G - g_0)         gamma (G - g_1)               gamma (G - g_2)

Under the default, "pipelined", no block waits: block b of K computes its gradient with weights that
are at most K - b updates newer than those of its forward; all g_j are of the same sample and the
same forward. "1f1b" and "drained" are the exact, synchronous form, and wait. (The paper trains
layer by layer in one process; that newer weights do no harm there is plausible, and unverified.)

Invariant: G is summed in the order of blocks, in float64, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import ExecutionMode, MessageSpec, forward_routes
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.goodness import Goodness
from dtrain.schedules.actions import Point, Route

PARTIAL_SUM, TOTAL = "sum", "total"


@final
@dataclass(frozen=True)
class LayerCollaboration(Goodness):
    """Goodness that is compared with the threshold together with that of all other blocks.

    Parameters
    ----------
    gamma : float
        Coefficient of the other blocks' goodness; 0 is forward-forward.
    """

    gamma: float = 1.0
    first: bool = True

    @property
    def default_schedule(self) -> str:
        """Return "pipelined", under which no block waits."""
        return "pipelined"

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send y and in training the partial sum forward, and the total from the last block to all
        others."""
        routes = super().routes(blocks, mode)
        if mode == "predict":
            return routes
        last = Point(blocks - 1, "B")
        totals = (Route(last, Point(b, "B"), TOTAL) for b in reversed(range(blocks - 1)))
        return (*routes, *forward_routes(blocks, PARTIAL_SUM), *totals)

    def message_spec(self, route: Route, specs: Sequence[BlockSpec], rows: int) -> MessageSpec:
        """Return (2 rows,) for sums: a number per positive and per negative."""
        if route.name in (PARTIAL_SUM, TOTAL):
            return (2 * rows,), torch.float64
        return super().message_spec(route, specs, rows)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the sum of the goodness so far, or that of all blocks."""
        if route.name not in (PARTIAL_SUM, TOTAL):
            return super().make_message(route, block, micro_batch)
        assert micro_batch is not None
        if route.name == TOTAL:
            return micro_batch.received[TOTAL]
        return self._partial_sum(micro_batch, micro_batch.y.detach())

    def _partial_sum(self, micro_batch: MicroBatch, output: Tensor) -> Tensor:
        """Return the goodness (2 rows,) of all blocks up to this one, given its output."""
        pairs = output[: 2 * len(micro_batch.targets)]
        goodness = self.compute_goodness(pairs).detach().double()
        if PARTIAL_SUM not in micro_batch.received:
            return goodness
        return micro_batch.received[PARTIAL_SUM] + goodness

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the pairs of forward-forward; in the last block compute the total first."""
        if spec.is_last:
            output = self.goodness_input(spec, block, micro_batch)
            if output is not None:
                micro_batch.received[TOTAL] = self._partial_sum(micro_batch, output)
            elif spec.blocks > 1:
                micro_batch.received[TOTAL] = micro_batch.received[PARTIAL_SUM]
        return super().backward_pairs(spec, block, micro_batch)

    def effective_goodness(
        self, spec: BlockSpec, micro_batch: MicroBatch, goodness: Tensor
    ) -> Tensor:
        """Return g_k + gamma (G - g_k) (rows,): exactly G if gamma is 1, g_k if it is 0."""
        detached = goodness.detach()
        total = micro_batch.received[TOTAL].to(detached)
        value = self.gamma * total + (1 - self.gamma) * detached
        return value + (goodness - detached)
