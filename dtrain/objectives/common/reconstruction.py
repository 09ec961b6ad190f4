"""What objectives share whose earlier blocks keep what they know of the sample, beside the label.

::

    sample ---------------------------------.--------------------------.
       |                                    |                          |
       '-> block 0 --h--> next              v                          v
              |                   lambda1 reconstruction  +  lambda2 classification
              h -- path -- f --------> decoder(f)                   head(f)

Both lambdas go linearly from `lambda-first` in block 0 to `lambda-last` in block K - 2; two blocks
have the first alone. What has lambda 0 is not even built. The last block learns the true loss
through the model's own head, so one block is ordinary backpropagation.

Invariant: every earlier block reads the samples that it decodes by itself; nothing is added to the
stream.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
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
from dtrain.errors import ConfigError
from dtrain.models.image_layers import Norm, channels_last, conv, norm
from dtrain.objectives.base import VOTES, ExecutionMode, Objective, forward_routes, scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import head_networks as networks
from dtrain.schedules.actions import Route


@final
class ReconstructionHead(nn.Module):
    """The helper of a block: a path to its features, the head and the decoder behind it."""

    def __init__(self, path: nn.Module, head: nn.Module | None, decoder: nn.Module | None) -> None:
        super().__init__()
        self.path, self.head, self.decoder = path, head, decoder

    def forward(self, input: Tensor) -> Tensor:
        """Return all that is made, side by side (rows, ...); run for its cost alone."""
        features = self.path(input)
        made = [each(features) for each in (self.head, self.decoder) if each is not None]
        return torch.cat([each.flatten(1) for each in made], 1)


@dataclass(frozen=True)
class Reconstruction(Objective):
    """Reconstruction and classification; prediction: last block, and the vote (sum).

    Parameters
    ----------
    head : str
        "1c2f" or "greedy": see `networks`.
    norm : str
        Of head and decoder: "batch" (the papers'), "group" or "none".
    groups : int
        Of "group": groups of channels.
    lambda_first, lambda_last : (float, float)
        Factors of reconstruction and classification in block 0, and in the last but one.
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
            if len(pair) != 2 or not all(0 <= each < math.inf for each in pair):
                raise ConfigError(
                    "todo.key",
                    f"[objective] lambda-{key} = {[*pair]}: give two factors of at least 0, of the "
                    "reconstruction and of the classification, as in [5.0, 0.5]",
                )
            if not any(pair):
                raise ConfigError(
                    "todo.key",
                    f"[objective] lambda-{key} = {[*pair]}: the {key} of the earlier blocks would "
                    "learn nothing: give one factor above 0",
                )

    @property
    def scales_to_many_blocks(self) -> bool:
        """Published for 16 blocks."""
        return True

    def lambdas(self, spec: BlockSpec) -> tuple[float, float]:
        """Return the factors of an earlier block."""
        span = spec.blocks - 2
        part = spec.index / span if span > 0 else 0.0
        ends = zip(self.lambda_first, self.lambda_last, strict=True)
        kept, told = ((1 - part) * first + part * last for first, last in ends)
        return kept, told

    @abstractmethod
    def feature_path(self, spec: BlockSpec) -> tuple[nn.Module, tuple[int, ...]]:
        """Return what leads from a block's output to its features, and their shape."""

    def head_width(self, spec: BlockSpec) -> int:
        """Return how many numbers a head makes of a sample."""
        return spec.classes

    def classification_loss(
        self, spec: BlockSpec, head_output: Tensor, micro_batch: MicroBatch
    ) -> tuple[str, Tensor]:
        """Return name and mean over rows of the loss of what the head made."""
        return "ce", cross_entropy(head_output, micro_batch.targets)

    def build_head(self, spec: BlockSpec) -> nn.Module | None:
        """Return path, head and decoder of an earlier block, none at the end."""
        if spec.is_last:
            return None
        kept, told = self.lambdas(spec)
        (path, shape), kind = self.feature_path(spec), (self.norm, self.groups)
        outs, head = self.head_width(spec), None
        if told and self.head == "greedy":
            head = networks.greedy(shape, outs)
        elif told:
            head = networks.one_convolution(shape, outs, *kind)
        return ReconstructionHead(
            path, head, make_decoder(shape, spec.sample_shape, *kind) if kept else None
        )

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Activations go on; in prediction the sum of the scores so far rides beside them."""
        votes = forward_routes(blocks, VOTES) if mode == "predict" else ()
        return (*forward_routes(blocks), *votes)

    def needs_samples(self, spec: BlockSpec, mode: ExecutionMode) -> bool:
        """In training all that decode read the data."""
        decodes = mode == "train" and not spec.is_last and self.lambdas(spec)[0] > 0
        return spec.index == 0 or decodes

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the sum of both losses, or in the last block the true one."""
        if block.head is None:
            return [scaled_loss_pair(micro_batch, micro_batch.y)]
        assert isinstance(block.head, ReconstructionHead)
        features, (kept, told) = block.head.path(micro_batch.y), self.lambdas(spec)
        terms = []
        if block.head.head is not None:
            name, loss = self.classification_loss(spec, block.head.head(features), micro_batch)
            micro_batch.metrics[name] = loss.detach()
            terms.append(told * loss)
        if block.head.decoder is not None:
            loss = reconstruction_loss(block.head.decoder, features, micro_batch)
            micro_batch.metrics["reconstruction"] = loss.detach()
            terms.append(kept * loss)
        total = torch.stack(terms).sum()
        micro_batch.loss = total.detach()
        return [(total, torch.full_like(total, micro_batch.loss_scale))]

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor | None:
        """Return the class scores (rows, classes), None where the block has no head for them."""
        if block.head is None:
            return micro_batch.y
        assert isinstance(block.head, ReconstructionHead)
        if block.head.head is None:
            return None
        scores: Tensor = block.head.head(block.head.path(micro_batch.y))
        return scores


CHANNELS = 12


@final
class Decoder(nn.Module):
    """Images of features to images like the data's."""

    uses_rng = False

    def __init__(
        self, channels: int, sample_shape: tuple[int, ...], kind: Norm, groups: int
    ) -> None:
        super().__init__()
        self.size = sample_shape[1:]
        self.conv1 = conv(channels, CHANNELS, 3, bias=True)
        # As many groups as 12 channels have of those that are asked for.
        self.norm = norm(kind, CHANNELS, math.gcd(CHANNELS, groups))
        self.conv2 = conv(CHANNELS, sample_shape[0], 3, bias=True)

    def forward(self, input: Tensor) -> Tensor:
        """Return (n, C, H, W), not yet squeezed into 0 ... 1."""
        large = interpolate(channels_last(input), self.size, mode="bilinear", align_corners=True)
        made: Tensor = self.conv2(self.norm(self.conv1(large)).relu())
        return made


def make_decoder(
    feature_shape: tuple[int, ...], sample_shape: tuple[int, ...], kind: Norm, groups: int
) -> nn.Module:
    """Return what makes samples of shape `sample` of features (one sample's shape)."""
    if len(feature_shape) == len(sample_shape) == 3:
        return Decoder(feature_shape[0], sample_shape, kind, groups)
    linear = nn.Linear(math.prod(feature_shape), math.prod(sample_shape))
    return nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, sample_shape))


def reconstruction_loss(decoder: nn.Module, features: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Return the mean loss of what the decoder makes of features (rows, ...)."""
    made: Tensor = decoder(features)
    if micro_batch.raw_samples is not None:
        return binary_cross_entropy_with_logits(made, micro_batch.raw_samples.to(made.dtype))
    assert micro_batch.samples is not None
    return mse_loss(made, micro_batch.samples.to(made.dtype))
