"""Tasks: losses equal torch's, sums do not depend on the split, mistakes are refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from dtrain.block.micro_batch import MicroBatch
from dtrain.data import load_data, memory_limits, source_dataset
from dtrain.data.array_source import MemorySource
from dtrain.data.conversion import torch_dtype
from dtrain.data.dataset import DatasetSplits
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.statistics.standardise import standardise
from dtrain.data.user_data import as_splits
from dtrain.errors import ConfigError, DataError
from dtrain.monitoring.run_totals import RunTotals
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.prediction_heads import per_position
from dtrain.objectives.local_head import LocalHead
from dtrain.planning.plan import make_plan
from dtrain.tasks.losses import torch_losses
from dtrain.tasks.task import Task
from tests import task_data, tiny
from tests.refusals import refuses

ROWS = 12
REAL = torch.float64
LABELS = ("cross-entropy", "nll", "multi-margin")
IGNORED = -7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(name: str) -> tuple[Task, Tensor, Tensor]:
    """Return a task of a loss with outputs and targets (12, 3) that it takes; a Gaussian has
    outputs (12, 6)."""
    width = 6 if name == "gaussian-nll" else 3
    output = torch.randn(ROWS, width, generator=generator(), dtype=REAL)
    target = torch.rand(ROWS, 3, generator=generator(1), dtype=REAL)
    if name in LABELS:
        target = torch.randint(0, 3, (ROWS,), generator=generator(1))
    elif name == "multi-label-margin":
        target = torch.tensor([[2, 0, -1], [1, -1, -1], [-1, -1, -1]]).repeat(4, 1)
    elif name in ("hinge-embedding", "soft-margin"):
        target = torch.where(target > 0.5, 1.0, -1.0).to(REAL)
    elif name in ("bce", "bce-with-logits", "multi-label-soft-margin"):
        target = (target > 0.5).long()
    output = output.sigmoid() if name == "bce" else output
    output = output.log_softmax(1) if name in ("nll", "kl-div") else output
    return Task(name).bind(tuple(target.shape[1:]), target.dtype, 3), output, target


@pytest.mark.parametrize("name", torch_losses())
def test_a_named_loss_is_that_of_torch(name: str) -> None:
    task, output, target = case(name)
    reduction = "batchmean" if name == "kl-div" else "mean"
    theirs = target if name in LABELS or name == "multi-label-margin" else target.to(REAL)
    expected = torch_losses()[name](reduction=reduction)(output, theirs)
    assert torch.equal(task.mean_loss(output, target), expected)
    assert task.normaliser(target) is None


@pytest.mark.parametrize("name", torch_losses())
def test_sums_of_parts_are_the_loss_of_all(name: str) -> None:
    task, output, target = case(name)
    parts = [task.loss_sum(output[i:j], target[i:j]) for i, j in ((0, 5), (5, 6), (6, 12))]
    mean = sum(loss for loss, _ in parts) / sum(count for _, count in parts)
    assert_close(torch.tensor(mean, dtype=REAL), task.mean_loss(output, target), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", torch_losses())
def test_every_loss_of_torch_is_weighted_by_repetition(name: str) -> None:
    """A weight of k is k samples; equal weights are none; zero weights have no gradient."""
    task, output, target = case(name)
    output.requires_grad_()
    repeats = torch.tensor([2, 0, 1, 3] * (len(target) // 4 + 1))[: len(target)]
    weights = repeats.double()
    loss = task.mean_loss(output, target, weights)
    repeated = task.mean_loss(
        output.repeat_interleave(repeats, 0), target.repeat_interleave(repeats, 0)
    )
    assert_close(loss, repeated, rtol=1e-12, atol=1e-14)
    same = task.mean_loss(output, target, torch.full_like(weights, 0.3))
    assert_close(same, task.mean_loss(output, target), rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(loss, output)
    assert not gradient[repeats == 0].any()
    expected = task.output_gradient(output, target, weights) / task.count(target, weights)
    assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_a_weighted_count_is_that_of_the_counted_positions() -> None:
    task = Task(weight=[1.0, 5.0, 2.0], ignore_index=9).bind((2,), torch.int64, 3, weighted=True)
    target, weights = torch.tensor([[0, 1], [9, 2], [9, 9]]), torch.tensor([0.5, 2.0, 7.0])
    assert task.count(target, weights) == 0.5 * 6 + 2 * 2
    micro_batch = MicroBatch(targets=target, task=task, weights=weights, loss_scale=0.5)
    assert micro_batch.sample_scale == 0.5 / 7
    assert task.count(target[2:], weights[2:]) == 0
    none = task.mean_loss(torch.zeros(1, 3, 2), target[2:], weights[2:])
    assert float(none) == 0


COUNTED: list[dict[str, Any]] = [
    {"ignore_index": IGNORED},
    {"weight": (0.2, 3.0, 1.5)},
    {"weight": (0.2, 3.0, 1.5), "ignore_index": IGNORED},
    {"weight": (0.2, 3.0, 1.5), "ignore_index": IGNORED, "label_smoothing": 0.2},
]


def counted_case(fields: dict[str, Any]) -> tuple[Task, Tensor, Tensor]:
    """Return a task with counted positions, outputs (12, 3, 5) and targets (12, 5)."""
    output = torch.randn(ROWS, 3, 5, generator=generator(), dtype=REAL)
    target = torch.randint(0, 3, (ROWS, 5), generator=generator(1))
    if "ignore_index" in fields:
        target[torch.rand(ROWS, 5, generator=generator(2)) < 0.3] = IGNORED
        target[2] = IGNORED
    return Task(**fields).bind((5,), torch.int64, 3), output.requires_grad_(), target


@pytest.mark.parametrize("fields", COUNTED)
def test_parts_weighted_by_their_normalisers_are_torchs_mean_of_all(fields: dict[str, Any]) -> None:
    task, output, target = counted_case(fields)
    weight = torch.tensor(fields["weight"], dtype=REAL) if "weight" in fields else None
    theirs = {key: value for key, value in fields.items() if key != "weight"}
    expected = functional.cross_entropy(output, target, weight, **theirs)
    [gradient] = torch.autograd.grad(expected, output)
    total = task.normaliser(target)
    assert total is not None
    loss = torch.zeros((), dtype=REAL)
    for i, j in ((0, 2), (2, 3), (3, 7), (7, 12)):
        part = task.mean_loss(output[i:j], target[i:j])
        loss = loss + part * task.count(target[i:j]) / total
    assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(loss, output)[0], gradient, rtol=1e-12, atol=1e-15)
    assert_close(task.output_gradient(output, target) / total, gradient, rtol=1e-12, atol=1e-15)


def test_a_part_in_which_no_position_counts_adds_nothing() -> None:
    task, output, target = counted_case(COUNTED[2])
    loss = task.mean_loss(output, torch.full_like(target, IGNORED))
    [gradient] = torch.autograd.grad(loss, output)
    assert float(loss.detach()) == 0 == task.count(torch.full_like(target, IGNORED))
    assert not gradient.any()


@pytest.mark.parametrize("name", torch_losses())
def test_the_gradient_at_the_output_of_a_sample_depends_on_that_sample(name: str) -> None:
    task, output, target = case(name)
    output = output.requires_grad_()
    [mean] = torch.autograd.grad(task.mean_loss(output, target), output)
    assert_close(task.output_gradient(output, target) / ROWS, mean, rtol=1e-12, atol=1e-15)
    alone = task.output_gradient(output[3:4], target[3:4])
    assert_close(task.output_gradient(output, target)[3:4], alone, rtol=1e-12, atol=1e-15)


def test_the_gradient_of_plain_classes_is_softmax_minus_onehot_to_the_bit() -> None:
    _, output, target = case("cross-entropy")
    expected = output.softmax(1) - functional.one_hot(target, 3)
    assert torch.equal(Task().output_gradient(output, target), expected)


def test_classes_last_is_the_loss_of_the_transposed_output() -> None:
    _, output, target = counted_case(COUNTED[0])
    task = Task(classes_last=True, ignore_index=IGNORED).bind((5,), torch.int64, 3)
    expected = functional.cross_entropy(output, target, ignore_index=IGNORED)
    assert_close(task.mean_loss(output.movedim(1, -1), target), expected, rtol=1e-12, atol=0)


# Metrics


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return counts [label, prediction]."""
    counts = np.zeros((scores.shape[1],) * 2)
    np.add.at(counts, (labels, scores.argmax(1)), 1)
    return counts


def recall(scores: np.ndarray, labels: np.ndarray) -> float:
    counts = confusion(scores, labels)
    rows = counts.sum(1)
    return float(np.mean(np.diag(counts)[rows > 0] / rows[rows > 0]))


def overlap(scores: np.ndarray, labels: np.ndarray, twice: float) -> float:
    """Return the mean over classes of F1 (`twice` 2) or IoU (1)."""
    counts = confusion(scores, labels)
    hits, sizes = np.diag(counts), counts.sum(0) + counts.sum(1)
    occurs = sizes > 0
    return float(np.mean(twice * hits[occurs] / (sizes - (2 - twice) * hits)[occurs]))


def log_likelihood(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return np.asarray(log[np.arange(len(labels)), labels])


def in_top(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    return float(
        np.mean([label in np.argsort(-s)[:k] for s, label in zip(scores, labels, strict=True)])
    )


CLASS_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda s, t: float(np.mean(s.argmax(1) == t)),
    "top-2": lambda s, t: in_top(s, t, 2),
    "top-5": lambda s, t: 1.0,
    "balanced-accuracy": recall,
    "macro-f1": lambda s, t: overlap(s, t, 2.0),
    "iou": lambda s, t: overlap(s, t, 1.0),
    "perplexity": lambda s, t: float(np.exp(-log_likelihood(s, t).mean())),
}


def measured(task: Task, output: Tensor, target: Tensor) -> dict[str, float | None]:
    """Return the metrics of sums over uneven parts."""
    parts = [task.measure(output[i:j], target[i:j]) for i, j in ((0, 5), (5, 6), (6, 12))]
    return task.compute_metrics(parts)


@pytest.mark.parametrize("name", CLASS_METRICS)
def test_class_metrics_are_their_formulas_over_the_counted_positions(name: str) -> None:
    _, output, target = counted_case(COUNTED[0])
    task = Task(metrics=[name], ignore_index=IGNORED).bind((5,), torch.int64, 3)
    counted = (target != IGNORED).numpy()
    scores = output.detach().movedim(1, -1).numpy()[counted]
    expected = CLASS_METRICS[name](scores, target.numpy()[counted])
    assert measured(task, output.detach(), target)[name] == pytest.approx(expected, rel=1e-12)


VALUE_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mae": lambda o, t: float(np.abs(o - t).mean()),
    "mse": lambda o, t: float(((o - t) ** 2).mean()),
    "rmse": lambda o, t: float(np.sqrt(((o - t) ** 2).mean())),
    "r2": lambda o, t: float(
        np.mean(1 - ((o - t) ** 2).sum(0) / ((t - t.mean(0)) ** 2).sum(0)),
    ),
    "tests.task_data:largest_error": lambda o, t: float(np.abs(o - t).max(1).mean()),
}


@pytest.mark.parametrize("name", VALUE_METRICS)
def test_value_metrics_are_their_formulas(name: str) -> None:
    _, output, target = case("mse")
    task = Task("mse", [name]).bind((3,), REAL, 3)
    expected = VALUE_METRICS[name](output.numpy(), target.numpy())
    assert measured(task, output, target)[name] == pytest.approx(expected, rel=1e-12)


def test_metrics_of_yes_or_no_labels() -> None:
    task, output, target = case("bce-with-logits")
    right = ((output > 0) == (target > 0.5)).double().mean()
    assert measured(task, output, target) == {"accuracy": pytest.approx(float(right))}


def test_a_constant_target_has_no_r2() -> None:
    task = Task("mse", ["r2"]).bind((3,), REAL, 3)
    output = torch.randn(ROWS, 3, generator=generator(), dtype=REAL)
    assert measured(task, output, torch.ones_like(output)) == {"r2": None}


class SumMetric:
    """A metric as torchmetrics has them: a mean of squares, and how its states are reduced."""

    def __init__(self, reduction: Callable[..., Any], default: Any) -> None:
        self._defaults = {"total": default, "count": torch.tensor(0)}
        self._reductions = {"total": reduction, "count": dim_zero_sum}
        self.total, self.count = torch.zeros(2), torch.tensor(0)

    def update(self, output: Tensor, target: Tensor) -> None:
        self.total = self.total + (output - target).square().sum(0)[:2]
        self.count = self.count + len(output)

    def compute(self) -> Tensor:
        return self.total.sum() / self.count


def dim_zero_sum(values: Tensor) -> Tensor:
    return values.sum(0)


class MeanPairs(SumMetric):
    def __init__(self) -> None:
        super().__init__(dim_zero_sum, torch.zeros(2))


class Listing(SumMetric):
    def __init__(self) -> None:
        super().__init__(dim_zero_sum, [])


class Largest(SumMetric):
    def __init__(self) -> None:
        super().__init__(max, torch.zeros(2))


def test_metrics_of_torchmetrics_are_taken_where_their_states_are_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, classes = types.ModuleType("torchmetrics"), types.ModuleType("classification")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    for kind in (MeanPairs, Listing, Largest):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "torchmetrics", module)
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", classes)
    _, output, target = case("mse")
    task = Task("mse", ["mean-pairs"]).bind((3,), REAL, 3)
    expected = float((output - target).square()[:, :2].sum()) / ROWS
    assert measured(task, output, target)["mean-pairs"] == pytest.approx(expected)
    for name in ("listing", "largest"):
        with refuses(ConfigError, "task.metric-not-a-sum"):
            Task("mse", [name])


# Run files


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"loss": "cross-entropi"}, "task.unknown-loss"),
        ({"loss": "mse", "delta": 1.0}, "task.unknown-key"),
        ({"label-smothing": 0.1}, "task.unknown-key"),
        ({"reduction": "sum"}, "task.unknown-key"),
        ({"metrics": ["acuracy"]}, "task.unknown-metric"),
        ({"metrics": "accuracy"}, "task.wrong-type"),
        ({"label-smoothing": "much"}, "task.wrong-type"),
        ({"weight": 2.0}, "task.wrong-type"),
        ({"classes-last": 1}, "task.wrong-type"),
        ({"target": "output"}, "task.unknown-target"),
        ({"loss": "tests.task_data:absent"}, "user-code.no-function"),
        ({"label_smoothing": 0.1}, "run-file.underscore"),
    ],
)
def test_mistakes_in_a_run_file_are_refused(table: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        run = tiny.run(task=table)
        make_plan(run, 1)


@pytest.mark.parametrize(
    "table",
    [
        {"loss": "huber", "delta": 0.5, "metrics": ["mae", "r2"]},
        {"weight": [1.0, 2.0], "ignore-index": 255, "classes-last": True},
        {"loss": "tests.task_data:quartic", "target": "input"},
    ],
)
def test_a_task_is_the_table_that_it_came_from(table: dict[str, Any]) -> None:
    task = Task.from_table(table, Path())
    written = task.to_table()
    assert {key: [*v] if isinstance(v, tuple) else v for key, v in written.items()} == table
    assert Task.from_table(written, Path()) == task
    assert hash(Task.from_table(written, Path())) == hash(task)


def test_a_task_of_functions_is_written_by_their_names() -> None:
    task = Task(task_data.quartic, [task_data.largest_error])
    names = "tests.task_data:quartic", "tests.task_data:largest_error"
    assert task.to_table() == {"loss": names[0], "metrics": [names[1]]}


def test_the_default_task_adds_nothing_to_a_resolved_run() -> None:
    """So a run folder of an earlier version can be resumed."""
    assert "task" not in tiny.run().to_table()
    assert tiny.run(task={"loss": "cross-entropy"}).to_table() == tiny.run().to_table()
    assert tiny.run(task__label_smoothing=0.1).to_table()["task"]["label-smoothing"] == 0.1


# Shapes and objectives


def plan(data: str, model: str | None = None, **changes: Any) -> None:
    changes["data__name"] = f"tests.task_data:{data}"
    if model is not None:
        changes |= {"model__name": f"tests.task_data:{model}", "model__widths": None}
    make_plan(tiny.run(**changes), 1)


def test_shapes_that_would_broadcast_are_refused_with_both_shapes() -> None:
    for loss in ("mse", "tests.task_data:quartic"):
        with refuses(ConfigError, "task.shapes-differ") as caught:
            plan("flat_numbers", "column_net", task__loss=loss, objective__name="backprop")
        assert "(1,)" in caught.value.message
        assert "shape ()" in caught.value.message
        plan("flat_numbers", "number_net", task__loss=loss, objective__name="backprop")


@pytest.mark.parametrize(
    ("data", "model", "task", "key"),
    [
        ("segments", "pixel_net", {"weight": [1.0, 2.0, 1.0]}, "data.labels-out-of-range"),
        ("tokens", "token_net", {}, "task.shapes-differ"),
        ("numbers", None, {"loss": "nll"}, "data.labels-not-integers"),
        ("numbers", None, {"loss": "tests.task_data:no_number"}, "task.loss-not-a-number"),
        ("numbers", None, {"loss": "tests.task_data:constant"}, "task.loss-not-a-number"),
        ("numbers", None, {"loss": "mse", "metrics": ["accuracy"]}, "task.metric-target-mismatch"),
        (
            "numbers",
            None,
            {"loss": "mse", "classes-last": True},
            "task.classes-last-without-classes",
        ),
        ("probabilities", None, {"ignore-index": 1}, "task.ignore-index-probabilities"),
        ("probabilities", None, {"ignore-index": -1}, "task.ignore-index-probabilities"),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    data: str, model: str | None, task: dict[str, Any], key: str
) -> None:
    kind = DataError if key.startswith("data.") else ConfigError
    with refuses(kind, key):
        plan(data, model, task=task, objective__name="backprop")


NEED_LABELS = (
    *("ccl", "diffusion-blocks", "drtp", "forward-forward", "forward-gnn", "layer-collaboration"),
    *("lls", "lls-m", "lls-mxm", "noprop", "scalable-ff", "tpsgd"),
)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_serves_real_numbers_or_is_refused(objective: str) -> None:
    changes = {"task__loss": "mse", "objective__name": objective, "micro_batches": 1}
    if objective not in NEED_LABELS:
        plan("numbers", **changes)
        return
    with refuses(ConfigError, "task.objective-needs-classes"):
        plan("numbers", **changes)


@pytest.mark.parametrize(
    ("inner", "outer", "classes_last"),
    [
        ((6, 4, 4), (3, 4, 4), False),
        ((6, 9), (3, 9), False),
        ((9, 6), (3, 9), False),
        ((9, 6), (9, 3), True),
        ((6, 9), (9, 3), True),
    ],
)
def test_a_head_per_position_has_the_shape_of_the_prediction(
    inner: tuple[int, ...], outer: tuple[int, ...], classes_last: bool
) -> None:
    positions = outer[:-1] if classes_last else outer[1:]
    task = Task(classes_last=classes_last).bind(positions, torch.int64, 3)
    spec = BlockSpec(0, 2, (), inner, REAL, 3, prediction_shape=outer, task=task)
    head = per_position(spec).to(REAL)
    x = torch.randn(2, *inner, generator=generator(), dtype=REAL)
    assert head(x).shape == (2, *outer)
    x.requires_grad_()
    position = head(x).reshape(2, -1)[0, 0]  # a class at the first position
    [gradient] = torch.autograd.grad(position, x)
    assert int((gradient != 0).sum()) == 6  # reads the channels of its position alone


def test_a_head_behind_a_coarse_block_interpolates() -> None:
    """A constant field stays constant."""
    task = Task().bind((4, 4), torch.int64, 3)
    spec = BlockSpec(0, 2, (), (6, 2, 2), REAL, 3, prediction_shape=(3, 4, 4), task=task)
    output = per_position(spec).to(REAL)(torch.ones(2, 6, 2, 2, dtype=REAL))
    assert output.shape == (2, 3, 4, 4)
    torch.testing.assert_close(output, output[:, :, :1, :1].expand_as(output))


def test_a_head_per_position_needs_the_positions_of_the_prediction() -> None:
    task = Task().bind((4, 4), torch.int64, 3)
    spec = BlockSpec(0, 2, (), (96,), REAL, 3, prediction_shape=(3, 4, 4), task=task)
    with refuses(ConfigError, "task.head-positions"):
        LocalHead().build_head(spec)
    with refuses(ConfigError, "task.head-positions"):
        LocalHead(head="dgl").build_head(spec)


# Data


def splits(task: Task, x: np.ndarray, y: np.ndarray | None) -> DatasetSplits:
    return as_splits((x, y, x, y), "data 'mine'", task)


X = np.arange(24.0).reshape(4, 6)


@pytest.mark.parametrize(
    ("task", "y", "key"),
    [
        (Task(), np.array([[0, 1], [2, -1], [0, 0], [0, 0]]), "data.labels-negative"),
        (Task(ignore_index=7), np.full((4, 2), 7), "data.labels-all-ignored"),
        (Task(weight=(1, 1)), np.array([0, 1, 2, 0]), "data.labels-out-of-range"),
        (Task("mse"), np.array(list("abcd")), "data.targets-dtype"),
        (Task("mse"), np.array([1.0, 2.0, np.nan, 3.0]), "data.targets-not-finite"),
        (Task("mse"), None, "data.targets-dtype"),
        (Task("mse"), np.zeros((3, 2)), "data.lengths-differ"),
        (Task("tests.task_data:quartic"), np.zeros((4, 1), np.int64), "data.labels-not-integers"),
    ],
)
def test_targets_that_a_task_cannot_have(task: Task, y: np.ndarray | None, key: str) -> None:
    with refuses(DataError, key):
        splits(task, X, y)


def write(folder: Path, y: np.ndarray | None) -> None:
    """Write two HDF5 files of len(y), or 9, samples (6,)."""
    rows = 9 if y is None else len(y)
    for split in ("train", "test"):
        with h5py.File(folder / f"{split}.h5", "w") as file:
            file["x"] = np.arange(6.0 * rows).reshape(rows, 6)
            if y is not None:
                file.create_dataset("y", data=y, chunks=(2, *y.shape[1:]))


def open_hdf5(folder: Path, task: Task) -> DatasetSplits:
    files = {"train": "train.h5", "test": "test.h5"}
    return load_data("hdf5", files, folder, normalise=False, task=task)


@pytest.mark.parametrize("in_memory", [True, False])
def test_targets_of_a_file_are_checked_and_read_part_by_part(
    in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_limits, "available_bytes", lambda: 2**30 if in_memory else 8)
    monkeypatch.setattr(source_dataset, "SAMPLES_PER_READ", 4)
    y = np.random.default_rng(0).integers(0, 4, (9, 5))
    y[6, 2] = 255
    write(tmp_path, y)
    train = open_hdf5(tmp_path, Task(ignore_index=255)).train
    assert (train.classes, train.target_shape) == (4, (5,))
    assert torch.equal(train.targets([7, 6, 0, 8]), torch.from_numpy(y[[7, 6, 0, 8]]))
    with refuses(DataError, "data.labels-out-of-range") as caught:
        open_hdf5(tmp_path, Task(weight=[1.0] * 4))
    assert "sample 6" in caught.value.message
    (tmp_path / "real").mkdir()
    write(tmp_path / "real", np.where(y == 255, np.nan, y))
    with refuses(DataError, "data.targets-not-finite") as caught:
        open_hdf5(tmp_path / "real", Task("mse"))
    assert "sample 6" in caught.value.message


def test_a_file_without_targets_is_its_own_target(tmp_path: Path) -> None:
    write(tmp_path, None)
    train = open_hdf5(tmp_path, Task("mse", target="input")).train
    assert torch.equal(train.targets([8, 3]), train.inputs([8, 3]))
    with refuses(DataError, "data.hdf5-dataset-missing"):
        open_hdf5(tmp_path, Task("mse"))


def test_the_totals_of_an_older_checkpoint_have_means_over_samples() -> None:
    totals = RunTotals(rows=8, loss_weight=8.0, loss=[4.0])
    state = totals.state()
    del state["loss_weight"]
    assert RunTotals.from_state(state).losses() == totals.losses() == [0.5]


def test_ignored_labels_are_no_classes() -> None:
    y = np.array([[0, 2], [255, 1], [255, 255], [0, 0]])
    train = splits(Task(ignore_index=255), X, y).train
    assert (train.classes, train.target_shape, train.target_dtype) == (3, (2,), torch.int64)
    assert torch.equal(train.targets([2, 1]), torch.from_numpy(y[[2, 1]]))


def test_targets_of_the_two_splits_are_alike() -> None:
    with refuses(DataError, "data.splits-targets-differ"):
        as_splits((X, X[:, :2], X, X[:, :3]), "data 'mine'", Task("mse"))


def test_real_targets_keep_their_dtype_and_integers_are_read_for_real_losses() -> None:
    for dtype, expected in (
        (np.float16, torch.float32),
        (np.float64, REAL),
        (np.uint8, torch.int64),
    ):
        train = splits(Task("mse"), X, X[:, :2].astype(dtype)).train
        assert train.targets([1]).dtype == train.target_dtype == expected
        assert train.classes == 2


def test_the_input_is_its_own_target() -> None:
    run = tiny.run(
        task={"loss": "mse", "target": "input"},
        model={"name": "tests.task_data:autoencoder"},
        objective__name="backprop",
    )
    data = make_plan(run, 1).data
    assert torch.equal(data.train.targets([3, 1]), data.train.inputs([3, 1]))
    assert data.train.target_shape == (2, 5)
    with refuses(ConfigError, "task.input-target-augmented"):
        make_plan(tiny.run(task__target="input", data__augment="crop-flip", task__loss="mse"), 1)


NUMBERS = (
    "bool",
    *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)),
    "float16",
    "float32",
)


@pytest.mark.parametrize("dtype", [*NUMBERS, "float64", "longdouble", ">i2", ">f4"])
def test_numbers_of_every_dtype_are_read(dtype: str) -> None:
    x = np.array([[0, 1], [1, 0]]).astype(dtype)
    train = as_splits((x, [0, 1], x, [0, 1]), "data 'mine'").train
    scale = 255 if dtype == "uint8" else 1
    expected = torch.tensor([[1, 0], [0, 1]]).to(train.inputs([0]))
    assert_close(train.inputs([1, 0]) * scale, expected, rtol=0, atol=0)
    is_double = dtype in ("float64", "longdouble")
    assert train.inputs([0]).dtype == (REAL if is_double else torch.float32)
    assert train.input_dtype == torch_dtype(x.dtype)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int64", ">i4"])
def test_integer_inputs_come_out_untouched(dtype: str) -> None:
    x = np.array([[200, 3], [7, 100], [0, 1]]).astype(dtype)
    data = tiny_standardised(x).as_integers()
    assert data.train.inputs([2, 0]).dtype == data.train.input_dtype == torch.int64
    assert torch.equal(data.train.inputs([2, 0]), torch.tensor([[0, 1], [200, 3]]))
    assert torch.equal(data.train.targets([2, 0]), torch.tensor([0, 0]))


def test_real_inputs_are_no_integers() -> None:
    with refuses(DataError, "data.inputs-not-integers"):
        tiny_standardised(np.ones((3, 2), np.float32)).as_integers()
    with refuses(DataError, "data.inputs-not-integers"):
        dataset = SourceDataset(
            MemorySource(np.ones((3, 2))), MemorySource(np.zeros(3, np.int64)), 2
        )
        dataset.integer_inputs([0])


def tiny_standardised(x: np.ndarray) -> DatasetSplits:
    y = np.array([0, 1, 0])
    return standardise(as_splits((x, y, x, y), "data 'mine'"))


def test_losses_with_parameters_of_their_own_are_not_named() -> None:
    """Their parameters would belong to no block."""
    parametric = [name for name, kind in torch_losses().items() if [*kind().parameters()]]
    assert parametric == []
    assert issubclass(torch_losses()["mse"], nn.Module)


# Balanced classes


def test_balanced_weights_are_those_of_the_training_labels() -> None:
    """n / (K n_k); the run keeps the word, the bound task the numbers."""
    labels = task_data.labels()[1]
    run = tiny.run(data__name="tests.task_data:labels", task__weight="balanced")
    assert run.to_table()["task"]["weight"] == "balanced"
    task = make_plan(run, 1).layout.task
    assert task.class_weights == pytest.approx(tuple(50 / (3 * np.bincount(labels))))
    other = tiny.run(data__name="tests.task_data:labels", task__weight=list(task.class_weights))
    assert make_plan(other, 1).layout.task == task


def test_ignored_labels_and_missing_classes_do_not_count() -> None:
    run = tiny.run(
        data__name="tests.task_data:segments",
        model={"name": "tests.task_data:pixel_net"},
        partition={"cuts": [2, 4]},
        task={"weight": "balanced", "ignore-index": task_data.IGNORED},
    )
    labels = task_data.segments()[1]
    counts = np.bincount(labels[labels != task_data.IGNORED])
    weights = make_plan(run, 1).layout.task.class_weights
    assert weights == pytest.approx(tuple(counts.sum() / (3 * counts)))
    assert Task(weight="balanced").balance_classes([6, 0, 2]).class_weights == (4 / 6, 1, 2)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"task__loss": "multi-margin", "task__weight": "balanced"}, "task.wrong-type"),
        ({"task__weight": "balance"}, "task.wrong-type"),
        (
            {"task__weight": "balanced", "data__name": "tests.task_data:probabilities"},
            "task.weight-needs-labels",
        ),
    ],
)
def test_balanced_weights_need_labels(changes: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        make_plan(tiny.run(**changes), 1)
