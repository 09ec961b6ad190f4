"""Least squares in closed form: sums over samples, and linear maps that are solved from them.

With h a sample's features and a one appended, y its one-hot label::

    gram = sum h h^T      cross = sum h y^T      min |H W - Y|^2:  gram W = cross

Invariant: sums are float64 whatever the dtype of the weights, since the condition of a sum is the
square of that of the features. Up to rounding, a sum does not depend on the cut of its samples into
micro-batches.
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

HEAD_INPUT = "head input"
"""Key of the head's input in ``micro_batch.taps``."""


LARGE_WIDTH = 4096
"""Number of features above which the memory of the sums is worth a warning."""


TOLERANCE = 1e-12
"""Relative size of a feature's square, or of an eigenvalue, that counts as zero. It is 1e-6 of the
features' own size, which is above the rounding error of a difference in float32."""


@final
class Readout(nn.Module):
    """A linear map from a block's output (rows, ...) to class scores (rows, classes).

    Parameters
    ----------
    pool : nn.Module
        Makes the features (rows, width).
    width, classes : int
        Sizes of the map.
    closed_form : bool
        Whether the map is solved from sums and not trained by gradients. Every forward in training
        adds its samples to the sums.
    with_linear : bool
        Whether the readout has a map of its own. If not, its forward returns the features, and the
        map that `solve` sets belongs to the model.

    Attributes
    ----------
    gram, cross : Tensor
        The sums (width + 1, width + 1) and (width + 1, classes), if `closed_form`.
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
            self._sums_to_float64()

    def forward(self, output: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the scores, or without a map the features; adds the samples to the sums in
        training. Without `targets` only `gram` grows (a forward for its costs)."""
        features: Tensor = self.pool(output)
        if self.closed_form and self.training:
            self._accumulate(features.detach(), targets)
        return features if self.linear is None else self.linear(features)

    def _accumulate(self, features: Tensor, targets: Tensor | None) -> None:
        rows = pad(features.double(), (0, 1), value=1.0)
        self.gram += rows.T @ rows
        if targets is not None:
            self.cross += rows.T @ target_codes(targets, self.cross.shape[1]).double()

    def _sums_to_float64(self) -> None:
        self.gram, self.cross = self.gram.double(), self.cross.double()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.closed_form:
            self._sums_to_float64()
        return module

    @property
    def sample_count(self) -> int:
        """Number of samples in the sums: the sum of the squares of the appended ones."""
        return round(float(self.gram[-1, -1]))

    def reset_sums(self) -> None:
        """Set the sums to zero."""
        self.gram.zero_()
        self.cross.zero_()

    @torch.no_grad()
    def solve(self, linear: nn.Linear) -> None:
        """Set the weights of `linear` in place to the least squares, and its bias if it has one."""
        size = linear.in_features + (linear.bias is not None)
        weights = solve_least_squares(self.gram[:size, :size], self.cross[:size])
        linear.weight.copy_(weights[: linear.in_features].T)
        if linear.bias is not None:
            linear.bias.copy_(weights[-1])


def mean_squared_error(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the squared error of scores (rows, classes) to one-hot labels, or to vectors, a mean
    over rows and classes."""
    return mse_loss(scores, target_codes(targets, scores.shape[1]).to(scores.dtype))


def target_codes(targets: Tensor, classes: int) -> Tensor:
    """Return labels (rows,) as one-hot codes; vectors (rows, classes) as they are."""
    return targets if targets.dim() > 1 else one_hot(targets, classes)


def solve_least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """Return W (width, classes) with gram W = cross, the one of least norm if several exist.

    Uses Cholesky, d^3 / 3 multiply-adds (0.3 s for 2048 features on one core). If a feature is a
    linear combination of others it uses all eigenvalues, which takes fifteen times longer. Features
    that are always 0 get weights 0 either way.
    """
    squares = gram.diagonal()
    idle = squares == 0
    root, failed = torch.linalg.cholesky_ex(gram + torch.diag(idle.to(gram.dtype)))
    # The part of each feature that the features before it do not explain.
    residuals = root.diagonal().square()
    if not failed and bool((idle | (residuals > TOLERANCE * squares)).all()):
        return torch.cholesky_solve(cross, root)
    inverse: Tensor = torch.linalg.pinv(gram, rtol=TOLERANCE, hermitian=True)
    return inverse @ cross


def last_linear(layer: nn.Module) -> nn.Linear:
    """Return the last linear map in a layer; in a model's head it computes the scores.

    Raises
    ------
    IndexError
        The layer contains none.
    """
    return [module for module in layer.modules() if isinstance(module, nn.Linear)][-1]


def model_head_linear(spec: BlockSpec) -> nn.Linear:
    """Return the linear map of the model's head, without memory where possible.

    Raises
    ------
    ConfigError
        The head does not end in a linear map to the classes.
    """
    assert spec.last_layer is not None
    try:
        with torch.device("meta"):
            layer = spec.last_layer.make()
    except Exception:  # not every layer can be made on meta; a true fault is raised again here
        layer = spec.last_layer.make()
    try:
        linear = last_linear(layer)
        mistake = (
            "" if linear.out_features == spec.classes else f"ends in {linear.out_features} numbers"
        )
    except IndexError:
        mistake = "has no linear map"
    if mistake:
        raise ConfigError(
            "objective.head-not-linear",
            f"layer '{spec.last_layer.name}', the model's head, {mistake}, but its last linear map "
            f"is solved in closed form: end the model with torch.nn.Linear(..., {spec.classes}), "
            'or set [objective] head = "ce"',
        )
    return linear


def tap_head_input(block: Block) -> None:
    """Keep the input of the linear map of the block's last layer in every forward, if the block's
    readout has no map of its own."""
    if isinstance(block.head, Readout) and block.head.linear is None:
        *_, layer = block.layers.values()
        last_linear(layer).register_forward_pre_hook(
            lambda _, args: block.taps.__setitem__(HEAD_INPUT, args[0])
        )


def head_features(block: Block, micro_batch: MicroBatch) -> Tensor:
    """Return the features that a readout gets, with their graph: the block's output, or if the
    readout has no map of its own the input (rows, width) of the last layer's linear map.

    A subclass of ``nn.Linear`` may pool or flatten its input. Such a map is run with the identity
    as weights, which gives what it multiplies.
    """
    if HEAD_INPUT not in micro_batch.taps:
        return micro_batch.y
    *_, layer = block.layers.values()
    linear, input = last_linear(layer), micro_batch.taps[HEAD_INPUT]
    if type(linear) is nn.Linear:
        return input
    twin = copy(linear)  # its own forward runs no hooks
    eye = torch.eye(linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    twin._parameters = {"weight": nn.Parameter(eye, requires_grad=False), "bias": None}
    features: Tensor = twin.forward(input)
    return features


def width_warnings(widths: Sequence[int], samples: int) -> list[str]:
    """Return warnings of sums that are large, or larger than the number of samples allows; `widths`
    are the features of each block."""
    large = [
        f"{w**2 * 8 / 1e9:.1f} GB in block {b}" for b, w in enumerate(widths) if w >= LARGE_WIDTH
    ]
    underdetermined = [f"{w} in block {b}" for b, w in enumerate(widths) if samples <= w]
    warnings = []
    if large:
        warnings.append(
            "least squares store the square of the number of features in float64, twice during a "
            f"segment: {', '.join(large)}; lower features, or use narrower layers"
        )
    if underdetermined:
        warnings.append(
            f"{samples} samples do not determine the weights per class "
            f"({', '.join(underdetermined)}), so heads fit the training split exactly; lower "
            "features"
        )
    return warnings
