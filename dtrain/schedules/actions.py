"""The words of a plan: actions, the points of a block that routes join, and routes.

Invariant: all three are plain values; nothing here knows of ranks.

    update u             B1.0 --+                       Route(Point(1, "B"), Point(0, "B"), lag=1)
    update u + 1                +--> B0.0               what update u learnt reaches update u + 1
"""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """One thing that a rank does: `F` forward, `B` learning, `U` the update of a block.

    `B` is the whole backward; a plan may split it into `I`, which yields the gradient of the
    input and what routes take from a `B`, and `W`, which yields the gradients of the weights.

    `update` counts from 0 in the segment, `micro` from 0 in the update. An update belongs to no
    micro-batch, so a `U` keeps `micro` = -1. `pass_` counts the forwards of a micro-batch from 0,
    where an objective asks for several. Written `F3.0` (block 3, micro-batch 0), `F3.0/1` (its
    second forward) or `U3`.
    """

    kind: str
    block: int
    update: int
    micro: int = -1
    pass_: int = 0

    def __str__(self) -> str:
        micro = f".{self.micro}" if self.micro >= 0 else ""
        return f"{self.kind}{self.block}{micro}" + (f"/{self.pass_}" if self.pass_ else "")


class Point(NamedTuple):
    """The action of one kind (`F`, `B` or `U`) and pass in one block, whatever the micro-batch."""

    block: int
    kind: str
    pass_: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.block}" + (f"/{self.pass_}" if self.pass_ else "")


class Route(NamedTuple):
    """After `source` ran for a micro-batch, a tensor goes to `target` of the same micro-batch.

    With a `lag` it goes to the micro-batch of that number `lag` updates later. `once`: one message
    per update, from micro-batch 0 to micro-batch 0; a route from or to a `U` is so by nature.
    A message whose target does not exist in the segment is not sent: see `Messages`.
    """

    source: Point
    target: Point
    name: str
    lag: int = 0
    once: bool = False

    @property
    def once_per_update(self) -> bool:
        """Whether one message flows per update."""
        return self.once or "U" in (self.source.kind, self.target.kind)

    def __str__(self) -> str:
        lag = f" (lag {self.lag})" if self.lag else ""
        return f"{self.name} {self.source} -> {self.target}{lag}"
