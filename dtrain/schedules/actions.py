"""The elements of a plan: actions, the points of a block that routes connect, and routes.

Invariant: all three are plain values and know nothing of ranks.

    update u             B1.0 --+                       Route(Point(1, "B"), Point(0, "B"), lag=1)
    update u + 1                +--> B0.0               a gradient of update u is used in u + 1
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W", "U"]
"""Forward, backward, its two halves (input gradient, weight gradient), update."""

KINDS: tuple[Kind, ...] = ("F", "B", "I", "W", "U")
"""All kinds, in the order in which a block runs them."""

UNSPLIT_KINDS: tuple[Kind, ...] = ("F", "B", "U")
"""The actions of a block in their order, where the backward is one action."""

SPLIT_KINDS: tuple[Kind, ...] = ("F", "I", "W", "U")
"""The actions of a block in their order, where the backward is split."""

INPUT_GRADIENT_KINDS: tuple[Kind, ...] = ("B", "I")
"""The actions that yield the input gradient and exchange the messages of a backward."""

WEIGHT_GRADIENT_KINDS: tuple[Kind, ...] = ("B", "W")
"""The actions that yield the weight gradients; a micro-batch is live until then."""


class Action(NamedTuple):
    """One action of a rank: `F` is a forward, `B` a backward, `U` the update of a block.

    A plan may split `B` into `I`, which computes the gradient of the input and exchanges all
    messages of the backward, and `W`, which computes the gradients of the weights.

    An action is written `F3.0` (block 3, micro-batch 0), `F3.0/1` (its second forward) or `U3`.

    Attributes
    ----------
    update : int
        Counted from 0 in the segment.
    micro : int
        Micro-batch, counted from 0 in the update; -1 for a `U`, which belongs to none.
    pass_ : int
        Forward of the micro-batch, counted from 0; some objectives need several.
    """

    kind: Kind
    block: int
    update: int
    micro: int = -1
    pass_: int = 0

    @property
    def key(self) -> tuple[int, int, int]:
        """Block, update and micro-batch, which all actions on one micro-batch share."""
        return self.block, self.update, self.micro

    def __str__(self) -> str:
        micro = f".{self.micro}" if self.micro >= 0 else ""
        return f"{self.kind}{self.block}{micro}" + (f"/{self.pass_}" if self.pass_ else "")


class Point(NamedTuple):
    """All actions of one kind and pass in one block, whatever the micro-batch.

    Routes use `F`, `B` and `U` alone: `B` stands for `I` where a plan splits the backward.
    """

    block: int
    kind: Kind
    pass_: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.block}" + (f"/{self.pass_}" if self.pass_ else "")


SKIP_PREFIX = "skip"
"""Start of the names of routes of tensors that pass over blocks, and of their gradients."""


class Route(NamedTuple):
    """A tensor that flows from `source` to `target`, once per micro-batch.

    A message whose target does not exist in the segment is not sent: see `MessageTable`.

    Attributes
    ----------
    source, target : Point
        The actions that send and receive, both for the same micro-batch.
    name : str
        The kind of tensor, such as "activation".
    lag : int
        Updates from sending to receiving; the micro-batch keeps its number.
    once : bool
        Whether there is one message per update, from micro-batch 0 to micro-batch 0. A route
        from or to a `U` always has one per update.
    window : int
        Receives that are posted at a time, 0 for the number that follows from the lag: see
        `MessageTable.window`.
    every : int
        Updates from one message to the next: those of updates 0, `every`, 2 `every` ... of the
        segment are sent.
    """

    source: Point
    target: Point
    name: str
    lag: int = 0
    once: bool = False
    window: int = 0
    every: int = 1

    @property
    def once_per_update(self) -> bool:
        """Whether there is one message per update."""
        return self.once or "U" in (self.source.kind, self.target.kind)

    @property
    def blocks_passed(self) -> int:
        """Blocks between source and target that a skip passes; 0 for any other message."""
        if not self.name.startswith(SKIP_PREFIX):
            return 0
        return abs(self.target.block - self.source.block) - 1

    def __str__(self) -> str:
        lag = f" (lag {self.lag})" if self.lag else ""
        every = f" (every {self.every} updates)" if self.every > 1 else ""
        return f"{self.name} {self.source} -> {self.target}{lag}{every}"
