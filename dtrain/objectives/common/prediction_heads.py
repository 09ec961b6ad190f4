"""Heads whose prediction has the shape of the model's output: flat, or one per position.

::

    block's output     prediction         head
    (c, *P)            (K, *P)            convolution 1x1
    (c, *Q)            (K, *P)            the same, then linear interpolation to P
    (*P, d)            (*P, K)            linear on the last dimension
    (*P, d)            (K, *P)            the same, then the classes to the front
    (c, *P)            (*P, K)            the channels to the back, then linear
    anything           (K,) or ()         the caller's network; () drops its only output

Invariant: a head per position is linear. Positions are resized only where channels come first in
both, as in the coarse blocks of a U-Net.
"""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
"""The convolution for each number of dimensions of the positions."""


INTERPOLATIONS = {1: "linear", 2: "bilinear", 3: "trilinear"}
"""The interpolation for each number of dimensions of the positions."""


def flat(spec: BlockSpec, network: nn.Module) -> nn.Module:
    """Return a network to (rows, outputs) as a head; where a prediction is one number, without the
    dimension of outputs."""
    return network if spec.scores_shape else nn.Sequential(network, nn.Flatten(0))


def per_position(spec: BlockSpec, bias: bool = True) -> nn.Module:
    """Return a linear head per position.

    Raises
    ------
    ConfigError
        The block's output has other positions than the prediction.
    """
    inner, outer = spec.output_shape, spec.scores_shape
    has_classes, classes_last = spec.task.has_classes, spec.task.classes_last
    dims = len(outer) - 1
    if not classes_last and inner[1:] == outer[1:] and dims in CONVOLUTIONS:
        return CONVOLUTIONS[dims](inner[0], outer[0], 1, bias=bias)
    if (classes_last or not has_classes) and inner[:-1] == outer[:-1]:
        return nn.Linear(inner[-1], outer[-1], bias=bias)
    if has_classes and not classes_last and inner[:-1] == outer[1:]:
        return nn.Sequential(nn.Linear(inner[-1], outer[0], bias=bias), MoveDim(-1, 1))
    if not classes_last and dims in CONVOLUTIONS and len(inner) == len(outer):
        convolution = CONVOLUTIONS[dims](inner[0], outer[0], 1, bias=bias)
        resize = nn.Upsample(size=outer[1:], mode=INTERPOLATIONS[dims], align_corners=False)
        return nn.Sequential(convolution, resize)
    if classes_last and inner[1:] == outer[:-1]:
        return nn.Sequential(MoveDim(1, -1), nn.Linear(inner[0], outer[-1], bias=bias))
    raise ConfigError(
        "task.head-positions",
        f"block {spec.index} returns {inner} for a sample, and the model predicts {outer}: a local "
        "head per position needs the same positions; cut where they are equal, or set "
        '[objective] name = "backprop"',
    )


def check_greedy(head: str) -> None:
    """Refuse a network that has no form per position.

    Raises
    ------
    ConfigError
        `head` is not "greedy".
    """
    if head != "greedy":
        raise ConfigError(
            "task.head-not-per-position",
            f'[objective] head = "{head}" makes one prediction per sample, and the task has one '
            'per position: set head = "greedy"',
        )


@final
class MoveDim(nn.Module):
    """Moves a dimension of its input."""

    uses_rng = False

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.source, self.target = source, target

    def forward(self, input: Tensor) -> Tensor:
        """Return a view."""
        return input.movedim(self.source, self.target)
