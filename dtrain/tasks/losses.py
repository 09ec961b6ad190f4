"""Losses: those of `torch.nn` by name, and the user's own functions (output, target) -> mean loss.

A loss is a mean over samples. A loss over class labels that skips positions (`ignore-index`) or
weighs classes (`weight`) is a mean over the counted positions: their sum of losses over their sum
of weights, the *normaliser*::

    sum of w[t] loss(t) over the positions with t != ignore-index  /  sum of w[t] over the same

Samples may have weights v: each sample's losses and its part of the normaliser are multiplied by
its weight; without ignored positions and class weights the mean is ``sum of v l / sum of v``.

Invariant: the sum of losses and the normaliser are sums over samples, so a mean does not depend on
how samples are split into micro-batches and replicas.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import gaussian_nll_loss

from dtrain.errors import ConfigError, unknown_name
from dtrain.schema import convert, kebab
from dtrain.user_code import PATTERN, import_object

Reduction = Literal["mean", "sum", "none"]


LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Takes output and target (rows, ...); returns the mean loss ()."""


CLASS_LOSSES = ("cross-entropy", "nll", "multi-margin")
"""Losses whose integer targets are class labels."""


COUNTING_LOSSES = ("cross-entropy", "nll")
"""Losses that divide by the weights of the counted positions."""


BALANCED = "balanced"
"""The `weight` of classes that is computed from the training labels."""


INDEX_LOSSES = ("multi-label-margin",)
"""Losses whose integer targets have the shape of the output and stay integers."""


DECISION_THRESHOLDS = {"bce-with-logits": 0.0, "multi-label-soft-margin": 0.0, "bce": 0.5}
"""Losses of several yes-or-no labels per sample: an output above the number is a yes."""


REDUCTION_ARGUMENTS = ("reduction", "reduce", "size_average")


WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


GAUSSIAN = "gaussian-nll"
"""The loss whose output has a mean and a log-variance for each value of the target."""


class GaussianNLL(nn.Module):
    """Negative log-likelihood of targets under independent Gaussians.

    The first half of the output along dim 1 is their means, the second half the logarithms of
    their variances.

    Parameters
    ----------
    full, eps, reduction
        As in `torch.nn.GaussianNLLLoss`.
    """

    def __init__(self, full: bool = False, eps: float = 1e-6, reduction: str = "mean") -> None:
        super().__init__()
        self.full, self.eps, self.reduction = full, eps, reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss () of an output (rows, 2 C, ...) for a target (rows, C, ...); the output
        for a target (rows,) is (rows, 2)."""
        mean, log_variance = (half.reshape(target.shape) for half in output.chunk(2, 1))
        return gaussian_nll_loss(
            mean, target, log_variance.exp(), self.full, self.eps, self.reduction
        )


class Loss(ABC):
    """A loss of output and target; both have the rows first."""

    @abstractmethod
    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss () over samples, or over the counted positions."""

    @abstractmethod
    def normaliser(self, target: Tensor) -> Tensor | None:
        """Return the float64 normaliser () of a mean over counted positions, None where the mean is
        over samples."""

    @abstractmethod
    def sample_losses(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each sample (rows,): the mean over its positions, or the sum over its
        counted positions."""

    @abstractmethod
    def sample_normalisers(self, target: Tensor) -> Tensor | None:
        """Return the part (rows,) of each sample in the normaliser, None as `normaliser` does."""

    def weighted(self, output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        """Return the mean loss () of samples of some weights (rows,)."""
        weights = weights.to(output.dtype)
        parts = self.sample_normalisers(target)
        counts = weights if parts is None else weights * parts.to(output.dtype)
        losses = self.sample_losses(output, target)
        return (weights * losses).sum() / counts.sum().clamp(min=torch.finfo(output.dtype).tiny)


@final
class TorchLoss(Loss):
    """A loss class of `torch.nn`.

    Parameters
    ----------
    name : str
        A key of `torch_losses`.
    fields : mapping
        Arguments of the class; lists of numbers become tensors.

    Attributes
    ----------
    counts_positions : bool
        Whether integer targets are counted by weight or skipped.
    """

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name = name
        self.kind = torch_losses()[name]
        self.tensors = {key: value for key, value in fields.items() if isinstance(value, tuple)}
        self.plain = {key: value for key, value in fields.items() if key not in self.tensors}
        self.modules = (
            {} if self.tensors else {r: self._make(r, {}) for r in ("mean", "sum", "none")}
        )
        counts = "weight" in self.tensors or "ignore_index" in self.plain
        self.counts_positions = self.name in COUNTING_LOSSES and counts

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if self.modules and not self.counts_positions:
            loss: Tensor = self.modules["mean"](output, target)
            return loss
        total = self.normaliser(target)
        if total is None:
            return self.reduced("mean", output, target)
        # Zero where no position is counted: the mean of none would not be a number.
        divisor = total.to(output.dtype).clamp(min=torch.finfo(output.dtype).tiny)
        return self.reduced("sum", output, target) / divisor

    def reduced(self, reduction: Reduction, output: Tensor, target: Tensor) -> Tensor:
        """Return the reduction () of torch's own."""
        module = self.modules.get(reduction) or self._make(reduction, self._tensors_like(output))
        loss: Tensor = module(output, target)
        return loss

    def normaliser(self, target: Tensor) -> Tensor | None:
        counts = self._position_weights(target)
        return None if counts is None else counts.sum().double()

    def sample_losses(self, output: Tensor, target: Tensor) -> Tensor:
        losses = self.reduced("none", output, target).reshape(len(target), -1)
        is_sum = self.name == "kl-div" or self._position_weights(target) is not None
        return losses.sum(1) if is_sum else losses.mean(1)

    def sample_normalisers(self, target: Tensor) -> Tensor | None:
        counts = self._position_weights(target)
        return None if counts is None else counts.reshape(len(target), -1).sum(1).double()

    def _position_weights(self, target: Tensor) -> Tensor | None:
        """Return the weight of each position of class labels, None where the mean is over
        samples."""
        if not self.counts_positions or target.is_floating_point():
            return None
        counted = torch.ones_like(target, dtype=torch.bool)
        if "ignore_index" in self.plain:
            counted = target != self.plain["ignore_index"]
        if "weight" not in self.tensors:
            return counted
        weight = torch.tensor(self.tensors["weight"], dtype=torch.float64, device=target.device)
        return weight[torch.where(counted, target, 0)] * counted

    def _tensors_like(self, output: Tensor) -> dict[str, Tensor]:
        return {key: output.new_tensor(value) for key, value in self.tensors.items()}

    def _make(self, reduction: Reduction, tensors: Mapping[str, Tensor]) -> nn.Module:
        own = "batchmean" if (self.name, reduction) == ("kl-div", "mean") else reduction
        return self.kind(**self.plain, **tensors, reduction=own)


@final
class FunctionLoss(Loss):
    """A user's function (output, target) -> mean loss.

    A function that skips or weighs positions has an attribute ``normaliser``: a function of the
    target that returns the number () by which its mean divides.
    """

    def __init__(self, function: LossFunction) -> None:
        self.function = function
        self.count = getattr(function, "normaliser", None)

    @property
    def counts_positions(self) -> bool:
        """Whether the function says by which number it divides."""
        return self.count is not None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.function(output, target)

    def normaliser(self, target: Tensor) -> Tensor | None:
        return None if self.count is None else torch.as_tensor(self.count(target)).double()

    def sample_losses(self, output: Tensor, target: Tensor) -> Tensor:
        losses = torch.stack([self.function(*row) for row in _rows(output, target)])
        parts = self.sample_normalisers(target)
        return losses if parts is None else losses * parts.to(losses.dtype)

    def sample_normalisers(self, target: Tensor) -> Tensor | None:
        if self.count is None:
            return None
        return torch.stack([torch.as_tensor(self.count(row)) for (row,) in _rows(target)]).double()


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the rows of tensors, each as a micro-batch of one sample."""
    return zip(*(torch.split(tensor, 1) for tensor in tensors), strict=True)


def make_loss(loss: str | LossFunction, fields: Mapping[str, Any], folder: Path) -> Loss:
    """Return the loss of a name or of a user's function.

    Parameters
    ----------
    fields : mapping
        Arguments of the loss class, in snake_case, as `check_fields` returns them.
    folder : Path
        The folder in which a user's module is looked for first.
    """
    if not isinstance(loss, str):
        return FunctionLoss(loss)
    if ":" in loss:
        return FunctionLoss(import_object(loss, folder, "task"))
    return TorchLoss(loss, fields)


def check_fields(loss: str | LossFunction, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a loss in their types, sorted by name; lists become tuples of numbers.

    Raises
    ------
    ConfigError
        The loss or a field is unknown, or a value is of another type.
    """
    is_named = isinstance(loss, str) and ":" not in loss
    if is_named and loss not in torch_losses():
        raise unknown_name("loss", str(loss), [*torch_losses(), PATTERN], key="task.unknown-loss")
    hints = loss_fields(str(loss)) if is_named else {}
    values = {}
    for name, value in sorted(fields.items()):
        if name not in hints:
            legal = [*TASK_KEYS, *map(kebab, hints)]
            raise unknown_name("key [task]", kebab(name), legal, key="task.unknown-key")
        plain = value.tolist() if isinstance(value, Tensor) else value
        if (name, plain) == ("weight", BALANCED) and loss in COUNTING_LOSSES:
            values[name] = plain
            continue
        try:
            values[name] = convert(plain, hints[name], f"[task] {kebab(name)}")
        except ConfigError as error:
            raise ConfigError("task.wrong-type", error.message) from error
    return values


TASK_KEYS = ("loss", "metrics", "target", "classes-last")
"""Keys of `[task]` beside the fields of the loss."""


@cache
def torch_losses() -> dict[str, type[nn.Module]]:
    """Return the loss classes of `torch.nn` that take (output, target), by their names in
    kebab-case without "loss"; `GaussianNLL` is among them."""
    losses: dict[str, type[nn.Module]] = {GAUSSIAN: GaussianNLL}
    for name, kind in vars(nn).items():
        if not (name.endswith("Loss") and isinstance(kind, type) and issubclass(kind, nn.Module)):
            continue
        arguments = list(inspect.signature(kind.forward).parameters)[1:]
        fields = inspect.signature(kind).parameters
        optional = all(field.default is not field.empty for field in fields.values())
        if len(arguments) == 2 and "reduction" in fields and optional:
            losses[WORD_BORDER.sub("-", name.removesuffix("Loss")).lower()] = kind
    return losses


@cache
def loss_fields(name: str) -> dict[str, Any]:
    """Return the types of the fields of a loss class, by argument; tensors are lists of numbers."""
    parameters = inspect.signature(torch_losses()[name]).parameters.values()
    return {
        parameter.name: _field_type(parameter.default)
        for parameter in parameters
        if parameter.name not in REDUCTION_ARGUMENTS
    }


def _field_type(default: Any) -> Any:
    return type(default) if isinstance(default, bool | int | float) else tuple[float, ...]
