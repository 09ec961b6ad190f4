"""The words of a plan: actions, the points of a block that routes join, and routes.

Invariant: all three are plain values; nothing here knows of ranks.
"""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """One thing that a rank does: `F` forward, `B` learning, `U` the update of a block.

    `update` counts from 0 in the segment, `micro` from 0 in the update. An update belongs to no
    micro-batch, so a `U` keeps `micro` = -1. Written `F3.0` (block 3, micro-batch 0) or `U3`.
    """

    kind: str
    block: int
    update: int
    micro: int = -1

    def __str__(self) -> str:
        return f"{self.kind}{self.block}" + (f".{self.micro}" if self.micro >= 0 else "")


class Point(NamedTuple):
    """The action of one kind in one block, whatever the micro-batch."""

    block: int
    kind: str

    def __str__(self) -> str:
        return f"{self.kind}{self.block}"


class Route(NamedTuple):
    """After `source` ran for a micro-batch, a tensor goes to `target` of the same micro-batch."""

    source: Point
    target: Point
    name: str

    def __str__(self) -> str:
        return f"{self.name} {self.source} -> {self.target}"
