"""Laws over whole runs of tasks that are not one class label per sample."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError
from dtrain.evaluation import evaluate_run
from dtrain.models import load_model
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from tests import task_data, tiny
from tests.harness import assert_close_model, assert_same_model, train_in_threads
from tests.need import lack
from tests.outcome import model
from tests.public_nets import import_torchvision
from tests.refusals import refuses

WEIGHT = (0.5, 2.0, 1.0)
SEGMENTS = {"weight": [*WEIGHT], "ignore-index": task_data.IGNORED, "metrics": ["iou", "macro-f1"]}
SCHEDULES = {"dfa": "drained", "f3": "stream", "mono-forward": "stream"}
KEYS = ("train_loss", "test_loss", "test_accuracy", "test_accuracy_vote")


def task_run(data: str, net: str | None, task: dict[str, Any], **changes: Any) -> RunConfig:
    """Return the tiny run of a task: three blocks of two layers."""
    changes = {"objective__name": "backprop"} | changes
    if net is not None:
        changes["model"] = {"name": f"tests.task_data:{net}"}
        changes |= {"partition": {"cuts": [2, 4]}}
    return tiny.run(data__name=f"tests.task_data:{data}", task=task, **changes)


def segments(objective: str, **changes: Any) -> RunConfig:
    """Return a run with class weights and ignored pixels."""
    schedule = SCHEDULES.get(objective, "1f1b")
    changes = {"objective__name": objective, "schedule__name": schedule} | changes
    return task_run("segments", "pixel_net", SEGMENTS, **changes)


def assert_close_results(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Assert that two runs have the same losses and metrics, up to rounding."""
    for key in KEYS:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-10), key
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-10)


@pytest.mark.parametrize("objective", ["backprop", "mono-forward", "dfa", "f3", "deep-supervision"])
def test_counted_positions_train_the_same_model_in_any_split(
    objective: str, tmp_path: Path
) -> None:
    """One micro-batch is four, and three replicas, some of which have no counted position."""
    one = train_in_threads(segments(objective, micro_batches=1), tmp_path / "one")
    four = train_in_threads(segments(objective, micro_batches=4), tmp_path / "four")
    many = train_in_threads(
        segments(objective, mesh__stages=2), tmp_path / "many", stages=2, replicas=3
    )
    assert_close_model(tmp_path / "one", tmp_path / "four")
    assert_close_model(tmp_path / "one", tmp_path / "many")
    assert_close_results(four, one)
    assert_close_results(many, one)


@pytest.mark.parametrize("objective", ["backprop", "mono-forward", "dfa"])
def test_any_number_of_stages_has_the_same_bits_and_metrics(objective: str, tmp_path: Path) -> None:
    run = segments(objective)
    one = train_in_threads(run, tmp_path / "1")
    for stages in (2, 3):
        other = train_in_threads(run, tmp_path / f"{stages}", stages=stages)
        assert_same_model(tmp_path / "1", tmp_path / f"{stages}")
        assert other["digest"] == one["digest"]
        assert [other[key] for key in (*KEYS, "metrics")] == [
            one[key] for key in (*KEYS, "metrics")
        ]


def test_counted_positions_train_what_a_plain_loop_trains(tmp_path: Path) -> None:
    run = segments("backprop", optimizer={"name": "sgd", "lr": 0.1}, epochs=1)
    result = train_in_threads(run, tmp_path, stages=3)
    samples = load_data(run.dataset.name, {}, run.folder, task=run.task).train
    stack = load_model(run.model.name, {}, run.folder, samples.shape, samples.classes)
    layers = stack.build(range(5), run.settings.seed, torch.float64)
    net = torch.nn.Sequential(*layers.values())
    optimizer, losses, counts = torch.optim.SGD(net.parameters(), lr=0.1), [], []
    weight, order = torch.tensor(WEIGHT, dtype=torch.float64), epoch_order(50, 3, 0)
    for start in range(0, 50, 16):
        batch = order[start : start + 16]
        targets = samples.targets(batch)
        scores = net(samples.inputs(batch))
        optimizer.zero_grad()
        loss = cross_entropy(scores, targets, weight, ignore_index=task_data.IGNORED)
        loss.backward()
        optimizer.step()
        counted = targets != task_data.IGNORED
        counts.append(float(weight[targets[counted]].sum()))
        losses.append(float(loss.detach()) * counts[-1])
    assert result["train_loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-12)
    for name, tensor in model(tmp_path).items():
        layer, parameter = name.split(".")
        expected = dict(layers[layer].named_parameters())[parameter].detach()
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-14)


NUMBERS = ("cafo", "deep-supervision", "dfa", "dni", "f3", "infopro", "local-head", "man")


@pytest.mark.parametrize("objective", [*NUMBERS, "mono-forward", "pepita"])
def test_real_numbers_are_learnt_by_every_objective_that_serves_them(
    objective: str, tmp_path: Path
) -> None:
    """The loss falls; replicas and micro-batches train the same model; stages the same bits."""
    changes: dict[str, Any] = {"objective": {"name": objective}, "epochs": 3}
    if objective in ("dfa", "pepita"):
        changes["schedule__name"] = "drained"
    if objective in ("infopro", "man"):
        changes["objective"]["norm"] = "none"
    run = task_run("numbers", None, {"loss": "mse"}, **changes)
    one = train_in_threads(run, tmp_path / "one")
    train_in_threads(run, tmp_path / "two", stages=2)
    train_in_threads(run, tmp_path / "many", stages=1, replicas=3)
    assert_same_model(tmp_path / "one", tmp_path / "two")
    assert_close_model(tmp_path / "one", tmp_path / "many", 1e-9 if objective == "cafo" else 1e-11)
    first = train_in_threads(
        task_run("numbers", None, {"loss": "mse"}, **changes | {"epochs": 1}), tmp_path / "first"
    )
    assert one["train_loss"] < first["train_loss"]
    assert one["test_accuracy"] is one["test_accuracy_vote"] is None
    assert one["accuracy_per_block"] == [None] * 3
    assert one["metrics"].keys() == {"mae", "rmse", "r2"}
    assert one["metrics"]["rmse"] ** 2 == pytest.approx(one["test_loss"])


def test_a_regression_explains_four_fifths_of_the_variance(tmp_path: Path) -> None:
    run = tiny.run(
        data__name="tests.task_data:regression",
        model__widths=[32, 32],
        partition__blocks=2,
        objective__name="backprop",
        task={"loss": "mse", "metrics": ["r2"]},
        epochs=60,
        batch_size=32,
        micro_batches=2,
        optimizer__lr=1e-3,
        dtype="float32",
        evaluate__every=60,
    )
    assert train_in_threads(run, tmp_path, stages=2)["metrics"]["r2"] >= 0.8


CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "probabilities": ("probabilities", None, {}),
    "yes or no": ("yes_or_no", None, {"loss": "bce-with-logits"}),
    "classes last": ("tokens", "token_net", {"classes-last": True, "metrics": ["perplexity"]}),
    "one number": ("flat_numbers", "number_net", {"loss": "huber", "delta": 0.5}),
    "a function": ("numbers", None, {"loss": "tests.task_data:quartic", "metrics": ["mae"]}),
    "weighted labels": ("labels", None, {"weight": [1.0, 3.0, 2.0], "label-smoothing": 0.1}),
}


GAUSSIAN = {"loss": "gaussian-nll", "full": True, "metrics": ["mae", "r2"]}


@pytest.mark.parametrize(
    ("data", "objective"),
    [
        ("numbers", "dfa"),
        ("flat_numbers", "mono-forward"),
        ("pixel_numbers", "backprop"),
        ("pixel_numbers", "local-head"),
    ],
)
def test_a_mean_and_a_variance_are_learnt(data: str, objective: str, tmp_path: Path) -> None:
    """The likelihood rises; metrics are those of the mean; any split trains the same model."""
    net = "gaussian_pixel_net" if data == "pixel_numbers" else None
    changes: dict[str, Any] = {"objective__name": objective, "evaluate__every": 4}
    if objective == "dfa":
        changes["schedule__name"] = "drained"
    run = task_run(data, net, GAUSSIAN, epochs=4, **changes)
    result = train_in_threads(run, tmp_path / "run", stages=3)
    train_in_threads(run, tmp_path / "other", stages=1, replicas=2)
    assert_close_model(tmp_path / "run", tmp_path / "other", 1e-10)
    start = train_in_threads(task_run(data, net, GAUSSIAN, epochs=1, **changes), tmp_path / "first")
    assert result["train_loss"] < start["train_loss"]
    evaluated = evaluate_run(tmp_path / "run", Comm(SingleBackend()))
    assert evaluated["loss"] == result["test_loss"]


def test_a_mean_and_a_variance_are_torch_s(tmp_path: Path) -> None:
    run = task_run("numbers", None, GAUSSIAN)
    result = train_in_threads(run, tmp_path)
    splits = load_data(run.dataset.name, {}, run.folder, task=run.task)
    everything = np.arange(splits.test.size)
    with torch.no_grad():
        output = trained_net(run, tmp_path, outputs=4)(splits.test.inputs(everything))
    target = splits.test.targets(everything)
    mean, variance = output[:, :2], output[:, 2:].exp()
    loss = torch.nn.functional.gaussian_nll_loss(mean, target, variance, full=True)
    assert result["test_loss"] == pytest.approx(float(loss), rel=1e-12)
    assert result["metrics"]["mae"] == pytest.approx(float((mean - target).abs().mean()), rel=1e-12)


def test_a_variance_has_no_closed_form() -> None:
    with refuses(ConfigError, "task.objective-needs-classes"):
        make_plan(
            task_run(
                "numbers", None, GAUSSIAN, objective={"name": "cafo", "head": "least-squares"}
            ),
            1,
        )
    with refuses(ConfigError, "task.shapes-differ"):
        make_plan(task_run("numbers", "column_net", GAUSSIAN), 1)


def trained_net(run: RunConfig, folder: Path, outputs: int) -> torch.nn.Sequential:
    """Return the chain of a run with the weights of its newest checkpoint."""
    stack = load_model(run.model.name, run.model.fields, run.folder, (2, 5), outputs)
    layers = stack.build(range(len(stack.names)), 0, torch.float64)
    for name, tensor in model(folder).items():
        layer, _, parameter = name.partition(".")
        layers[layer].get_parameter(parameter).data = tensor
    return torch.nn.Sequential(*layers.values())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("objective", ["backprop", "mono-forward"])
def test_other_targets_are_learnt(name: str, objective: str, tmp_path: Path) -> None:
    data, net, task = CASES[name]
    changes: dict[str, Any] = {"objective__name": objective, "epochs": 5, "evaluate__every": 5}
    run = task_run(data, net, task, **changes)
    result = train_in_threads(run, tmp_path / "run", stages=3)
    train_in_threads(run, tmp_path / "other", stages=1, replicas=2)
    assert_close_model(tmp_path / "run", tmp_path / "other", 1e-10)
    start = train_in_threads(
        task_run(data, net, task, **changes | {"epochs": 1}), tmp_path / "first"
    )
    assert result["train_loss"] < start["train_loss"]
    evaluated = evaluate_run(tmp_path / "run", Comm(SingleBackend()))
    assert evaluated["metrics"] == result["metrics"]
    assert evaluated["loss"] == result["test_loss"]
    has_accuracy = name in ("probabilities", "yes or no", "classes last", "weighted labels")
    assert (result["test_accuracy"] is not None) == has_accuracy


def test_an_autoencoder_learns_its_input(tmp_path: Path) -> None:
    run = tiny.run(
        task={"loss": "mse", "target": "input", "metrics": ["r2"]},
        model={"name": "tests.task_data:autoencoder"},
        objective__name="backprop",
        epochs=20,
    )
    assert train_in_threads(run, tmp_path, stages=2)["metrics"]["r2"] > 0.2


def test_metrics_may_be_others_at_the_evaluation(tmp_path: Path) -> None:
    result = train_in_threads(tiny.run(task__metrics=["accuracy", "top-2"]), tmp_path)
    assert result["metrics"]["accuracy"] == result["test_accuracy"]
    other = evaluate_run(tmp_path, Comm(SingleBackend()), overrides=['task.metrics=["macro-f1"]'])
    assert other["metrics"].keys() == {"macro-f1"}
    assert other["accuracy"] == result["test_accuracy"]


TORCHMETRICS: dict[str, tuple[str, str | None, dict[str, Any], dict[str, str]]] = {
    "classes": (
        "labels",
        None,
        {"weight": [1.0, 3.0, 2.0]},
        {
            "multiclass-accuracy": "MulticlassAccuracy",
            "f1-score": "MulticlassF1Score",
            "cohen-kappa": "MulticlassCohenKappa",
        },
    ),
    "pixels": (
        "segments",
        "pixel_net",
        {"ignore-index": task_data.IGNORED},
        {"jaccard-index": "MulticlassJaccardIndex"},
    ),
    "numbers": (
        "numbers",
        None,
        {"loss": "mse"},
        {
            "mean-absolute-error": "MeanAbsoluteError",
            "r2-score": "R2Score",
            "explained-variance": "ExplainedVariance",
        },
    ),
    "decisions": (
        "yes_or_no",
        None,
        {"loss": "bce-with-logits"},
        {"multilabel-f1-score": "MultilabelF1Score"},
    ),
}
"""Data, net, task, and metrics with their classes."""


@pytest.fixture
def real_torchmetrics() -> None:
    """torchmetrics as it is installed; it imports torchvision, where that is installed."""
    if importlib.util.find_spec("torchmetrics") is None:
        lack("public-models", "torchmetrics is not installed")
    with suppress(ImportError):
        import_torchvision()


@pytest.mark.usefixtures("real_torchmetrics")
@pytest.mark.parametrize("case", TORCHMETRICS)
def test_metrics_of_torchmetrics_are_those_of_all_samples_at_once(
    case: str, tmp_path: Path
) -> None:
    data, net, task, kinds = TORCHMETRICS[case]
    run = task_run(data, net, task | {"metrics": list(kinds)})
    found = [
        train_in_threads(run, tmp_path / str(stages), stages=stages)["metrics"] for stages in (1, 3)
    ]
    assert found[0] == found[1]
    splits = load_data(run.dataset.name, {}, run.folder, task=run.task)
    net_of_3 = trained_net(run, tmp_path / "3", splits.train.classes)
    everything = np.arange(splits.test.size)
    with torch.no_grad():
        output = net_of_3(splits.test.inputs(everything))
    targets = splits.test.targets(everything)
    for name, kind in kinds.items():
        expected = torchmetric(kind, splits.train.classes, task)(output, targets)
        assert found[0][name] == pytest.approx(float(expected), rel=1e-5), name


def torchmetric(kind: str, classes: int, task: dict[str, Any]) -> Any:
    """Return a metric of torchmetrics."""
    import torchmetrics.classification

    if not hasattr(torchmetrics.classification, kind):
        return getattr(torchmetrics, kind)()
    count = {"num_labels" if kind.startswith("Multilabel") else "num_classes": classes}
    ignored = {"ignore_index": task.get("ignore-index")}
    return getattr(torchmetrics.classification, kind)(**count, **ignored)


@pytest.mark.usefixtures("real_torchmetrics")
def test_a_metric_of_torchmetrics_that_needs_arguments_is_refused() -> None:
    with refuses(ConfigError, "task.metric-needs-arguments"):
        tiny.run(task={"metrics": ["fbeta-score"]})
    with refuses(ConfigError, "task.metric-not-a-sum"):
        tiny.run(task={"metrics": ["auroc"]})


def test_a_resumed_run_may_measure_something_else(tmp_path: Path) -> None:
    train_in_threads(tiny.run(epochs=1), tmp_path / "one")
    resumed = train_in_threads(tiny.run(task__metrics=["iou"]), tmp_path / "one")
    whole = train_in_threads(tiny.run(), tmp_path / "whole")
    assert resumed["metrics"].keys() == {"iou"}
    assert [resumed[key] for key in ("digest", *KEYS)] == [whole[key] for key in ("digest", *KEYS)]
    with refuses(ConfigError, "resume.settings-changed"):
        train_in_threads(tiny.run(task__label_smoothing=0.1), tmp_path / "one")


@pytest.mark.parametrize("objective", ["backprop", "mono-forward"])
def test_the_planned_memory_of_positions_is_the_counted_memory(
    objective: str, tmp_path: Path
) -> None:
    run = segments(objective, micro_batches=1)
    counted = train_in_threads(run, tmp_path)["peak_memory_bytes"]
    planned = [memory.peak for memory in MemoryPlan(make_plan(run, 1)).rank_memory()]
    assert planned == pytest.approx(counted, rel=0.1)
