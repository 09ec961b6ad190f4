"""`petra`: pipelined backpropagation that keeps no activations of reversible blocks.

A block returns its input to the block before it, together with the gradient. A reversible block
rebuilds its own input from that output, with its current weights, and computes its gradient there.
A block that is not reversible keeps its input until its backward, and computes its forward again.
All blocks but the last compute gradients with one version of the weights, the current one::

    F   block 0 --x1--> block 1 --x2--> block 2 -> loss      x1, x2 are not kept by their senders
    B   block 0 <-x1, d1-- block 1 <-x2, d2-- block 2        x1 = inverse of block 1 at x2

The order is that of `pipelined`, also with several micro-batches per update, whose gradients are
added up. With three blocks, and updates of two micro-batches::

    cycle         0    1    2    3      4    5      6      7
    block 0       F    F    F    F      F B  F B U  F B    F B U
    block 1            F    F    F B    F B U  ...
    block 2                 F B  F B U  ...

Invariant: in block b of K, 2(K-1-b) micro-batches begin between `F` and `B` of one micro-batch, on
any number of ranks.

Source: Rivaud et al. 2025, "PETRA: Parallel End-to-end Training with Reversible Architectures",
ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.schedules.actions import Action, Route
from dtrain.schedules.cyclic import cyclic_order
from dtrain.schedules.linear_pipeline import LinearPipeline


@final
@dataclass(frozen=True)
class Petra(LinearPipeline):
    """Run one forward and one backward of every block per cycle; rebuild inputs in backwards.

    An update of k micro-batches is the paper's accumulation over k.
    """

    asynchronous: ClassVar[bool] = True
    delays_count_micro_batches: ClassVar[bool] = True
    rebuilds_inputs: ClassVar[bool] = True

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        self.check_routes(routes)
        return cyclic_order(stage, place, micro_batches, routes)
