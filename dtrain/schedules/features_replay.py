"""`features-replay`: delayed gradients through forwards that are computed again with new weights.

Invariant: block b of K keeps the inputs of K-b micro-batches, and no other activation. A backward
runs the forward of its micro-batch again with the current weights, and propagates the gradient that
the next block computed at its own current weights. So it is a true gradient of the block, at one
version of the weights, without a stash; its delay is that of `pipedream`, K-1-b updates. With one
block, or with weights that do not change, it is backpropagation.

Three blocks, an update after every micro-batch; R is the replayed forward::

    cycle         0    1    2      3      4      5      6
    block 0       F         F             F     RB U    F
    block 1            F         F      RB U    F      RB U
    block 2                 F   RB U     F     RB U     F

The paper's forwards pass all blocks in one step, and its backwards run at the same time. Here
forwards are pipelined, too. Between a forward and its own update block b has K-1-b other updates,
as in the paper, so forwards, replays and gradients use the paper's versions of the weights.

Source: Huo, Gu and Huang 2018, "Training Neural Networks Using Features Replay", arXiv 1807.04511.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.errors import ConfigError
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.schedules.linear_pipeline import LinearPipeline
from dtrain.schedules.pipedream import PERIOD


@final
@dataclass(frozen=True)
class FeaturesReplay(LinearPipeline, AsyncSchedule):
    """One forward and one backward in turns; every backward replays its forward.

    Raises
    ------
    ConfigError
        `weights` is "stash".
    """

    name: ClassVar[str] = "features-replay"
    period: ClassVar[int] = PERIOD
    recomputes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights == "stash":
            raise ConfigError(
                "schedule.replay-with-stash",
                "[schedule] 'features-replay' computes forwards again with the current weights, so "
                'a stash has no use: leave out weights, or set schedule.name = "pipedream"',
            )
