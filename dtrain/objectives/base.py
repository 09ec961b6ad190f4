"""Base class of objectives: what a block learns from, and which tensors are sent for it.

An objective returns pairs (tensor, cotangent) to backpropagate in a block, and routes on which
tensors are sent between blocks. The engine calls it in this order for a micro-batch in a block::

    F   make_input -> x    layers -> y        make_message for routes that leave F   (every pass)
    B   backward_pairs -> gradients           make_message for routes that leave B
    U   optimizer step, after_update          make_message for routes that leave U

    end of a segment:   sum accumulated_buffers over the replicas, solve, copy broadcast_buffers

Only `backward_pairs` has no default. By default activations are sent forward, nothing is sent back,
every head belongs to an earlier block and the last block predicts.

Invariant: gradients come from the pairs alone, messages from the routes alone. A signal is
multiplied by ``micro_batch.loss_scale`` once, in the block that computes it; a block that forwards
a signal does not scale it again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import ClassVar, Literal, dataclass_transform, final

import torch
from torch import Tensor, nn

from dtrain.block.block import BackwardPair, Block, DetachEvery
from dtrain.block.micro_batch import MicroBatch
from dtrain.models.layers import NamedFactories
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules.actions import Point, Route
from dtrain.schema import Strategy
from dtrain.tasks.task import Task

ExecutionMode = Literal["train", "predict"]


MessageSpec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a message, the rows included."""


ACTIVATION, GRADIENT, ERROR, VOTES = "activation", "gradient", "error", "votes"
"""Names of routes for which the base class knows shape and dtype: see `Objective.routes`."""


VOTE_DTYPE = torch.float64
"""Votes are summed over blocks whose scores may differ in dtype."""


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Objective(Strategy, ABC):
    """One method of training blocks.

    A subclass is a dataclass, with or without the decorator (see `Strategy`); its fields are its
    keys in the run file and are never assigned later. `spec` is the description of a block, `block`
    its layers and head (in `build_head`, which makes the head, its description), and `rows` a
    number of samples.

    Attributes
    ----------
    detach_every : "block" or "layer"
        Where the autograd graph is cut. "layer" detaches the input of every layer.
    accumulated_buffers : tuple of str
        Buffers of the heads that are sums over samples. At the end of a segment they are summed
        over the replicas, before `solve`. A head may lack them.
    broadcast_buffers : tuple of str
        Buffers that all heads have, or none. After `solve` those of the last block are copied to
        all other blocks, rounded to the dtype of each block's output.
    needs_raw_samples : bool
        Whether ``micro_batch.raw_samples`` is read: the samples before standardisation, in 0 ... 1.
    recomputes : bool
        Whether `backward_pairs` runs the layers again (`Block.repeat_forward`), so that a block
        keeps only input, output and buffers of a forward.
    sends_gradients_back : bool
        Whether blocks learn from the true gradients of all later blocks, so that gradients of skips
        are sent back, too; elsewhere skips are detached.
    needs_block_layers : bool
        Whether ``spec.first_layer`` and ``spec.own_layers`` are read; else they are empty. Such an
        objective replaces the layers of every block.
    takes_complex_outputs : bool
        Whether the output of a block that is not the last may be complex.
    prediction_fields : tuple of str
        Fields that change predictions and no weights, so an evaluation may set them.
    """

    detach_every: ClassVar[DetachEvery] = "block"
    accumulated_buffers: ClassVar[tuple[str, ...]] = ()
    broadcast_buffers: ClassVar[tuple[str, ...]] = ()
    needs_raw_samples: ClassVar[bool] = False
    recomputes: ClassVar[bool] = False
    sends_gradients_back: ClassVar[bool] = False
    needs_block_layers: ClassVar[bool] = False
    takes_complex_outputs: ClassVar[bool] = False
    prediction_fields: ClassVar[tuple[str, ...]] = ()

    # ---- 1. properties of the method

    @property
    def default_schedule(self) -> str:
        """Name of the schedule of a run file without ``[schedule]``."""
        return "stream"

    @property
    def needs_layers(self) -> bool:
        """Whether the shapes of ``spec.own_layers`` are read; else it may be empty."""
        return False

    @property
    def needs_downstream_layers(self) -> bool:
        """Whether ``spec.last_layer`` and ``spec.downstream_layers`` are read; else both are
        empty."""
        return False

    @property
    def trains_layers(self) -> bool:
        """Whether the layers learn by gradients. If not, they keep their initial weights."""
        return True

    @property
    def predicts_by_vote(self) -> bool:
        """Whether the model predicts by the vote of all blocks, and not by the last block alone."""
        return False

    @property
    def scales_to_many_blocks(self) -> bool:
        """Whether the method was published for more than four blocks. If not, a run with more
        blocks is warned, unless the objective sends gradients back."""
        return False

    def serves(self, task: Task) -> str | None:
        """Return None, or the reason for which blocks cannot learn this task, as in "needs ...".

        By default only one class label per sample, each of which counts alike, is served.
        """
        return needs_labels(task)

    def takes_sample_weights(self) -> bool:
        """Whether each loss of a sample is multiplied by its weight, as `loss_pair`, `output_error`
        and ``micro_batch.mean_loss`` do."""
        return False

    def couples_samples(self, spec: BlockSpec) -> bool:
        """Whether the loss of a sample depends on other samples, apart from batch statistics."""
        return False

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Return warnings to print before the run, one line each, with numbers and the remedy;
        `rows` is the size of a micro-batch."""
        return []

    # ---- 2. the parts of a block, and their shapes and costs

    def model_input_shape(self, sample_shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
        """Return the input shape (of one sample) for which the model is made.

        It differs from `sample_shape`, that of the data, where `make_input` of block 0 changes the
        shape of the samples.
        """
        return sample_shape

    def block_input_shape(self, spec: BlockSpec) -> tuple[int, ...]:
        """Return the shape (of one sample) of what `make_input` returns."""
        return spec.input_shape

    def replacement_layers(self, spec: BlockSpec) -> NamedFactories | None:
        """Return pairs (name, factory) of layers that replace the model's own, or None."""
        return None

    def check_layers(self, layers: Mapping[str, nn.Module], is_chain: bool) -> None:
        """Raise a `ConfigError` for layers of the model that the method cannot train.

        It is called at plan time, with the modules of all blocks on the meta device, without those
        that cannot be there. `is_chain` says whether the model runs them in order, one by one.
        """

    def frozen_modules(
        self, spec: BlockSpec, layers: Mapping[str, nn.Module]
    ) -> Iterable[nn.Module]:
        """Return the modules of the block's layers that get no gradient; all if not
        `trains_layers`."""
        return () if self.trains_layers else layers.values()

    def taps(self, block: Block) -> Sequence[str]:
        """Return global names of modules whose outputs are kept in ``micro_batch.taps``."""
        return ()

    def has_head(self, spec: BlockSpec) -> bool:
        """Whether `build_head` is called for the block; by default for every block but the last."""
        return not spec.is_last

    def build_head(self, block: BlockSpec) -> nn.Module | None:
        """Return the head of a block, or None if it has none.

        A head is any module that the objective adds to a block: an auxiliary classifier, a feedback
        matrix, a table. It is named ``heads.<block>`` and learns by the block's optimizer. The
        method is called under the seed of the head. While cuts are being balanced it is called for
        trial blocks: block 0 or 1 of 2, with the data's shape as input shape.
        """
        return None

    @final
    def make_head(self, spec: BlockSpec) -> nn.Module | None:
        """Return the head of a block, or None: the engine's call of `build_head`."""
        return self.build_head(spec) if self.has_head(spec) else None

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...] | None:
        """Return the input shape (of one sample) at which the cost of the head is measured.

        None if the head does not run sample by sample. Otherwise its forward returns one tensor
        (rows, ...); concatenate several.
        """
        return spec.output_shape

    def cached_bytes_per_sample(self, spec: BlockSpec) -> int:
        """Return the bytes per sample of an update that the head keeps between updates, in its list
        `cached_tensors`, beside parameters and buffers."""
        return 0

    def forward_passes(self, spec: BlockSpec) -> int:
        """Return how often a sample passes through the block's layers in training; used for the
        costs."""
        return 1

    # ---- 3. messages between blocks

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Return all routes: which action of which block gets a message from which other action.

        By default activations are sent forward. The base class knows four names: "activation"
        (`make_input` reads it, the message is y), "gradient" (x.grad is computed, and is the
        message), "error" (the numbers of a prediction, per sample) and "votes" (summed in
        prediction). For any other name the objective defines `make_message` and `message_spec`.
        """
        return forward_routes(blocks)

    def message_rows(self, spec: BlockSpec, rows: int) -> int:
        """Return the rows of activations, gradients and skips of a micro-batch of `rows` samples.

        They are more where `make_input` of block 0 adds some.
        """
        return rows

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the tensor to send on `route` after the action in which it starts.

        `micro_batch` is None if the route starts in an update. Nothing may write to the tensor
        afterwards.
        """
        assert micro_batch is not None, f"{route}: the objective must define make_message"
        if route.name == ACTIVATION:
            return micro_batch.y.detach()
        if route.name == VOTES:
            return micro_batch.received[VOTES]
        assert route.name == GRADIENT, f"{route}: the objective must define make_message"
        gradient = micro_batch.x.grad
        # A block whose loss ignores its input sends zeros, since the receiver waits for a message.
        return torch.zeros_like(micro_batch.x) if gradient is None else gradient

    def message_spec(self, route: Route, specs: Sequence[BlockSpec], rows: int) -> MessageSpec:
        """Return shape and dtype of the message on `route` for a micro-batch of `rows` samples.

        The mode is not known here: messages that differ in training and prediction need two names.
        """
        if route.name == VOTES:
            return (rows, *specs[-1].scores_shape), VOTE_DTYPE
        if route.name == ERROR:
            return (rows, specs[-1].scores_width), specs[-1].dtype
        has_known_shape = route.name in (ACTIVATION, GRADIENT)
        assert has_known_shape, f"{route}: the objective must define message_spec"
        # An activation and its gradient have the shape of the earlier block's output.
        earlier = specs[min(route.source.block, route.target.block)]
        return (self.message_rows(earlier, rows), *earlier.output_shape), earlier.dtype

    # ---- 4. training and prediction

    def needs_samples(self, spec: BlockSpec, mode: ExecutionMode) -> bool:
        """Whether the block reads the samples themselves: ``micro_batch.samples``, in the first
        pass."""
        return spec.index == 0

    def needs_graph(self, spec: BlockSpec, pass_: int) -> bool:
        """Whether autograd records this forward pass of a micro-batch."""
        return not self.recomputes

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the input (rows, ...) of the block's first layer: the received activation, or the
        samples."""
        if ACTIVATION in micro_batch.received:
            return micro_batch.received[ACTIVATION]
        assert micro_batch.samples is not None
        return micro_batch.samples

    @abstractmethod
    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the pairs (tensor, cotangent) whose backward gives the block's gradients.

        Both tensors of a pair have the same shape: a loss () and a factor (), or an output
        (rows, ...) and the gradient of the loss at it. Sets ``micro_batch.loss``, a mean over rows
        that is recorded. Called after all forward passes; messages that have arrived are in
        ``micro_batch.received``.
        """

    def after_update(self, spec: BlockSpec, block: Block, received: Mapping[str, Tensor]) -> None:
        """Run after the optimizer step; `received` holds the messages to the update, by route
        name."""

    def solve(self, spec: BlockSpec, block: Block) -> None:
        """Set weights in closed form from `accumulated_buffers`, at the end of a segment; all
        replicas compute the same."""

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor | None:
        """Return the prediction of this block, class scores (rows, classes) or another output of
        the model's shape; None if it has none.

        The last block always has scores; by default no other has.
        """
        return micro_batch.y if spec.is_last else None

    def vote(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return the contribution (rows, classes) of a block's scores to the vote."""
        return scores


def forward_routes(blocks: int, name: str = ACTIVATION, pass_: int = 0) -> tuple[Route, ...]:
    """Return the routes from the forward of each block to that of the next block."""
    return tuple(
        Route(Point(b, "F", pass_), Point(b + 1, "F", pass_), name) for b in range(blocks - 1)
    )


def backward_routes(
    blocks: int, name: str = GRADIENT, kind: Literal["B", "U"] = "B", lag: int = 0
) -> tuple[Route, ...]:
    """Return the routes from each block back to the previous one, `lag` updates late; `kind` is the
    action that sends and receives."""
    return tuple(Route(Point(b + 1, kind), Point(b, kind), name, lag) for b in range(blocks - 1))


def vote_routes(blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
    """Return the routes that carry the sum of the blocks' scores forward; none in training."""
    return forward_routes(blocks, VOTES) if mode == "predict" else ()


def scaled_loss_pair(micro_batch: MicroBatch, loss: Tensor) -> BackwardPair:
    """Return the backward pair of a mean loss over the rows, scaled by ``micro_batch.loss_scale``.

    Sets ``micro_batch.loss`` if the block has no other loss yet.
    """
    if micro_batch.loss is None:
        micro_batch.loss = loss.detach()
    return loss, torch.full_like(loss, micro_batch.loss_scale)


def loss_pair(micro_batch: MicroBatch, output: Tensor) -> BackwardPair:
    """Return the scaled backward pair of the task's loss of a prediction (rows, ...)."""
    return scaled_loss_pair(micro_batch, micro_batch.mean_loss(output))


def output_error(micro_batch: MicroBatch) -> Tensor:
    """Return the gradient (rows, ...) of each sample's own loss at y, without its graph: for plain
    classes softmax(y) - onehot; times the sample's weight, where it has one."""
    targets, weights = micro_batch.targets, micro_batch.weights
    return micro_batch.task.output_gradient(micro_batch.y, targets, weights)


def needs_labels(task: Task) -> str | None:
    """Return the reason of an objective that needs one class label per sample, all alike."""
    return None if task.is_plain_classification else "needs one unweighted class label per sample"


def needs_means_over_samples(task: Task) -> str | None:
    """Return the reason of an objective whose own losses are means over samples."""
    if not task.counts_positions:
        return None
    return "averages over samples, so it has no class weights and ignored positions"


def input_gradient_blocks(routes: Iterable[Route]) -> set[int]:
    """Return the blocks that compute their input's gradient: a "gradient" route leaves them."""
    return {route.source.block for route in routes if route.name == GRADIENT}
