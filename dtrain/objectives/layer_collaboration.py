"""Layer collaboration: forward-forward blocks that look at the goodness of all of them.

Lorberbom et al., arXiv 2305.12393 (AAAI-24). With g_j the goodness of the same sample in block j,
block k learns as in forward-forward, but from

    P(real) = sigma(g_k + gamma_k - theta),    gamma_k = gamma sum_{j != k} sg(g_j)

so with gamma = 1 it follows the gradient of one loss of G = sum_j g_j in which nothing flows
between blocks. A public re-implementation has the coefficient; the paper's value is unverified.
Prediction sums the goodness of all blocks: that is the G that was learnt (`first`, *our reading*).

::

    F   block 0 --pairs, g_0--> block 1 --pairs, g_0 + g_1--> block 2      two numbers per sample
    B   block 0 <--G----------- block 1 <--G----------------- block 2      leave the last block's B
        gamma (G - g_0)         gamma (G - g_1)               gamma (G - g_2)

"pipelined", the default, lets nobody wait: block b of K computes its gradient with weights that are
at most K - b updates younger than those of its forward; g_j are all of the same sample and moment.
"1f1b" and "drained" are the exact, synchronous form, and wait. (The paper trains layer by layer in
one process; that late weights do no harm there is plausible, and unverified.)

Invariant: G is summed in the order of blocks, in float64, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import ExecutionMode, forward_routes
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
        Coefficient of the others' goodness; 0 is forward-forward.
    """

    gamma: float = 1.0
    first: bool = True

    @property
    def default_schedule(self) -> str:
        """Nothing waits."""
        return "pipelined"

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Return the sum so far, beside the activations, and the total that comes back."""
        routes = super().routes(blocks, mode)
        if mode == "predict":
            return routes
        last = Point(blocks - 1, "B")
        back = (Route(last, Point(b, "B"), TOTAL) for b in reversed(range(blocks - 1)))
        return (*routes, *forward_routes(blocks, PARTIAL_SUM), *back)

    def message_spec(
        self, route: Route, specs: Sequence[BlockSpec], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return that of a number per positive and per negative."""
        if route.name in (PARTIAL_SUM, TOTAL):
            return (2 * rows,), torch.float64
        return super().message_spec(route, specs, rows)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the sum so far, or what the last block found it to be."""
        if route.name not in (PARTIAL_SUM, TOTAL):
            return super().make_message(route, block, micro_batch)
        assert micro_batch is not None
        if route.name == TOTAL:
            return micro_batch.received[TOTAL]
        return self._partial_sum(
            micro_batch,
            self.compute_goodness(micro_batch.y.detach()[: 2 * len(micro_batch.targets)]),
        )

    def _partial_sum(self, micro_batch: MicroBatch, goodness: Tensor) -> Tensor:
        """Return the goodness of all blocks up to this one."""
        own = goodness.detach().double()
        return (
            micro_batch.received[PARTIAL_SUM] + own if PARTIAL_SUM in micro_batch.received else own
        )

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[tuple[Tensor, Tensor]]:
        """Pull as forward-forward; the last block knows the total from here on."""
        if spec.is_last:
            out = self.goodness_input(spec, block, micro_batch)
            if out is not None:
                micro_batch.received[TOTAL] = self._partial_sum(
                    micro_batch, self.compute_goodness(out[: 2 * len(micro_batch.targets)])
                )
            elif spec.blocks > 1:
                micro_batch.received[TOTAL] = micro_batch.received[PARTIAL_SUM]
        return super().backward_pairs(spec, block, micro_batch)

    def effective_goodness(
        self, spec: BlockSpec, micro_batch: MicroBatch, goodness: Tensor
    ) -> Tensor:
        """Return (rows,) g_k + gamma (G - g_k): exactly G where gamma is 1, g_k where it is 0."""
        own = goodness.detach()
        value = self.gamma * micro_batch.received[TOTAL].to(own) + (1 - self.gamma) * own
        return value + (goodness - own)
