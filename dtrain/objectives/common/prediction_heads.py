"""Heads whose prediction has the shape of the model's output: flat, or one per position.

::

    block's output     prediction         head
    (c, *P)            (K, *P)            convolution 1x1
    (c, *Q)            (K, *P)            the same, then linear interpolation to P
    (*P, d)            (*P, K)            linear on the last dimension
    (*P, d)            (K, *P)            the same, then the classes to the front
    (c, *P)            (*P, K)            the channels to the back, then linear
    anything           (K,) or ()         the caller's network; () drops its only output

A network per position takes the channels of one position, wherever they are, to its classes.

Invariant: all positions have the same weights, so a head on n samples of P positions is the head on
n P rows. Positions are resized only where channels come first in both, as in the coarse blocks of a
U-Net.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, final

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


class PositionLayout(NamedTuple):
    """Where the channels of a block's output and the outputs of its prediction are.

    Attributes
    ----------
    source, target : int
        Dimension of the channels, and of the outputs, rows included: 1 or -1.
    channels, outputs : int
        Numbers of each position.
    resized : bool
        Whether the block has other positions than the prediction.
    """

    source: int
    target: int
    channels: int
    outputs: int
    resized: bool = False


def position_layout(spec: BlockSpec) -> PositionLayout:
    """Return how a block's output fits a prediction with positions.

    Raises
    ------
    ConfigError
        The block's output has other positions than the prediction, and cannot be resized.
    """
    inner, outer = spec.output_shape, spec.scores_shape
    has_classes, classes_last = spec.task.has_classes, spec.task.classes_last
    dims = len(outer) - 1
    if not classes_last and inner[1:] == outer[1:] and dims in CONVOLUTIONS:
        return PositionLayout(1, 1, inner[0], outer[0])
    if (classes_last or not has_classes) and inner[:-1] == outer[:-1]:
        return PositionLayout(-1, -1, inner[-1], outer[-1])
    if has_classes and not classes_last and inner[:-1] == outer[1:]:
        return PositionLayout(-1, 1, inner[-1], outer[0])
    if not classes_last and dims in CONVOLUTIONS and len(inner) == len(outer):
        return PositionLayout(1, 1, inner[0], outer[0], resized=True)
    if classes_last and inner[1:] == outer[:-1]:
        return PositionLayout(1, -1, inner[0], outer[-1])
    raise ConfigError(
        "task.head-positions",
        f"block {spec.index} returns {inner} for a sample, and the model predicts {outer}: a local "
        "head per position needs the same positions; cut where they are equal, or set "
        '[objective] name = "backprop"',
    )


def per_position(spec: BlockSpec, bias: bool = True) -> nn.Module:
    """Return a linear head per position.

    Raises
    ------
    ConfigError
        The block's output has other positions than the prediction.
    """
    layout = position_layout(spec)
    if (layout.source, layout.target) == (1, 1):
        kind = CONVOLUTIONS[len(spec.scores_shape) - 1]
        convolution = kind(layout.channels, layout.outputs, 1, bias=bias)
        return nn.Sequential(convolution, _resize(spec)) if layout.resized else convolution
    linear = nn.Linear(layout.channels, layout.outputs, bias=bias)
    if layout.source == layout.target:
        return linear
    move = MoveDim(layout.source, layout.target)
    return nn.Sequential(linear, move) if layout.source == -1 else nn.Sequential(move, linear)


def network_per_position(
    spec: BlockSpec, make_network: Callable[[BlockSpec], nn.Module]
) -> nn.Module:
    """Return a head that runs a network on each position alone.

    Parameters
    ----------
    make_network : callable
        Returns a network from the output of a block (rows, channels) to (rows, outputs), given the
        spec of one position. Later layers have the channels of their outputs as shapes.

    Raises
    ------
    ConfigError
        The block's output has other positions than the prediction.
    """
    layout = position_layout(spec)
    channels = min(layout.source, 0)
    downstream_layers = tuple(
        replace(layer, output_shape=layer.output_shape[channels:][:1])
        for layer in spec.downstream_layers
    )
    network = make_network(
        replace(
            spec,
            output_shape=(layout.channels,),
            classes=layout.outputs,
            prediction_shape=None,
            downstream_layers=downstream_layers,
        )
    )
    head = PerPosition(network, layout.source, layout.target)
    return nn.Sequential(head, _resize(spec)) if layout.resized else head


def _resize(spec: BlockSpec) -> nn.Module:
    """Return the interpolation to the positions of the prediction."""
    positions = spec.scores_shape[1:]
    mode = INTERPOLATIONS[len(positions)]
    return nn.Upsample(size=positions, mode=mode, align_corners=False)


@final
class PerPosition(nn.Module):
    """Runs a network on all positions of all rows, as if each were a row.

    Parameters
    ----------
    source, target : int
        Dimensions of the channels of input and output, rows included.
    """

    uses_rng = False

    def __init__(self, network: nn.Module, source: int, target: int) -> None:
        super().__init__()
        self.network, self.source, self.target = network, source, target

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs of the network at all positions."""
        channels = input.movedim(self.source, -1)
        outputs: Tensor = self.network(channels.reshape(-1, channels.shape[-1]))
        return outputs.view(*channels.shape[:-1], -1).movedim(-1, self.target)


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
