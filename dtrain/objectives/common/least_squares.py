"""Linear maps that are solved: sums over samples, and the least squares that follow from them.

With h a sample's features and a one behind them, y its one-hot label::

    gram = sum h h^T      cross = sum h y^T      min |H W - Y|^2:  gram W = cross

Invariant: sums are in float64 whatever the weights are, since their condition is the square of that
of the features; a sum is the same however its samples are cut into micro-batches, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot, pad

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec

HEAD_INPUT = "what enters the head"
"""Its name among the taps."""


LARGE_WIDTH = 4096
"""Features from which on a user is told what the sums take."""


TOLERANCE = 1e-12
"""What of a feature's square, or of an eigenvalue, counts as nothing: 1e-6 of the features' own
size, which is above what float32 leaves of a difference."""


@final
class Readout(nn.Module):
    """From an output (rows, ...) to class scores (rows, classes).

    Parameters
    ----------
    pool : nn.Module
        Makes the features (rows, width).
    width, classes : int
        Sizes of the map.
    solved : bool
        Whether it is solved from sums, which a forward in training adds to, and learns by no
        gradient.
    scores : bool
        Whether it has a map of its own; else it returns the features, and another's map is solved.
    """

    uses_rng = False
    identical_buffers = ("gram", "cross")
    gram: Tensor
    cross: Tensor

    def __init__(
        self, pool: nn.Module, width: int, classes: int, closed_form: bool, with_linear: bool = True
    ) -> None:
        super().__init__()
        self.pool, self.closed_form = pool, closed_form
        self.linear = nn.Linear(width, classes) if with_linear else None
        if closed_form:
            self.requires_grad_(False)
            self.register_buffer("gram", torch.zeros(width + 1, width + 1))
            self.register_buffer("cross", torch.zeros(width + 1, classes))
            self.double_()

    def forward(self, output: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the scores; without `targets` it is run for its costs, or to predict."""
        features: Tensor = self.pool(output)
        if self.closed_form and self.training:
            self._accumulate(features.detach(), targets)
        return features if self.linear is None else self.linear(features)

    def _accumulate(self, features: Tensor, targets: Tensor | None) -> None:
        rows = pad(features.double(), (0, 1), value=1.0)
        self.gram += rows.T @ rows
        if targets is not None:
            self.cross += rows.T @ one_hot(targets, self.cross.shape[1]).double()

    def double_(self) -> None:
        """Keep the sums in float64."""
        self.gram, self.cross = self.gram.double(), self.cross.double()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        made = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.closed_form:
            self.double_()
        return made

    @property
    def sample_count(self) -> int:
        """How many samples the sums are of: the ones behind their features, squared."""
        return round(float(self.gram[-1, -1]))

    def reset_sums(self) -> None:
        """Start the sums anew."""
        self.gram.zero_()
        self.cross.zero_()

    @torch.no_grad()
    def solve(self, linear: nn.Linear) -> None:
        """Set the weights of `linear` in place, and its bias where it has one."""
        size = linear.in_features + (linear.bias is not None)
        found = solve_least_squares(self.gram[:size, :size], self.cross[:size])
        linear.weight.copy_(found[: linear.in_features].T)
        if linear.bias is not None:
            linear.bias.copy_(found[-1])


def mean_squared_error(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean square of the distance to one-hot labels, over rows and classes."""
    return mse_loss(scores, one_hot(targets, scores.shape[1]).to(scores.dtype))


def solve_least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """Return W (width, classes) with gram W = cross, the shortest one where several are.

    By Cholesky, d^3 / 3 multiply-adds (0.3 s for 2048 features on one core), unless a feature is a
    sum of others: then by all eigenvalues, fifteen times slower. Features that are always 0 get
    weights 0 either way.
    """
    sizes = gram.diagonal()
    idle = sizes == 0
    root, failed = torch.linalg.cholesky_ex(gram + torch.diag(idle.to(gram.dtype)))
    left = root.diagonal().square()  # of each feature what those before it do not tell
    if not failed and bool((idle | (left > TOLERANCE * sizes)).all()):
        return torch.cholesky_solve(cross, root)
    inverse: Tensor = torch.linalg.pinv(gram, rtol=TOLERANCE, hermitian=True)
    return inverse @ cross


def last_linear(layer: nn.Module) -> nn.Linear:
    """Return the last linear map in a layer: where that is a model's head, it makes the scores."""
    return [each for each in layer.modules() if isinstance(each, nn.Linear)][-1]


def model_head_linear(spec: BlockSpec) -> nn.Linear:
    """Return the linear map in the model's head, without memory.

    Raises
    ------
    DtrainError
        A head that does not end in one.
    """
    assert spec.last_layer is not None
    try:
        with torch.device("meta"):
            layer = spec.last_layer.make()
    except Exception:  # not every layer can be made on meta; a true fault shows here
        layer = spec.last_layer.make()
    try:
        found = last_linear(layer)
        what = "" if found.out_features == spec.classes else f"ends in {found.out_features} numbers"
    except IndexError:
        what = "has none"
    if what:
        raise ConfigError(
            "todo.key",
            f"the last linear map of the model's head is solved, but layer '{spec.last_layer.name}' "
            f"{what}: end the model with torch.nn.Linear(..., {spec.classes}), or set "
            '[objective] head = "ce"',
        )
    return found


def tap_head_input(block: Block) -> None:
    """Keep, in every forward, what enters the linear map in the last layer of a block whose readout
    has no map of its own."""
    if isinstance(block.head, Readout) and block.head.linear is None:
        *_, layer = block.layers.values()
        last_linear(layer).register_forward_pre_hook(
            lambda _, args: block.taps.__setitem__(HEAD_INPUT, args[0])
        )


def head_features(block: Block, micro_batch: MicroBatch) -> Tensor:
    """Return the output, for a readout with a map of its own; else what that map in the last layer
    multiplies (rows, width); with its graph.

    A subclass of it may pool or flatten what enters; with the identity as its weights it hands that
    on.
    """
    if HEAD_INPUT not in micro_batch.taps:
        return micro_batch.y
    *_, layer = block.layers.values()
    linear, x = last_linear(layer), micro_batch.taps[HEAD_INPUT]
    if type(linear) is nn.Linear:
        return x
    twin = copy(linear)  # its own forward runs no hooks
    eye = torch.eye(linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    twin._parameters = {"weight": nn.Parameter(eye, requires_grad=False), "bias": None}
    made: Tensor = twin.forward(x)
    return made


def width_warnings(widths: Sequence[int], samples: int) -> list[str]:
    """Return what a user should know of sums over so many features, block by block."""
    wide = [
        f"{w**2 * 8 / 1e9:.1f} GB in block {b}" for b, w in enumerate(widths) if w >= LARGE_WIDTH
    ]
    short = [f"{w} in block {b}" for b, w in enumerate(widths) if samples <= w]
    told = []
    if wide:
        told.append(
            "least squares hold the square of their features in float64, twice while a segment "
            f"runs: {', '.join(wide)}: lower features, or narrow the layers"
        )
    if short:
        told.append(
            f"{samples} samples do not determine as many weights per class ({', '.join(short)}), "
            "so heads fit the training split exactly: lower features"
        )
    return told
