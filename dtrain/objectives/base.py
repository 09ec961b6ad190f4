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

from dtrain.block.block import BackwardPair, Block, DetachEvery
from dtrain.block.micro_batch import Given, MicroBatch
from dtrain.models.layers import NamedFactories
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules.actions import Point, Route

ExecutionMode = Literal["train", "predict"]


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

    detach_every: ClassVar[DetachEvery] = "block"
    accumulated_buffers: ClassVar[tuple[str, ...]] = ()
    broadcast_buffers: ClassVar[tuple[str, ...]] = ()
    needs_raw_samples: ClassVar[bool] = False

    @property
    def default_schedule(self) -> str:
        """The schedule that a run file without ``[schedule]`` gets."""
        return "stream"

    @property
    def needs_downstream_layers(self) -> bool:
        """Whether it looks at a block's last layer, ``task.top``, and at those that come after the
        block, ``task.later``."""
        return False

    @property
    def trains_layers(self) -> bool:
        """Whether the layers learn by gradients; if not they keep their first weights."""
        return True

    @property
    def predicts_by_vote(self) -> bool:
        """Whether the model's prediction is the vote of all blocks, not that of the last one."""
        return False

    @property
    def scales_to_many_blocks(self) -> bool:
        """Whether it was published for many blocks, more than four; if not, such runs are warned,
        unless a gradient comes back."""
        return False

    # ---- what a block is made of

    def model_input_shape(self, sample_shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
        """Return the shape of one sample that the model is made for, given that of the data: `feed`
        of block 0 makes such samples."""
        return sample_shape

    def build_head(self, spec: BlockSpec) -> nn.Module | None:
        """Return what the objective adds to a block (a head), or None; called under its seed.

        While cuts are still being balanced it is asked about blocks that may never be: block 0 or 1
        of 2, the inputs those of the data.
        """
        return None

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...] | None:
        """Return the shape of one sample that the helper is run on, for its cost; the output of
        the block's layers by default, None where it is not run sample by sample.

        It returns one tensor then; several go side by side.
        """
        return spec.output_shape

    def cached_bytes_per_sample(self, spec: BlockSpec) -> int:
        """Return the bytes per sample of an update that the helper has in the list `kept` from
        update to update, beside its parameters and buffers."""
        return 0

    def replacement_layers(self, spec: BlockSpec) -> NamedFactories | None:
        """Return (name, factory) pairs of layers that take the place of the model's, or None."""
        return None

    def frozen_modules(
        self, spec: BlockSpec, layers: Mapping[str, nn.Module]
    ) -> Iterable[nn.Module]:
        """Return those modules of the block's layers that no gradient moves: none where it
        `trains`, else all."""
        return () if self.trains_layers else layers.values()

    def block_input_shape(self, spec: BlockSpec) -> tuple[int, ...]:
        """Return the shape of one sample that `feed` gives to the block's first layer."""
        return spec.input_shape

    def forward_passes(self, spec: BlockSpec) -> int:
        """Return how often a sample passes the block's layers in training, for the costs."""
        return 1

    def couples_samples(self, spec: BlockSpec) -> bool:
        """Say whether the loss of a sample depends on others, batch statistics apart."""
        return False

    def taps(self, block: Block) -> Sequence[str]:
        """Return the global names of modules whose outputs `pulls` needs in ``live.taps``."""
        return ()

    # ---- what travels

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Return every row (action of a block -> action of a block) that a tensor takes: by
        default activations, onward.

        Three names mean something: "activation" (`feed` takes it, `tell` gives y), "gradient"
        (``x.grad`` is computed, and told), "votes" (summed in prediction). All others are the
        objective's own: it gives them `tell` and `shape`.
        """
        return forward_routes(blocks)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the tensor that leaves on `route` after its source action.

        `live` is None where the source is an update, which belongs to no micro-batch. Nobody may
        write to the tensor again.
        """
        assert micro_batch is not None, f"{route}: what leaves an update is the objective's to say"
        if route.name == ACTIVATION:
            return micro_batch.y.detach()
        if route.name == VOTES:
            return micro_batch.received[VOTES]
        assert route.name == GRADIENT, f"{route}: what travels on it is the objective's to say"
        gradient = micro_batch.x.grad
        # A block may ignore what arrives; those who wait for its feedback are told so.
        return torch.zeros_like(micro_batch.x) if gradient is None else gradient

    def message_spec(
        self, route: Route, specs: Sequence[BlockSpec], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of what travels on `route` for a micro-batch of `rows`.

        It is not told the mode: what differs in training and prediction gets two names.
        """
        if route.name == VOTES:
            return (rows, specs[0].classes), VOTE_DTYPE
        known = route.name in (ACTIVATION, GRADIENT)
        assert known, f"{route}: the shape of what travels on it is the objective's to say"
        # Between neighbours, either way, travels the shape of what the lower one sends up.
        lower = specs[min(route.source.block, route.target.block)]
        return (rows, *lower.output_shape), lower.dtype

    # ---- what is learnt

    def needs_samples(self, spec: BlockSpec, mode: ExecutionMode) -> bool:
        """Say whether the block needs the data themselves, in ``given.sample`` of its first pass
        and in ``live.sample``."""
        return spec.index == 0

    def needs_graph(self, spec: BlockSpec, pass_: int) -> bool:
        """Say whether autograd must record this forward pass of a micro-batch."""
        return True

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: Given) -> Tensor:
        """Return what the block's first layer gets: what arrived, or the data."""
        if ACTIVATION in micro_batch.received:
            return micro_batch.received[ACTIVATION]
        assert micro_batch.samples is not None
        return micro_batch.samples

    @abstractmethod
    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the pairs (tensor, cotangent) that `block` learns; leave ``live.loss`` behind."""

    def after_update(  # noqa: B027
        self, spec: BlockSpec, block: Block, received: Mapping[str, Tensor]
    ) -> None:
        """Do what follows an optimizer step; `told` is what routes brought to the update."""

    def solve(self, spec: BlockSpec, block: Block) -> None:  # noqa: B027
        """Set weights in closed form from the `sums`, at a segment's end, alike in all replicas."""

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor | None:
        """Return the class scores (rows, classes) of this block, None where it has none: by
        default the last block alone has some, and it always does."""
        return micro_batch.y if spec.is_last else None

    def vote(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return what a block's scores (rows, classes) add to the vote."""
        return scores

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Return what a user should know before a run starts, each in one line, with numbers;
        `rows` are the samples of a micro-batch."""
        return []


def forward_routes(blocks: int, name: str = ACTIVATION, pass_: int = 0) -> tuple[Route, ...]:
    """Return the rows that take `name` from each forward to the next block's forward."""
    return tuple(
        Route(Point(b, "F", pass_), Point(b + 1, "F", pass_), name) for b in range(blocks - 1)
    )


def scaled_loss_pair(micro_batch: MicroBatch, scores: Tensor) -> BackwardPair:
    """Return the pull of the classification loss on `scores` (rows, classes), scaled at birth."""
    loss = cross_entropy(scores, micro_batch.targets)
    micro_batch.loss = loss.detach()
    return loss, torch.full_like(loss, micro_batch.loss_scale)


def input_gradient_blocks(routes: Iterable[Route]) -> set[int]:
    """Return the blocks that compute their input's gradient: a "gradient" route leaves them."""
    return {route.source.block for route in routes if route.name == GRADIENT}
