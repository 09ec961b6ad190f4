"""What a block learns from: the tensors that are pulled, the force, and what travels for it.

Invariant: an objective names pairs (tensor, cotangent) and rows of routes, and nothing else
decides a gradient or a message. A signal is scaled once, where it is born, by the micro-batch's
share of the update; relayed signals are passed on as they came.

One micro-batch in one block, and which method speaks where (all but `pulls` have a default)::

    F   feed   -> x     layers     -> y      tell on routes that leave F      (once per pass)
    B   pulls  -> pairs (tensor, cotangent)  tell on routes that leave B
    U   after_update                         tell on routes that leave U
    segment's end:  sums over replicas, solve
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.block import Block, Grain, Pull
from dtrain.live import Given, Live
from dtrain.models.model import Layers
from dtrain.objectives.task import Task
from dtrain.schedules.action import Point, Route

Mode = Literal["train", "predict"]
ACTIVATION, GRADIENT, VOTES = "activation", "gradient", "votes"

VOTE_DTYPE = torch.float64
"""Votes are sums over blocks whose scores may differ in dtype."""


class Objective(ABC):
    """One way for blocks to learn. Fields of a subclass are its keys in the run file.

    Attributes
    ----------
    grain : "block" or "layer"
        Where the graph is cut: "layer" detaches every layer from the one before it.
    sums : tuple of str
        Buffers of the helper that add up over samples; they are added over the replicas at a
        segment's end, before `solve`. Helpers may lack them.
    spread : tuple of str
        Buffers that all helpers have, or none, and that the last block's give to all others after
        `solve`; numbers are rounded to the dtype of each block's output.
    raw : bool
        Whether it looks at data that are not standardised: ``live.image``.
    """

    grain: ClassVar[Grain] = "block"
    sums: ClassVar[tuple[str, ...]] = ()
    spread: ClassVar[tuple[str, ...]] = ()
    raw: ClassVar[bool] = False

    @property
    def schedule(self) -> str:
        """The schedule that a run file without ``[schedule]`` gets."""
        return "stream"

    @property
    def ahead(self) -> bool:
        """Whether it looks at a block's last layer, ``task.top``, and at those that come after the
        block, ``task.later``."""
        return False

    @property
    def trains(self) -> bool:
        """Whether the layers learn by gradients; if not they keep their first weights."""
        return True

    @property
    def votes(self) -> bool:
        """Whether the model's prediction is the vote of all blocks, not that of the last one."""
        return False

    @property
    def carries(self) -> bool:
        """Whether it was published for many blocks, more than four; if not, such runs are warned,
        unless a gradient comes back."""
        return False

    # ---- what a block is made of

    def sees(self, shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
        """Return the shape of one sample that the model is made for, given that of the data: `feed`
        of block 0 makes such samples."""
        return shape

    def build(self, task: Task) -> nn.Module | None:
        """Return what the objective adds to a block (a head), or None; called under its seed.

        While cuts are still being balanced it is asked about blocks that may never be: block 0 or 1
        of 2, the inputs those of the data.
        """
        return None

    def helped(self, task: Task) -> tuple[int, ...] | None:
        """Return the shape of one sample that the helper is run on, for its cost; the output of
        the block's layers by default, None where it is not run sample by sample.

        It returns one tensor then; several go side by side.
        """
        return task.outputs

    def remembers(self, task: Task) -> int:
        """Return the bytes per sample of an update that the helper has in the list `kept` from
        update to update, beside its parameters and buffers."""
        return 0

    def own(self, task: Task) -> Layers | None:
        """Return (name, factory) pairs of layers that take the place of the model's, or None."""
        return None

    def freezes(self, task: Task, layers: Mapping[str, nn.Module]) -> Iterable[nn.Module]:
        """Return those modules of the block's layers that no gradient moves: none where it
        `trains`, else all."""
        return () if self.trains else layers.values()

    def fed(self, task: Task) -> tuple[int, ...]:
        """Return the shape of one sample that `feed` gives to the block's first layer."""
        return task.inputs

    def copies(self, task: Task) -> int:
        """Return how often a sample passes the block's layers in training, for the costs."""
        return 1

    def couples(self, task: Task) -> bool:
        """Say whether the loss of a sample depends on others, batch statistics apart."""
        return False

    def taps(self, block: Block) -> Sequence[str]:
        """Return the global names of modules whose outputs `pulls` needs in ``live.taps``."""
        return ()

    # ---- what travels

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Return every row (action of a block -> action of a block) that a tensor takes: by
        default activations, onward.

        Three names mean something: "activation" (`feed` takes it, `tell` gives y), "gradient"
        (``x.grad`` is computed, and told), "votes" (summed in prediction). All others are the
        objective's own: it gives them `tell` and `shape`.
        """
        return onward(blocks)

    def tell(self, route: Route, block: Block, live: Live | None) -> Tensor:
        """Return the tensor that leaves on `route` after its source action.

        `live` is None where the source is an update, which belongs to no micro-batch. Nobody may
        write to the tensor again.
        """
        assert live is not None, f"{route}: what leaves an update is the objective's to say"
        if route.name == ACTIVATION:
            return live.y.detach()
        if route.name == VOTES:
            return live.told[VOTES]
        assert route.name == GRADIENT, f"{route}: what travels on it is the objective's to say"
        gradient = live.x.grad
        # A block may ignore what arrives; those who wait for its feedback are told so.
        return torch.zeros_like(live.x) if gradient is None else gradient

    def shape(
        self, route: Route, tasks: Sequence[Task], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of what travels on `route` for a micro-batch of `rows`.

        It is not told the mode: what differs in training and prediction gets two names.
        """
        if route.name == VOTES:
            return (rows, tasks[0].classes), VOTE_DTYPE
        known = route.name in (ACTIVATION, GRADIENT)
        assert known, f"{route}: the shape of what travels on it is the objective's to say"
        # Between neighbours, either way, travels the shape of what the lower one sends up.
        lower = tasks[min(route.source.block, route.target.block)]
        return (rows, *lower.outputs), lower.dtype

    # ---- what is learnt

    def reads(self, task: Task, mode: Mode) -> bool:
        """Say whether the block needs the data themselves, in ``given.sample`` of its first pass
        and in ``live.sample``."""
        return task.block == 0

    def traced(self, task: Task, pass_: int) -> bool:
        """Say whether autograd must record this forward pass of a micro-batch."""
        return True

    def feed(self, task: Task, block: Block, given: Given) -> Tensor:
        """Return what the block's first layer gets: what arrived, or the data."""
        if ACTIVATION in given.told:
            return given.told[ACTIVATION]
        assert given.sample is not None
        return given.sample

    @abstractmethod
    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Return the pairs (tensor, cotangent) that `block` learns; leave ``live.loss`` behind."""

    def after_update(  # noqa: B027
        self, task: Task, block: Block, told: Mapping[str, Tensor]
    ) -> None:
        """Do what follows an optimizer step; `told` is what routes brought to the update."""

    def solve(self, task: Task, block: Block) -> None:  # noqa: B027
        """Set weights in closed form from the `sums`, at a segment's end, alike in all replicas."""

    def predict(self, task: Task, block: Block, live: Live) -> Tensor | None:
        """Return the class scores (rows, classes) of this block, None where it has none: by
        default the last block alone has some, and it always does."""
        return live.y if task.last else None

    def vote(self, task: Task, scores: Tensor) -> Tensor:
        """Return what a block's scores (rows, classes) add to the vote."""
        return scores

    def cautions(self, tasks: Sequence[Task], rows: int) -> list[str]:
        """Return what a user should know before a run starts, each in one line, with numbers;
        `rows` are the samples of a micro-batch."""
        return []


def onward(blocks: int, name: str = ACTIVATION, pass_: int = 0) -> tuple[Route, ...]:
    """Return the rows that take `name` from each forward to the next block's forward."""
    return tuple(
        Route(Point(b, "F", pass_), Point(b + 1, "F", pass_), name) for b in range(blocks - 1)
    )


def born(live: Live, scores: Tensor) -> Pull:
    """Return the pull of the classification loss on `scores` (rows, classes), scaled at birth."""
    loss = cross_entropy(scores, live.targets)
    live.loss = loss.detach()
    return loss, torch.full_like(loss, live.share)
