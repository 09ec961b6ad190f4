"""Reconstruction (InfoPro, MAN): earlier blocks learn to rebuild the sample and to classify it.

::

    sample ---------------------------------.--------------------------.
       |                                    |                          |
       '-> block 0 --h--> next              v                          v
              |                   lambda1 reconstruction  +  lambda2 classification
              h -- path -- f --------> decoder(f)                   head(f)

Both lambdas change linearly from `lambda-first` in block 0 to `lambda-last` in block K - 2; with
two blocks only the first is used. A part whose lambda is 0 is not built. The last block learns the
cross-entropy of the model's own head, so one block is ordinary backpropagation.

A sample counts in the reconstruction as it does in the loss: by its counted positions, where
positions are ignored or classes have weights. The tokens of a language model, whose targets are
tokens at the same positions, are rebuilt as classes.

Invariant: every earlier block that decodes reads the samples itself, so the activations are those
of the model alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    interpolate,
    mse_loss,
)

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError, DataError
from dtrain.models.image_layers import Norm, channels_last, conv, norm
from dtrain.objectives.base import (
    ExecutionMode,
    Objective,
    forward_routes,
    loss_pair,
    scaled_loss_pair,
    vote_routes,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import head_networks, prediction_heads
from dtrain.schedules.actions import Route
from dtrain.tasks.task import Task

DECODER_CHANNELS = 12


@dataclass(frozen=True)
class Reconstruction(Objective):
    """Base of objectives that reconstruct and classify. The last block predicts; the vote is the
    sum of the scores.

    Parameters
    ----------
    head : str
        "1c2f" or "greedy": see `head_networks`.
    norm : str
        Of head and decoder: "batch" (the papers'), "group" or "none".
    groups : int
        Of "group": groups of channels.
    lambda_first, lambda_last : (float, float)
        Factors of reconstruction and classification in block 0, and in the last but one block.

    Raises
    ------
    ConfigError
        A pair of lambdas is not two finite numbers of at least 0, or both are 0.
    """

    default_schedule: ClassVar[str] = "stream"
    needs_raw_samples: ClassVar[bool] = True

    head: Literal["1c2f", "greedy"] = "1c2f"
    norm: Norm = "batch"
    groups: int = 8
    lambda_first: tuple[float, ...] = (5.0, 0.5)
    lambda_last: tuple[float, ...] = (0.5, 1.0)

    def __post_init__(self) -> None:
        for key, pair in (("first", self.lambda_first), ("last", self.lambda_last)):
            if len(pair) != 2 or not all(0 <= factor < math.inf for factor in pair):
                raise ConfigError(
                    "objective.lambda-invalid",
                    f"[objective] lambda-{key} = {[*pair]} must be two numbers of at least 0, the "
                    "factors of reconstruction and classification, as in [5.0, 0.5]",
                )
            if not any(pair):
                raise ConfigError(
                    "objective.lambda-zero",
                    f"[objective] lambda-{key} = {[*pair]} must have a factor above 0; otherwise "
                    f"the {key} of the earlier blocks learns nothing",
                )

    def serves(self, task: Task) -> str | None:
        """Return None: every differentiable loss is served."""
        return None

    @property
    def scales_to_many_blocks(self) -> bool:
        """True: published for 16 blocks."""
        return True

    @abstractmethod
    def feature_path(self, spec: BlockSpec) -> tuple[nn.Module, tuple[int, ...]]:
        """Return the module from a block's output to its features, and the shape of these (of one
        sample)."""

    def head_width(self, spec: BlockSpec) -> int:
        """Return the number of outputs of the head per sample."""
        return spec.classes

    def classification_loss(
        self, spec: BlockSpec, head_output: Tensor, micro_batch: MicroBatch
    ) -> tuple[str, Tensor]:
        """Return the name and the loss () of the head's output (rows, ...): a mean over rows."""
        return "ce", micro_batch.mean_loss(head_output)

    def lambdas(self, spec: BlockSpec) -> tuple[float, float]:
        """Return the factors of reconstruction and classification in an earlier block."""
        inner = spec.blocks - 2
        position = spec.index / inner if inner > 0 else 0.0
        ends = zip(self.lambda_first, self.lambda_last, strict=True)
        lambda1, lambda2 = ((1 - position) * first + position * last for first, last in ends)
        return lambda1, lambda2

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return path, head and decoder of an earlier block."""
        lambda1, lambda2 = self.lambdas(block)
        (path, shape), norm_args = self.feature_path(block), (self.norm, self.groups)
        width, head = self.head_width(block), None
        if lambda2 and block.has_positions:
            head = self._head_per_position(replace(block, output_shape=shape))
        elif lambda2 and self.head == "greedy":
            head = prediction_heads.flat(block, head_networks.greedy(shape, width))
        elif lambda2:
            network = head_networks.one_convolution(shape, width, *norm_args)
            head = prediction_heads.flat(block, network)
        decoder = None
        if lambda1 and rebuilds_tokens(block):
            decoder = prediction_heads.per_position(replace(block, output_shape=shape))
        elif lambda1:
            decoder = make_decoder(shape, block.sample_shape, *norm_args)
        return ReconstructionHead(path, head, decoder)

    def _head_per_position(self, spec: BlockSpec) -> nn.Module:
        """Return the classifier of the features of each position."""
        if self.head == "greedy":
            return prediction_heads.per_position(spec)
        return prediction_heads.network_per_position(
            spec,
            lambda one: head_networks.one_convolution(
                one.output_shape, one.classes, self.norm, self.groups
            ),
        )

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward, and in prediction the sum of the scores so far."""
        return (*forward_routes(blocks), *vote_routes(blocks, mode))

    def needs_samples(self, spec: BlockSpec, mode: ExecutionMode) -> bool:
        """Whether it is block 0, or a block that decodes in training."""
        decodes = mode == "train" and not spec.is_last and self.lambdas(spec)[0] > 0
        return spec.index == 0 or decodes

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the sum of both losses, or in the last block the loss of the model."""
        if block.head is None:
            return [loss_pair(micro_batch, micro_batch.y)]
        assert isinstance(block.head, ReconstructionHead)
        features, (lambda1, lambda2) = block.head.path(micro_batch.y), self.lambdas(spec)
        terms = []
        if block.head.head is not None:
            name, loss = self.classification_loss(spec, block.head.head(features), micro_batch)
            micro_batch.metrics[name] = loss.detach()
            terms.append(lambda2 * loss)
        if block.head.decoder is not None:
            decoded = block.head.decoder(features)
            loss = reconstruction_loss(decoded, micro_batch, rebuilds_tokens(spec))
            micro_batch.metrics["reconstruction"] = loss.detach()
            terms.append(lambda1 * loss)
        return [scaled_loss_pair(micro_batch, torch.stack(terms).sum())]

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor | None:
        """Return the class scores (rows, classes), or None if the block has no classifier."""
        if block.head is None:
            return micro_batch.y
        assert isinstance(block.head, ReconstructionHead)
        if block.head.head is None:
            return None
        scores: Tensor = block.head.head(block.head.path(micro_batch.y))
        return scores


@final
class ReconstructionHead(nn.Module):
    """The path to the features of a block, a classifier and a decoder of them."""

    def __init__(self, path: nn.Module, head: nn.Module | None, decoder: nn.Module | None) -> None:
        super().__init__()
        self.path = path
        self.head = head
        self.decoder = decoder

    def forward(self, input: Tensor) -> Tensor:
        """Return both outputs, flattened and concatenated (rows, ...); run for its cost only."""
        features = self.path(input)
        outputs = [part(features) for part in (self.head, self.decoder) if part is not None]
        return torch.cat([output.flatten(1) for output in outputs], 1)


@final
class Decoder(nn.Module):
    """Two convolutions from images of features to images of the data's shape.

    ::

        (c, h, w) - bilinear to H x W - conv 3x3 to 12 - norm - ReLU - conv 3x3 to C     (C, H, W)

    Source: Wang et al., "Revisiting locally supervised learning", ICLR 2021 (there for images of
    bytes, with corners aligned in the upsampling).
    """

    uses_rng = False

    def __init__(
        self, channels: int, sample_shape: tuple[int, ...], kind: Norm, groups: int
    ) -> None:
        super().__init__()
        self.size = sample_shape[1:]
        self.conv1 = conv(channels, DECODER_CHANNELS, 3, bias=True)
        # 12 channels may not be divisible by the configured groups.
        self.norm = norm(kind, DECODER_CHANNELS, math.gcd(DECODER_CHANNELS, groups))
        self.conv2 = conv(DECODER_CHANNELS, sample_shape[0], 3, bias=True)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits (rows, C, H, W): before the sigmoid that maps to 0 ... 1."""
        resized = interpolate(channels_last(input), self.size, mode="bilinear", align_corners=True)
        logits: Tensor = self.conv2(self.norm(self.conv1(resized)).relu())
        return logits


def make_decoder(
    feature_shape: tuple[int, ...], sample_shape: tuple[int, ...], kind: Norm, groups: int
) -> nn.Module:
    """Return a module from features (rows, *feature_shape) to samples (rows, *sample_shape): a
    `Decoder` between images, else one linear layer."""
    if len(feature_shape) == len(sample_shape) == 3:
        return Decoder(feature_shape[0], sample_shape, kind, groups)
    linear = nn.Linear(math.prod(feature_shape), math.prod(sample_shape))
    return nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, sample_shape))


def rebuilds_tokens(spec: BlockSpec) -> bool:
    """Return whether samples are rebuilt as classes: tokens whose targets are tokens at the same
    positions."""
    has_token_targets = spec.task.kind == "classes" and spec.has_positions
    same_positions = spec.task.target_spec.shape == spec.sample_shape
    return spec.integer_samples and has_token_targets and same_positions


def reconstruction_loss(decoded: Tensor, micro_batch: MicroBatch, tokens: bool) -> Tensor:
    """Return the loss () of decoded features (rows, ...): a mean over values and rows, each row
    weighted as in the task's loss.

    It is the cross-entropy of each token, or of each value with the raw sample in 0 ... 1,
    augmented as the input was, or the squared error to the standardised sample if the value range
    is unknown. The sigmoid is part of the loss, where it cannot overflow.
    """
    samples, raw_samples = micro_batch.samples, micro_batch.raw_samples
    assert samples is not None
    counts = micro_batch.task.sample_counts(micro_batch.targets)
    reduction = "mean" if counts is None else "none"
    if tokens:
        if micro_batch.task.classes_last:
            decoded = decoded.movedim(-1, 1)
        _check_tokens(samples, decoded.shape[1])
        losses = cross_entropy(decoded, samples, reduction=reduction)
    elif raw_samples is not None:
        raw = raw_samples.to(decoded.dtype)
        losses = binary_cross_entropy_with_logits(decoded, raw, reduction=reduction)
    else:
        losses = mse_loss(decoded, samples.to(decoded.dtype), reduction=reduction)
    if counts is None:
        return losses
    counts = counts.to(decoded)
    total = counts.sum().clamp(min=torch.finfo(decoded.dtype).tiny)
    return (counts * losses.flatten(1).mean(1)).sum() / total


def _check_tokens(tokens: Tensor, classes: int) -> None:
    """Refuse a token that is not a class.

    Raises
    ------
    DataError
        A token is `classes` or more.
    """
    largest = int(tokens.max())
    if largest >= classes:
        raise DataError(
            "objective.token-out-of-range",
            f"a sample has the token {largest}, but its targets have {classes} classes, 0 to "
            f"{classes - 1}: number both alike, or rebuild no samples with [objective] "
            "lambda-first = [0.0, 1.0] and lambda-last = [0.0, 1.0]",
        )
