"""Laws of samplers, sample weights and users' augmentations over whole tiny runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

import dtrain
from dtrain.checkpoint.saved_fingerprint import source_hashes
from dtrain.config.run import RunConfig
from dtrain.data.dataset import Dataset, DatasetSplits
from dtrain.errors import ConfigError, DataError
from dtrain.objectives import OBJECTIVES
from dtrain.planning.plan import make_plan
from dtrain.schedules import SCHEDULES
from tests import task_data, tiny
from tests.harness import assert_close_model, assert_same_model, train_in_threads
from tests.refusals import refuses

ARRAYS = tiny.samples()
WEIGHTS = np.random.default_rng(5).integers(0, 4, 50).astype(np.float64)
WEIGHTED = (
    *("backprop", "local-head", "mono-forward", "deep-supervision", "lls", "dfa", "cafo"),
    *("pfa", "forward-gnn"),
)
NOISY = ("diffusion-blocks", "forward-gradient", "ulr")
"""Objectives that take weights, but whose repeated samples have noise of their own."""


def noise(sample: Tensor, index: int, epoch: int, generator: Generator) -> Tensor:
    """Add noise that depends on everything."""
    scale = 0.1 * (1 + index % 3 + epoch)
    return sample + scale * torch.randn(sample.shape, generator=generator, dtype=sample.dtype)


def unseeded(sample: Tensor, index: int, epoch: int, generator: Generator) -> Tensor:
    return sample + 0.1 * torch.randn_like(sample)


def rare(targets: np.ndarray) -> np.ndarray:
    """Draw the first class four times as often as the others."""
    return np.where(targets == 0, 4.0, 1.0)


OPTIONS: dict[str, dict[str, Any]] = {
    "balanced": {"data__sampler": "balanced"},
    "function": {"data__sampler": f"{__name__}:rare"},
    "weights": {"data__sampler": WEIGHTS + 0.5, "data__shuffle": "chunks"},
    "held out": {"data__sampler": WEIGHTS + 0.5, "data__validation": 0.2},
    "augment": {"data__augment": f"{__name__}:noise", "data__validation": 0.2},
    "all": {"data__augment": noise, "data__sampler": rare, "data__name": "weighted"},
}


def option_run(option: str, **changes: Any) -> RunConfig:
    changes = {"objective__name": "backprop"} | OPTIONS[option] | changes
    if changes.get("data__name") == "weighted":
        return weighted(**changes)
    return tiny.run(**changes)


def weighted(weights: Any = WEIGHTS, arrays: Any = ARRAYS, **changes: Any) -> RunConfig:
    """Return a run whose samples have weights, or whose weights are None."""
    name = dtrain.data.arrays(*arrays, weights=weights)["name"]
    return tiny.run(**{"objective__name": "backprop"} | changes | {"data__name": name})


def drained(objective: str) -> dict[str, Any]:
    """Return the changes of a run for an objective."""
    changes: dict[str, Any] = {"objective": {"name": objective}}
    if objective == "dfa":
        changes["schedule__name"] = "drained"
    if objective == "local-head":
        changes["objective"]["norm"] = "none"
    if objective == "cafo":
        changes["objective"] |= {"head": "ce", "blocks": "trained"}
    return changes


# Laws


@pytest.mark.parametrize("option", OPTIONS)
def test_any_layout_trains_the_same_model(option: str, tmp_path: Path) -> None:
    """Stages: the same bits. Replicas and micro-batches: up to rounding. And it is another model
    than without the option."""
    one = train_in_threads(option_run(option), tmp_path / "one")
    three = train_in_threads(option_run(option, mesh__stages=3), tmp_path / "three", stages=3)
    assert three["digest"] == one["digest"]
    many = train_in_threads(
        option_run(option, mesh__stages=2, micro_batches=1), tmp_path / "many", 2, 2
    )
    assert_close_model(tmp_path / "one", tmp_path / "many", 1e-12)
    assert many["train_loss"] == pytest.approx(one["train_loss"], rel=1e-12)
    plain = train_in_threads(tiny.run(objective__name="backprop"), tmp_path / "plain")
    assert plain["digest"] != one["digest"]


@pytest.mark.parametrize("option", ["held out", "all"])
def test_a_resumed_run_is_the_uninterrupted_one(option: str, tmp_path: Path) -> None:
    whole = train_in_threads(option_run(option, epochs=3), tmp_path / "whole")
    train_in_threads(option_run(option, epochs=1), tmp_path / "parts")
    resumed = train_in_threads(option_run(option, epochs=3), tmp_path / "parts", stages=2)
    assert resumed["digest"] == whole["digest"]
    with refuses(ConfigError, "resume.settings-changed"):
        train_in_threads(option_run(option, epochs=4, data__sampler="uniform"), tmp_path / "parts")


def test_the_modules_of_sampler_and_augmentation_are_hashed() -> None:
    run = tiny.run(data__sampler=f"{__name__}:rare", data__augment=noise)
    names = {f"[data] {__name__}:rare", f"[data] {__name__}:noise"}
    assert names <= source_hashes(run).keys()


def test_other_weights_are_refused_on_resume(tmp_path: Path) -> None:
    train_in_threads(weighted(epochs=1), tmp_path)
    with refuses(ConfigError, "resume.data-changed"):
        train_in_threads(weighted(WEIGHTS[::-1], epochs=2), tmp_path)


@pytest.mark.parametrize("objective", [*WEIGHTED, *NOISY])
def test_equal_weights_change_nothing(objective: str, tmp_path: Path) -> None:
    changes = drained(objective)
    plain = train_in_threads(weighted(None, **changes), tmp_path / "plain", stages=3)
    equal = train_in_threads(weighted(np.full(50, 0.3), **changes), tmp_path / "equal", stages=3)
    assert_close_model(tmp_path / "plain", tmp_path / "equal", 1e-12)
    for key in ("train_loss", "test_loss", "test_accuracy"):
        assert equal[key] == pytest.approx(plain[key], rel=1e-12)


@pytest.mark.parametrize("objective", WEIGHTED)
def test_whole_weights_are_repeated_samples(objective: str, tmp_path: Path) -> None:
    """In full batches, also where replicas have other sums of weights."""
    x, y, x_test, y_test = ARRAYS
    repeats = WEIGHTS.astype(int)
    repeated = np.repeat(x, repeats, 0), np.repeat(y, repeats), x_test, y_test
    changes = drained(objective) | {"epochs": 4, "data__normalise": False}
    changes |= {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}
    train_in_threads(weighted(**changes, batch_size=50, mesh__stages=1), tmp_path / "weights", 1, 3)
    train_in_threads(
        weighted(None, repeated, **changes, batch_size=len(repeated[0])), tmp_path / "repeats"
    )
    assert_close_model(tmp_path / "weights", tmp_path / "repeats", 1e-12)


@pytest.mark.parametrize(
    ("data", "net", "task"),
    [
        ("segments", "pixel_net", {"weight": [0.5, 2.0, 1.0], "ignore-index": task_data.IGNORED}),
        ("numbers", None, {"loss": "tests.task_data:quartic"}),
        ("probabilities", None, {}),
        ("yes_or_no", None, {"loss": "bce-with-logits"}),
        ("probabilities", None, {"loss": "kl-div"}),
        ("flat_numbers", "number_net", {"loss": "huber"}),
        ("tokens", "token_net", {"classes-last": True}),
    ],
)
def test_weights_of_every_kind_of_loss_are_repetitions(
    data: str, net: str | None, task: dict[str, Any], tmp_path: Path
) -> None:
    x, y, x_test, y_test = getattr(task_data, data)()
    repeats = WEIGHTS.astype(int)
    repeated = np.repeat(x, repeats, 0), np.repeat(y, repeats, 0), x_test, y_test
    changes: dict[str, Any] = {"task": task, "data__normalise": False, "epochs": 3}
    changes |= {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}
    if net is not None:
        changes |= {"model": {"name": f"tests.task_data:{net}"}, "partition": {"cuts": [2, 4]}}
    arrays = x, y, x_test, y_test
    train_in_threads(weighted(WEIGHTS, arrays, **changes, batch_size=50), tmp_path / "weights")
    train_in_threads(
        weighted(None, repeated, **changes, batch_size=len(repeated[0])), tmp_path / "repeats"
    )
    assert_close_model(tmp_path / "weights", tmp_path / "repeats", 1e-11)


def test_weights_of_zero_train_nothing(tmp_path: Path) -> None:
    """An update of such samples alone has no gradient; other samples do not feel them."""
    first = np.where(np.arange(50) < 2, 1.0, 0.0)
    result = train_in_threads(weighted(first, batch_size=4, micro_batches=2), tmp_path, 1, 2)
    assert np.isfinite(result["train_loss"])


@pytest.mark.parametrize("objective", [*tiny.PATTERNS, "cafo"])
def test_repeated_draws_train_the_same_model_in_any_split(objective: str, tmp_path: Path) -> None:
    """A sample may be in several replicas and micro-batches at once."""
    late = SCHEDULES[OBJECTIVES[objective]().default_schedule].asynchronous
    changes: dict[str, Any] = {"micro_batches": 1} if late else {}
    changes |= {"objective__name": objective, "data__sampler": WEIGHTS**3, "epochs": 1}
    run = tiny.run(**changes, mesh__stages=2)
    train_in_threads(run, tmp_path / "one", stages=2)
    train_in_threads(run, tmp_path / "many", stages=2, replicas=3)
    assert_close_model(tmp_path / "one", tmp_path / "many", 1e-9 if objective == "cafo" else 1e-12)


def test_a_run_in_python_takes_objects_and_its_text_names_them(tmp_path: Path) -> None:
    """A function by its name; weights by name and fingerprint, so that others are another run."""
    data = {"name": tiny.samples, "sampler": WEIGHTS + 1, "augment": noise, "normalise": False}
    keys: dict[str, Any] = {"model": tiny.TABLE["model"], "epochs": 1}
    keys["optimizer"] = dtrain.Optimizer("sgd")
    run = dtrain.Run(data=data, **keys)
    again = dtrain.Run.from_config(run.config)
    assert again.to_toml() == run.to_toml()
    assert np.array_equal(
        make_plan(again.config, 1).epoch_order(3), make_plan(run.config, 1).epoch_order(3)
    )
    for other in (WEIGHTS + 2, (WEIGHTS + 1).tolist(), torch.from_numpy(WEIGHTS)):
        changed = dtrain.Run(data=data | {"sampler": other}, **keys)
        assert changed.to_toml() != run.to_toml()
    as_list = dtrain.Run(data=data | {"sampler": (WEIGHTS + 1).tolist()}, **keys)
    assert np.array_equal(
        make_plan(as_list.config, 1).epoch_order(3), make_plan(run.config, 1).epoch_order(3)
    )


# Refusals


def other_on_each_call(targets: np.ndarray) -> np.ndarray:
    return np.random.default_rng().random(len(targets))


def test_a_sampler_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    with refuses(DataError, "data.ranks-differ"):
        train_in_threads(tiny.run(data__sampler=other_on_each_call), tmp_path, stages=2)
    assert not list(tmp_path.iterdir())


def test_every_other_objective_refuses_weights() -> None:
    for name in sorted(set(OBJECTIVES) - {*WEIGHTED, *NOISY, "lls-m", "lls-mxm"} | {"cafo"}):
        with refuses(ConfigError, "data.weights-objective"):
            make_plan(weighted(objective={"name": name}), 1)


def test_an_augmentation_with_global_random_numbers_is_refused(tmp_path: Path) -> None:
    with refuses(ConfigError, "data.augment-not-repeatable"):
        train_in_threads(tiny.run(data__augment=unseeded), tmp_path, stages=2)
    assert not list(tmp_path.iterdir())


class Drifting(Dataset):
    """Samples or targets that differ when they are read again, or with others.

    Parameters
    ----------
    drift : str
        "inputs", "targets", "order" (an input depends on its place in the read) or "nothing".
    """

    def __init__(self, size: int, drift: str) -> None:
        self.size, self.shape, self.classes = size, (10,), 3
        self.drift, self.reads = drift, 0

    def inputs(self, indices: Any) -> Tensor:
        self.reads += self.drift == "inputs"
        indices = np.asarray(indices)
        x = torch.from_numpy(np.sin(np.outer(indices + 1, np.arange(10)) + self.reads))
        if self.drift == "order":
            x[1:] += 1e-3
        return x

    def targets(self, indices: Any) -> Tensor:
        self.reads += self.drift == "targets"
        drift = self.reads if self.drift == "targets" else 0
        return torch.from_numpy((np.asarray(indices) + drift) % 3)


def drifting(drift: str = "nothing", split: str = "train") -> DatasetSplits:
    return DatasetSplits(
        Drifting(50, drift if split == "train" else "nothing"),
        Drifting(17, drift if split == "test" else "nothing"),
    )


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("drift", ["inputs", "targets", "order"])
def test_a_source_that_is_no_function_of_the_index_is_refused(
    drift: str, split: str, tmp_path: Path
) -> None:
    run = tiny.run(data__name=drifting, data__drift=drift, data__split=split)
    with refuses(DataError, "data.not-repeatable") as caught:
        train_in_threads(run, tmp_path, stages=2)
    assert split in caught.value.message
    assert not list(tmp_path.iterdir())


class Jittered(torch.utils.data.Dataset):
    """A Dataset of torch with a random transform."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(4), index % 3


def test_a_dataset_of_torch_with_random_transforms_is_refused(tmp_path: Path) -> None:
    run = tiny.run(data={"name": (Jittered(), Jittered())}, mesh__stages=2)
    with refuses(DataError, "data.not-repeatable"):
        train_in_threads(run, tmp_path, stages=2)


def test_a_source_that_is_one_is_not_refused(tmp_path: Path) -> None:
    run = tiny.run(data__name=drifting, epochs=1)
    one = train_in_threads(run, tmp_path / "one")
    two = train_in_threads(run, tmp_path / "two", stages=2)
    assert_same_model(tmp_path / "one", tmp_path / "two")
    assert one["digest"] == two["digest"]
