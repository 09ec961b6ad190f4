"""Task: the loss, the targets and the metrics of a run, as every other package uses them.

=============  ========================  =======================  ==============================
kind           targets                   output                   losses
=============  ========================  =======================  ==============================
classes        (n,) or (n, *P) integers  (n, C) or (n, C, *P)     cross-entropy, nll, multi-margin
probabilities  (n, C) or (n, C, *P)      the same                 cross-entropy
decisions      (n, L), numbers 0 or 1    the same                 bce-with-logits, bce, ...
values         any shape                 the same                 all others
=============  ========================  =======================  ==============================

P are positions: the steps of a sequence, the pixels of an image. Classes are dim 1, as in torch;
`classes_last` takes outputs and probabilities (n, *P, C).

Invariant: a task is an immutable value, equal on all ranks. Losses and metrics are sums over
samples, so their means do not depend on micro-batches, replicas and stages.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dtrain.errors import ConfigError
from dtrain.object_names import object_name
from dtrain.schema import Table, kebab, snake
from dtrain.tasks.losses import (
    BALANCED,
    CLASS_LOSSES,
    COUNTING_LOSSES,
    DECISION_THRESHOLDS,
    GAUSSIAN,
    INDEX_LOSSES,
    Loss,
    LossFunction,
    TorchLoss,
    check_fields,
    make_loss,
)
from dtrain.tasks.metrics import (
    Accuracy,
    Metric,
    MetricFunction,
    add_sums,
    make_metric,
    metric_name,
)

Kind = Literal["classes", "probabilities", "decisions", "values"]


LabelNumbering = Literal["as-stored", "compact"]
"""The number of a class: its label as the data have it, or its place among the sorted labels."""


DEFAULT_LOSS = "cross-entropy"


CHECK_ROWS = 3
"""Rows on which the loss is tried before training."""


UNUSUAL_ROWS = 7919
"""A number of rows that no other dimension has, to find shapes that broadcast."""


DEFAULT_METRICS: dict[Kind, tuple[str, ...]] = {
    "classes": ("accuracy",),
    "probabilities": ("accuracy",),
    "decisions": ("accuracy",),
    "values": ("mae", "rmse", "r2"),
}


class TargetSpec(NamedTuple):
    """Targets of one sample.

    Attributes
    ----------
    shape : tuple of int
        Shape, () for a label or a number.
    dtype : torch.dtype
        int64, or a floating dtype.
    classes : int
        Number of outputs per position; 0 where unknown.
    weighted : bool
        Whether training samples have weights.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.int64
    classes: int = 0
    weighted: bool = False


@final
@dataclass(frozen=True, init=False)
class Task:
    """Loss, targets and metrics of a run.

    Parameters
    ----------
    loss : str or callable
        The name of a loss of `torch.nn`, "module:function", or a function (output, target) -> mean
        loss.
    metrics : sequence of (str or callable), optional
        Names of metrics, "module:function", or functions (output, target) -> mean over the rows. By
        default those of `DEFAULT_METRICS`.
    target : "data" or "input"
        The reference of the loss: the data's targets, or the input itself.
    classes_last : bool
        Whether outputs, and targets that are probabilities, have their classes in the last
        dimension.
    folder : Path, optional
        The folder in which user modules are looked for first; by default the working directory.
    fields
        Arguments of the loss class: ``label_smoothing=0.1``.

    Attributes
    ----------
    target_spec : TargetSpec
        The targets of the data, once they are known; see `bind`.
    labels : "as-stored" or "compact"
        The numbers of the classes, while data are opened; see `with_labels`.

    Raises
    ------
    ConfigError
        The loss or a field is unknown, or a value is of another type.
    """

    loss: str | LossFunction
    metrics: tuple[str | MetricFunction, ...] | None
    target: Literal["data", "input"]
    classes_last: bool
    fields: tuple[tuple[str, Any], ...]
    target_spec: TargetSpec
    labels: LabelNumbering
    folder: Path = field(compare=False, repr=False)

    def __init__(
        self,
        loss: str | LossFunction = DEFAULT_LOSS,
        metrics: Sequence[str | MetricFunction] | None = None,
        *,
        target: Literal["data", "input"] = "data",
        classes_last: bool = False,
        folder: Path | None = None,
        **fields: Any,
    ) -> None:
        values = {
            "loss": loss,
            "metrics": None if metrics is None else tuple(metrics),
            "target": target,
            "classes_last": classes_last,
            "fields": tuple(check_fields(loss, fields).items()),
            "target_spec": TargetSpec(),
            "labels": "as-stored",
            "folder": Path() if folder is None else folder,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if target not in ("data", "input"):
            raise ConfigError(
                "task.unknown-target",
                f'[task] target = "{target}": give "data", the targets of the data set, or "input"',
            )
        for metric in self.metrics or ():  # an unknown name is refused at once
            make_metric(metric, 2, self.folder)

    @staticmethod
    def from_table(table: Mapping[str, Any], folder: Path) -> Task:
        """Return the task of a run file's `[task]`.

        Raises
        ------
        ConfigError
            A key or a name is unknown, or a value is of another type.
        """
        types = {"loss": str, "metrics": list, "target": str, "classes-last": bool}
        for key, value in table.items():
            if key in types and not isinstance(value, types[key]):
                raise ConfigError(
                    "task.wrong-type",
                    f"[task] {key} = {value!r} does not fit: give a {types[key].__name__}",
                )
        return Task(folder=folder, **{snake(key): value for key, value in table.items()})

    def to_table(self) -> Table:
        """Return the task as a run file's table, without the keys that have their defaults."""
        table: Table = {} if self.loss == DEFAULT_LOSS else {"loss": self.loss_name}
        if self.metrics is not None:
            table["metrics"] = [metric_name(metric) for metric in self.metrics]
        if self.target != "data":
            table["target"] = self.target
        if self.classes_last:
            table["classes-last"] = True
        return table | {kebab(name): value for name, value in self.fields}

    # ---- targets

    def with_labels(self, labels: LabelNumbering) -> Task:
        """Return this task for data whose classes are numbered in one of the two ways."""
        task = copy.copy(self)
        object.__setattr__(task, "labels", labels)
        return task

    def bind(
        self, shape: tuple[int, ...], dtype: torch.dtype, classes: int, weighted: bool = False
    ) -> Task:
        """Return this task for targets of one shape (of one sample) and dtype; `weighted`: training
        samples have weights.

        Raises
        ------
        ConfigError
            A metric does not fit the targets, or a key needs classes.
        """
        task = self._copy()
        spec = TargetSpec(tuple(shape), dtype, classes, weighted)
        object.__setattr__(task, "target_spec", spec)
        if self.classes_last and not task.has_classes:
            raise ConfigError(
                "task.classes-last-without-classes",
                f"[task] classes-last = true needs classes, but '{self.loss_name}' compares "
                f"{task.kind}: leave it out",
            )
        if task.kind == "probabilities" and task.ignore_index is not None:
            raise ConfigError(
                "task.ignore-index-probabilities",
                f"[task] ignore-index = {task.ignore_index} skips integer labels, but the targets "
                "are probabilities: leave it out, or give integer labels",
            )
        subject = "classes" if task.has_classes else task.kind
        for name, metric in task._metrics.items():
            if not {subject, "any"} & set(metric.subjects):
                raise ConfigError(
                    "task.metric-target-mismatch",
                    f"[task] metrics: '{name}' measures {' and '.join(metric.subjects)}, but the "
                    f"targets of '{self.loss_name}' are {task.kind}: set metrics = "
                    f"{[*DEFAULT_METRICS[task.kind]]}",
                )
        return task

    def kind_of(self, is_integer: bool) -> Kind:
        """Return the kind of targets that are integers, or not."""
        if not isinstance(self.loss, str) or ":" in self.loss:
            return "classes" if is_integer and self.target == "data" else "values"
        if self.loss in CLASS_LOSSES:
            return "classes" if is_integer else "probabilities"
        return "decisions" if self.loss in DECISION_THRESHOLDS else "values"

    @cached_property
    def kind(self) -> Kind:
        """The kind of the targets."""
        return self.kind_of(not self.target_spec.dtype.is_floating_point)

    @property
    def outputs_per_value(self) -> int:
        """How many numbers along dim 1 the model returns for one of the target."""
        return 2 if self.loss == GAUSSIAN else 1

    @property
    def has_classes(self) -> bool:
        """Whether the targets are classes or their probabilities."""
        return self.kind in ("classes", "probabilities")

    @property
    def class_per_sample(self) -> bool:
        """Whether a target is one class label, and outputs are scores (n, C)."""
        return self.kind == "classes" and not self.target_spec.shape

    @property
    def counts_samples(self) -> bool:
        """Whether an accuracy is the part of the samples that are predicted rightly."""
        return self.has_classes and not self.has_positions and self.ignore_index is None

    @property
    def is_plain_classification(self) -> bool:
        """Whether a target is one class label and every sample counts alike."""
        return self.class_per_sample and not self.counts_positions

    @property
    def has_softmax_error(self) -> bool:
        """Whether a sample's gradient at its output is softmax - onehot."""
        is_plain = self.is_plain_classification and self.loss == "cross-entropy"
        return is_plain and not self.fields and not self.classes_last

    @property
    def has_positions(self) -> bool:
        """Whether a target has several positions, such as pixels."""
        return len(self.target_spec.shape) > (0 if self.kind == "classes" else 1)

    @cached_property
    def counts_positions(self) -> bool:
        """Whether the loss is a mean over counted positions, and not over samples."""
        loss = self._loss
        counts = getattr(loss, "counts_positions", False)
        return bool(counts) and (self.kind == "classes" or not isinstance(loss, TorchLoss))

    @property
    def ignore_index(self) -> int | None:
        """The label of positions that do not count, or None."""
        return dict(self.fields).get("ignore_index")

    @property
    def class_weights(self) -> tuple[float, ...]:
        """The weights of the classes; empty where all count alike."""
        weights = dict(self.fields).get("weight", ())
        return weights if self.loss in CLASS_LOSSES and weights != BALANCED else ()

    @property
    def balances_classes(self) -> bool:
        """Whether the weights of the classes are still to be computed; see `balance_classes`."""
        return dict(self.fields).get("weight") == BALANCED

    def balance_classes(self, counts: Sequence[int]) -> Task:
        """Return this task with the weights n / (K n_k) of classes that occur n_k times in the
        training labels, n in sum; K is the number of those that occur. Others have a weight of 1.

        Raises
        ------
        ConfigError
            The targets are no labels.
        """
        if self.kind != "classes":
            raise ConfigError(
                "task.weight-needs-labels",
                f'[task] weight = "{BALANCED}" counts class labels, but the targets are '
                f"{self.kind}: give one number per class, or leave weight out",
            )
        mean = sum(counts) / sum(count > 0 for count in counts)
        weights = tuple(mean / count if count else 1.0 for count in counts)
        task = self._copy()
        fields = dict(self.fields) | {"weight": weights}
        object.__setattr__(task, "fields", tuple(sorted(fields.items())))
        return task

    def _copy(self) -> Task:
        """Return a copy without what is computed from the fields and the targets."""
        task = copy.copy(self)
        for name in ("_loss", "_metrics", "kind", "counts_positions"):
            task.__dict__.pop(name, None)
        return task

    @property
    def loss_name(self) -> str:
        """The name of the loss."""
        return self.loss if isinstance(self.loss, str) else object_name(self.loss)

    @cached_property
    def _loss(self) -> Loss:
        fields = {key: value for key, value in self.fields if value != BALANCED}
        return make_loss(self.loss, fields, self.folder)

    @cached_property
    def _metrics(self) -> dict[str, Metric]:
        """The metrics by name."""
        metrics = DEFAULT_METRICS[self.kind] if self.metrics is None else self.metrics
        classes = self.target_spec.classes
        return {
            metric_name(each): make_metric(each, classes, self.folder, self.ignore_index)
            for each in metrics
        }

    def zero_targets(self, rows: int) -> Tensor:
        """Return targets of zeros (rows, ...)."""
        return torch.zeros(rows, *self.target_spec.shape, dtype=self.target_spec.dtype)

    def target_width(self, classes: int) -> int:
        """Return the numbers per sample of `target_vectors`."""
        positions = math.prod(self.target_spec.shape)
        return classes * positions if self.kind == "classes" else positions

    def target_vectors(self, target: Tensor, classes: int) -> Tensor:
        """Return targets as vectors (rows, target_width): labels as one-hot codes."""
        if self.kind != "classes":
            return target.flatten(1) if target.dim() > 1 else target[:, None]
        if self.ignore_index is not None:
            target = torch.where(target == self.ignore_index, 0, target)
        return one_hot(target, classes).flatten(1)

    # ---- the loss

    def mean_loss(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss () of outputs for targets (rows, ...): a mean over the samples, or over
        the counted positions; with the weights (rows,) of samples, where they have some."""
        if self.classes_last:
            output = self._classes_first(output)
        if self.kind != "classes":
            target = self._comparable(output, target)
        if weights is not None:
            return self._loss.weighted(output, target, weights)
        return self._loss(output, target)

    def loss_sum(self, output: Tensor, target: Tensor) -> tuple[float, float]:
        """Return the sum of the losses, and the number by which a mean divides it."""
        loss, count = self._loss, self.count(target)
        adds_up = self.kind == "classes" and (self.counts_positions or self.class_per_sample)
        if isinstance(loss, TorchLoss) and loss.name in COUNTING_LOSSES and adds_up:
            return float(loss.reduced("sum", self._classes_first(output), target)), count
        return float(self.mean_loss(output, target)) * count if count else 0.0, count

    def normaliser(self, targets: Tensor) -> float | None:
        """Return the number by which the mean over `targets` (rows, ...) divides, None where it is
        that of the rows."""
        count = self._loss.normaliser(targets) if self.counts_positions else None
        return None if count is None else float(count)

    def count(self, targets: Tensor, weights: Tensor | None = None) -> float:
        """Return the normaliser, or the number of rows; with the weights (rows,) of samples the
        weighted sum of either."""
        if weights is not None:
            parts = self.sample_counts(targets)
            return float(weights.sum() if parts is None else (weights * parts).sum())
        count = self._loss.normaliser(targets) if self.counts_positions else None
        return float(len(targets)) if count is None else float(count)

    def sample_counts(self, targets: Tensor) -> Tensor | None:
        """Return the part (rows,) of each sample in the normaliser, None where all count alike."""
        return self._loss.sample_normalisers(targets) if self.counts_positions else None

    def output_gradient(
        self, output: Tensor, target: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return the gradient at the output (rows, ...) of the *sum* of the losses, weighted where
        samples have weights (rows,): each sample's part depends on that sample alone."""
        if weights is not None:
            gradient = self.output_gradient(output, target)
            return gradient * weights.to(output).view(-1, *[1] * (output.dim() - 1))
        if self.has_softmax_error:
            return output.detach().softmax(1) - one_hot(target, output.shape[1])
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.mean_loss(leaf, target), leaf)
        return gradient * self.count(target)

    def _classes_first(self, output: Tensor) -> Tensor:
        return output.movedim(-1, 1) if self.classes_last else output

    def _comparable(self, output: Tensor, target: Tensor) -> Tensor:
        """Return targets as the loss takes them: values in the output's dtype, labels as they
        are."""
        if self.kind == "classes" or self.loss in INDEX_LOSSES:
            return target
        target = target.to(output.dtype)
        return self._classes_first(target) if self.kind == "probabilities" else target

    # ---- metrics

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of the metrics, in order."""
        return tuple(self._metrics)

    def higher_is_better(self, name: str) -> bool:
        """Return whether a larger value of a metric is better; true of an accuracy."""
        metric = self._metrics.get(name)
        return metric is None or metric.higher_is_better

    def correct(self, output: Tensor, target: Tensor) -> tuple[int, int]:
        """Return the positions whose largest score is the label's, and all counted positions."""
        right, count = Accuracy().update(*self._flat_classes(output, target))
        return int(right), int(count)

    def measure(self, output: Tensor, target: Tensor) -> dict[str, list[float]]:
        """Return the sums of all metrics over outputs and targets (rows, ...)."""
        return {
            name: metric.update(*self._views(metric, output, target)).tolist()
            for name, metric in self._metrics.items()
        }

    def compute_metrics(
        self, parts: Iterable[Mapping[str, Sequence[float]]]
    ) -> dict[str, float | None]:
        """Return the metrics, given the sums of all micro-batches in order; None where a metric is
        not finite."""
        parts, results = list(parts), {}
        for name, metric in self._metrics.items():
            value = metric.compute(add_sums([part[name] for part in parts]))
            results[name] = value if math.isfinite(value) else None
        return results

    def _views(self, metric: Metric, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and target as a metric takes them."""
        if self.outputs_per_value > 1:  # the means
            output = output[:, : output.shape[1] // 2].reshape(target.shape)
        if "any" in metric.subjects:
            return self._classes_first(output), self._comparable(output, target)
        if self.has_classes:
            return self._flat_classes(output, target)
        if self.kind == "decisions" and "values" not in metric.subjects:
            return output > DECISION_THRESHOLDS[str(self.loss)], target > 0.5
        return output, target

    def _flat_classes(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores (n, C) and the labels (n,) of all counted positions."""
        scores = self._classes_first(output)
        if self.kind == "probabilities":
            target = self._classes_first(target).argmax(1)
        flat = scores.movedim(1, -1).reshape(-1, scores.shape[1])
        labels = target.reshape(-1)
        if self.ignore_index is None:
            return flat, labels
        counted = labels != self.ignore_index
        return flat[counted], labels[counted]

    # ---- checks

    def expected_output_shape(self) -> tuple[int, ...] | None:
        """Return the shape of an output (of one sample) that fits the targets, None where any
        may."""
        shape, classes = self.target_spec.shape, self.target_spec.classes
        if self.kind == "classes":
            if not classes:
                return None
            return (*shape, classes) if self.classes_last else (classes, *shape)
        if not isinstance(self._loss, TorchLoss):
            return None
        if self.outputs_per_value > 1:
            return self.outputs_per_value * math.prod(shape[:1]), *shape[1:]
        return shape

    def check_output(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Refuse a model whose output (of one sample) does not fit the targets: try the loss once.

        Raises
        ------
        ConfigError
            The shapes differ, or the loss is not a differentiable number.
        """
        targets = self.target_spec.shape
        expected = self.expected_output_shape()
        broadcasts = shape != targets and _broadcasts(shape, targets)
        self._refuse_several_labels(shape)
        if (expected is None and self.kind == "values" and broadcasts) or (
            expected is not None and shape != expected
        ):
            wanted = targets if expected is None else expected
            raise ConfigError(
                "task.shapes-differ",
                f"the model returns {shape} for a sample and its target has shape {targets}: "
                f"'{self.loss_name}' needs an output of shape {wanted}; change the model's last "
                "layer, or the shape of the targets",
            )
        output = torch.zeros(CHECK_ROWS, *shape, dtype=dtype, requires_grad=True)
        try:
            loss = self.mean_loss(output, self.zero_targets(CHECK_ROWS))
        except (RuntimeError, ValueError, IndexError) as error:
            if not isinstance(self._loss, TorchLoss):
                raise
            raise ConfigError(
                "task.loss-refuses-shapes",
                f"'{self.loss_name}' refuses an output of shape {shape} with a target of shape "
                f"{targets} per sample: {error}",
            ) from error
        if not isinstance(loss, Tensor) or loss.shape or not loss.requires_grad:
            raise ConfigError(
                "task.loss-not-a-number",
                f"'{self.loss_name}' must return one differentiable number, the mean over the rows",
            )

    def _refuse_several_labels(self, shape: tuple[int, ...]) -> None:
        """Refuse yes-or-no labels of one sample that are taken for labels of positions."""
        targets, classes = self.target_spec.shape, self.target_spec.classes
        is_integer = self.kind == "classes" and self.loss in CLASS_LOSSES
        if is_integer and len(targets) == len(shape) == 1 and classes == 2:
            raise ConfigError(
                "task.several-labels",
                f"the model returns {shape} for a sample, which has {targets[0]} labels of 0 or 1: "
                'for yes-or-no labels set [task] loss = "bce-with-logits" and return '
                f"{targets} outputs; for a class per position return (2, {targets[0]})",
            )


def _broadcasts(shape: tuple[int, ...], targets: tuple[int, ...]) -> bool:
    try:
        np.broadcast_shapes((UNUSUAL_ROWS, *shape), (UNUSUAL_ROWS, *targets))
    except ValueError:
        return False
    return True


DEFAULT_TASK = Task()
"""Classification: the cross-entropy of one class label per sample."""
