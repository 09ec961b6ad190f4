"""Metrics: fixed-size sums over samples, and the number that follows from them.

::

    update(output, target) -> sums (float64)      per micro-batch, added over all of them
    compute(sums) -> number                       once, at the end

Invariant: sums add up, so a metric does not depend on how samples are split into micro-batches,
replicas and stages. Class metrics get flat positions: scores (n, C) and labels (n,).
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dtrain.errors import ConfigError, one_line, unknown_name
from dtrain.object_names import object_name
from dtrain.user_code import PATTERN, import_object

MetricFunction = Callable[[Tensor, Tensor], Any]
"""Takes output and target (rows, ...); returns the mean over the rows."""


Subject = Literal["classes", "values", "decisions", "any"]
"""Kind of target that a metric is made for: class labels, real numbers, yes-or-no labels."""


TOP = re.compile(r"top-([1-9][0-9]*)")


class Metric(ABC):
    """One metric.

    Attributes
    ----------
    subjects : tuple of str
        The kinds of target that it measures.
    higher_is_better : bool
        Whether a larger number is better.
    """

    subjects: tuple[Subject, ...]
    higher_is_better: bool = True

    @abstractmethod
    def update(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the sums (k,) over some samples, in float64."""

    @abstractmethod
    def compute(self, sums: Tensor) -> float:
        """Return the metric, given the sums over all samples."""


@final
class Accuracy(Metric):
    """Part of the positions whose k largest scores include the label; of yes-or-no labels, the part
    that is right."""

    subjects = ("classes", "decisions")

    def __init__(self, k: int = 1) -> None:
        self.k = k

    def update(self, output: Tensor, target: Tensor) -> Tensor:
        if output.shape == target.shape:
            right = output == target
        elif self.k == 1:
            right = output.argmax(1) == target
        else:
            largest = output.topk(min(self.k, output.shape[1]), 1).indices
            right = (largest == target[:, None]).any(1)
        return _sums(right.sum(), right.numel())

    def compute(self, sums: Tensor) -> float:
        return _ratio(sums[0], sums[1])


class ClassCounts(Metric):
    """Base of metrics of true positives, predictions and labels per class, (3, C)."""

    subjects = ("classes", "decisions")

    def update(self, output: Tensor, target: Tensor) -> Tensor:
        if output.shape == target.shape:  # yes-or-no labels: dim 1 is the label's number
            predicted, true = _by_channel(output), _by_channel(target)
        else:
            predicted = one_hot(output.argmax(1), output.shape[1])
            true = one_hot(target, output.shape[1])
        predicted, true = predicted.double(), true.double()
        return torch.stack([(predicted * true).sum(0), predicted.sum(0), true.sum(0)]).flatten()

    def compute(self, sums: Tensor) -> float:
        hits, predicted, true = sums.view(3, -1)
        return self.of_counts(hits, predicted, true)

    @abstractmethod
    def of_counts(self, hits: Tensor, predicted: Tensor, true: Tensor) -> float:
        """Return the metric of the counts (C,)."""


@final
class BalancedAccuracy(ClassCounts):
    """Mean recall of the classes that occur."""

    def of_counts(self, hits: Tensor, predicted: Tensor, true: Tensor) -> float:
        return _mean((hits / true)[true > 0])


@final
class MacroF1(ClassCounts):
    """Mean F1 of the classes that occur or are predicted."""

    def of_counts(self, hits: Tensor, predicted: Tensor, true: Tensor) -> float:
        both = predicted + true
        return _mean((2 * hits / both)[both > 0])


@final
class IoU(ClassCounts):
    """Mean intersection over union of the classes that occur or are predicted."""

    def of_counts(self, hits: Tensor, predicted: Tensor, true: Tensor) -> float:
        union = predicted + true - hits
        return _mean((hits / union)[union > 0])


@final
class Perplexity(Metric):
    """exp of the mean negative log-likelihood of the label."""

    subjects = ("classes",)
    higher_is_better = False

    def update(self, output: Tensor, target: Tensor) -> Tensor:
        likelihood = output.double().log_softmax(1).gather(1, target[:, None])
        return _sums(-likelihood.sum(), len(target))

    def compute(self, sums: Tensor) -> float:
        mean = _ratio(sums[0], sums[1])
        return math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf


@final
class MeanError(Metric):
    """Mean over all values of a power of the error's size; `root` takes the root of a mean
    square."""

    subjects = ("values", "decisions")
    higher_is_better = False

    def __init__(self, power: int, root: bool = False) -> None:
        self.power, self.root = power, root

    def update(self, output: Tensor, target: Tensor) -> Tensor:
        errors = (output.double() - target.double()).abs().pow(self.power)
        return _sums(errors.sum(), errors.numel())

    def compute(self, sums: Tensor) -> float:
        mean = _ratio(sums[0], sums[1])
        return math.sqrt(mean) if self.root else mean


@final
class R2(Metric):
    """1 - (squared errors / squared deviations from the mean), a mean over the channels that vary.

    Channels are dim 1; all positions of a channel count alike.
    """

    subjects = ("values",)

    def update(self, output: Tensor, target: Tensor) -> Tensor:
        predicted, true = _by_channel(output).double(), _by_channel(target).double()
        count = torch.full((true.shape[1],), float(len(true)), dtype=torch.float64)
        squares = [true.sum(0), true.square().sum(0), (predicted - true).square().sum(0)]
        return torch.stack([count.to(true.device), *squares]).flatten()

    def compute(self, sums: Tensor) -> float:
        count, total, squares, errors = sums.view(4, -1)
        deviations = squares - total.square() / count
        varies = deviations > 1e-12 * squares
        return _mean((1 - errors / deviations)[varies])


@final
class FunctionMetric(Metric):
    """A user's function (output, target) -> mean over the rows.

    Larger is better, unless the function has an attribute ``higher_is_better = False``.
    """

    subjects = ("any",)

    def __init__(self, function: MetricFunction) -> None:
        self.function = function
        self.higher_is_better = bool(getattr(function, "higher_is_better", True))

    def update(self, output: Tensor, target: Tensor) -> Tensor:
        return _sums(float(self.function(output, target)) * len(output), len(output))

    def compute(self, sums: Tensor) -> float:
        return _ratio(sums[0], sums[1])


@final
class TorchMetric(Metric):
    """A metric of torchmetrics whose states are all sums.

    Parameters
    ----------
    prototype : torchmetrics.Metric
        A fresh metric.
    """

    subjects = ("any",)

    def __init__(self, prototype: Any) -> None:
        self.prototype = prototype
        if hasattr(prototype, "set_dtype"):
            prototype.set_dtype(torch.float64)  # sums of float32 would depend on the split
        self.states = list(prototype._defaults)
        self.higher_is_better = getattr(prototype, "higher_is_better", None) is not False

    def update(self, output: Tensor, target: Tensor) -> Tensor:
        metric = copy.deepcopy(self.prototype)
        metric.update(output, target)
        values = [getattr(metric, state) for state in self.states]
        return torch.cat([torch.as_tensor(value).double().flatten() for value in values])

    def compute(self, sums: Tensor) -> float:
        metric, start = self._like(len(sums)), 0
        for state in self.states:
            default = torch.as_tensor(getattr(metric, state))
            values = sums[start : start + default.numel()].view(default.shape)
            setattr(metric, state, values.to(default.dtype))
            start += default.numel()
        metric._update_count = 1  # otherwise it warns that it was never updated
        return float(metric.compute())

    def _like(self, length: int) -> Any:
        """Return a metric whose states have `length` numbers: one may grow them in its first
        update, to one number for each column of the output."""
        for columns in range(length + 1):
            metric = copy.deepcopy(self.prototype)
            if columns:
                probe = torch.eye(columns + 2, columns, dtype=torch.float64)
                metric.update(probe, probe)
            if sum(torch.as_tensor(getattr(metric, s)).numel() for s in self.states) == length:
                return metric
        raise AssertionError(f"no states of {self.prototype} have {length} numbers")


METRICS: dict[str, Callable[[], Metric]] = {
    "accuracy": Accuracy,
    "balanced-accuracy": BalancedAccuracy,
    "macro-f1": MacroF1,
    "perplexity": Perplexity,
    "iou": IoU,
    "mae": lambda: MeanError(1),
    "mse": lambda: MeanError(2),
    "rmse": lambda: MeanError(2, root=True),
    "r2": R2,
}
"""Metrics by name; ``top-<k>`` and those of torchmetrics come on top."""


def make_metric(
    metric: str | MetricFunction, classes: int, folder: Path, ignore_index: int | None = None
) -> Metric:
    """Return the metric of a name or of a user's function.

    Parameters
    ----------
    classes : int
        Number of classes, for metrics of torchmetrics.
    folder : Path
        The folder in which a user's module is looked for first.
    ignore_index : int, optional
        The label that does not count, for metrics of torchmetrics.

    Raises
    ------
    ConfigError
        The name is unknown, or the metric needs arguments or has states that cannot be added up.
    """
    if not isinstance(metric, str):
        return FunctionMetric(metric)
    if ":" in metric:
        return FunctionMetric(import_object(metric, folder, "task"))
    if metric in METRICS:
        return METRICS[metric]()
    if match := TOP.fullmatch(metric):
        return Accuracy(int(match[1]))
    legal = [*METRICS, "top-5", PATTERN]
    unknown = unknown_name("metric", metric, legal, key="task.unknown-metric")
    try:
        kind = _torchmetrics_class(metric)
    except Exception as error:  # a package that it imports is broken
        reason = one_line(error)
        raise ConfigError(
            "task.unknown-metric",
            f"{unknown.message}; torchmetrics is installed, but cannot be imported ({reason})",
        ) from error
    if kind is None:
        raise unknown
    arguments = {"num_classes": classes, "num_labels": classes, "ignore_index": ignore_index}
    return _wrap_torchmetric(metric, kind, arguments)


def metric_name(metric: str | MetricFunction) -> str:
    """Return the name of a metric in run files and records."""
    return metric if isinstance(metric, str) else object_name(metric)


def _torchmetrics_class(name: str) -> type[Any] | None:
    """Return the class of torchmetrics with this name in kebab-case, those for classes first."""
    if find_spec("torchmetrics") is None:
        return None
    word = name.replace("-", "").lower()
    kinds = {kind.__name__.lower(): kind for kind in reversed([*_torchmetrics_classes()])}
    return kinds.get(f"multiclass{word}", kinds.get(word))


def _torchmetrics_classes() -> Iterator[type[Any]]:
    for module_name in ("torchmetrics.classification", "torchmetrics"):
        for kind in vars(import_module(module_name)).values():
            if isinstance(kind, type) and hasattr(kind, "compute"):
                yield kind


def _wrap_torchmetric(name: str, kind: type[Any], arguments: Mapping[str, Any]) -> TorchMetric:
    """Return a metric of torchmetrics; refuse one whose states are not sums, or that needs
    arguments."""
    legal = inspect.signature(kind).parameters
    try:
        metric = kind(**{key: value for key, value in arguments.items() if key in legal})
    except TypeError as error:
        raise ConfigError(
            "task.metric-needs-arguments",
            f"[task] metrics: '{name}' of torchmetrics cannot be made without arguments: {error}; "
            f"write a function that calls it ({PATTERN})",
        ) from error
    for state, reduction in metric._reductions.items():
        is_sum = getattr(reduction, "__name__", "") in ("dim_zero_sum", "sum")
        if isinstance(metric._defaults[state], list) or not is_sum:
            raise ConfigError(
                "task.metric-not-a-sum",
                f"[task] metrics: '{name}' of torchmetrics has the state '{state}', which is no "
                "sum over samples: choose a metric whose states are sums, or write a function",
            )
    return TorchMetric(metric)


def _by_channel(values: Tensor) -> Tensor:
    """Return values (rows, C, ...) as (positions, C)."""
    if values.dim() < 2:
        return values.reshape(-1, 1)
    return values.movedim(1, -1).reshape(-1, values.shape[1])


def _sums(total: Tensor | float, count: int) -> Tensor:
    return torch.tensor([float(total), float(count)], dtype=torch.float64)


def _ratio(total: Tensor, count: Tensor) -> float:
    return float(total) / float(count) if count else math.nan


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def add_sums(parts: Sequence[Sequence[float]]) -> Tensor:
    """Return the sums over all parts, added in their order."""
    total = [math.nan]
    for index, part in enumerate(parts):
        total = [a + b for a, b in zip(total, part, strict=True)] if index else list(part)
    return torch.tensor(total, dtype=torch.float64)
