"""Model and data of a resumed run are those of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from torch import Tensor, nn
from torch.nn import functional

from dtrain.checkpoint.same_run import check_same_run
from dtrain.checkpoint.saved_fingerprint import STRUCTURE, check_same_model, check_saved_data
from dtrain.comm.backends.threads import run_ranks
from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.evaluation import evaluate_run
from tests import user_nets
from tests.harness import train_in_threads
from tests.refusals import refuses
from tests.single import one_thread  # noqa: F401

STATE: dict[str, Any] = {"width": 12, "noise": 0.0, "rows": 96, "label": 0, "slope": 0.1}
"""What `net` and `samples` depend on, as the code of a user may change between two starts."""


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STATE.items():
        monkeypatch.setitem(STATE, name, value)


def net(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    width = STATE["width"]
    layers = [nn.Linear(shape[0], width), nn.LeakyReLU(STATE["slope"]), nn.Linear(width, classes)]
    return nn.Sequential(*layers, *([nn.Linear(classes, classes)] if width == 8 else []))


def samples() -> user_nets.Arrays:
    x, y, x_test, y_test = user_nets.blobs()
    y = y.copy()
    y[0] = (y[0] + STATE["label"]) % 4
    return x[: STATE["rows"]] + STATE["noise"], y[: STATE["rows"]], x_test, y_test


def run(epochs: int) -> RunConfig:
    """Return a run of these two functions."""
    tables = {"model": {"name": f"{__name__}:net"}, "data": {"name": f"{__name__}:samples"}}
    return user_nets.run("", epochs=epochs, **tables)


CHANGES = [
    ("width", 13, "resume.model-changed"),
    ("width", 8, "resume.model-changed"),
    ("slope", 0.2, "resume.model-changed"),
    ("noise", 0.1, "resume.data-changed"),
    ("rows", 95, "resume.data-changed"),
    ("label", 1, "resume.data-changed"),
]


@pytest.mark.parametrize(("name", "value", "key"), CHANGES)
@pytest.mark.parametrize("stages", [1, 2])
def test_a_change_is_refused(
    name: str, value: float, key: str, stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_threads(run(1), tmp_path, stages=stages)
    monkeypatch.setitem(STATE, name, value)
    with refuses(ConfigError, key):
        train_in_threads(run(2), tmp_path, stages=stages)
    monkeypatch.undo()
    assert train_in_threads(run(2), tmp_path, stages=stages)["epochs"] == 2


def branched(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Branched(shape[0], classes)


class Branched(nn.Module):
    """A net whose `forward` itself calls the activation."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + functional.leaky_relu(self.first(x), STATE["slope"]))


def test_a_changed_operation_between_layers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = {"name": f"{__name__}:branched"}
    train_in_threads(user_nets.run("", epochs=1, model=traced), tmp_path)
    monkeypatch.setitem(STATE, "slope", 0.2)
    with refuses(ConfigError, "resume.model-changed"):
        train_in_threads(user_nets.run("", epochs=2, model=traced), tmp_path)


def test_structure_is_compared_within_one_version() -> None:
    """Checkpoints of before have no structure, and other versions may word it differently."""
    tensors = {"0.weight": "(2,)"}
    old = {STRUCTURE: "torch 1", STRUCTURE + "0": "A()"} | tensors
    check_same_model({"model": tensors}, old)
    check_same_model({"model": old}, old | {STRUCTURE: "torch 2", STRUCTURE + "0": "A(1)"})
    for change in ({STRUCTURE + "0": "A(1)"}, {STRUCTURE: "torch 2", "0.weight": "(3,)"}):
        with refuses(ConfigError, "resume.model-changed"):
            check_same_model({"model": old}, old | change)


def test_rounding_of_inputs_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine may compute the same inputs with other last bits."""
    train_in_threads(run(1), tmp_path)
    monkeypatch.setitem(STATE, "noise", 1e-12)
    assert train_in_threads(run(2), tmp_path)["epochs"] == 2


def test_an_evaluation_standardises_by_the_statistics_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other training data have another mean; the test split is the same."""
    summary = train_in_threads(run(2), tmp_path)
    (tmp_path / "run.toml").write_text(run(2).to_text())
    monkeypatch.setitem(STATE, "noise", 5.0)
    result = run_ranks(1, lambda comm: evaluate_run(tmp_path, comm))[0]
    assert result["loss"] == summary["test_loss"]


def test_inputs_with_a_nan_are_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that failed on them is resumed from its checkpoint before, not refused for its data."""
    numbers = [float("nan"), 1.0]
    check_saved_data({"data": {"inputs": numbers}}, {"inputs": list(np.array(numbers))})


# Data at another path


def write_files(folder: Path, scale: float = 1.0, label: int = 0) -> dict[str, str]:
    """Write three splits; return their keys of [data]."""
    folder.mkdir()
    x, y, x_test, y_test = user_nets.blobs()
    y = np.where(np.arange(len(y)) == 0, (y[0] + label) % 4, y)
    contents = {"train": (x, y), "test": (x_test * scale, y_test), "validation": (x[:20], y[:20])}
    for split, (inputs, labels) in contents.items():
        with h5py.File(folder / f"{split}.h5", "w") as file:
            file["x"], file["y"] = inputs, labels
    return {split: str(folder / f"{split}.h5") for split in contents}


def stored(files: dict[str, str], epochs: int) -> RunConfig:
    """Return a run on files."""
    data = {"name": "hdf5"} | files
    return user_nets.run("", epochs=epochs, model={"name": f"{__name__}:net"}, data=data)


@pytest.mark.parametrize("stages", [1, 2])
def test_the_same_data_at_another_path_go_on(stages: int, tmp_path: Path) -> None:
    """Every path of [data]; the bits are those of a run that was not moved."""
    here, there = write_files(tmp_path / "a"), write_files(tmp_path / "b")
    train_in_threads(stored(here, 1), tmp_path / "out", stages=stages)
    moved = train_in_threads(stored(there, 2), tmp_path / "out", stages=stages)
    stayed = train_in_threads(stored(here, 2), tmp_path / "whole", stages=stages)
    assert moved["digest"] == stayed["digest"]
    text = (tmp_path / "out" / "run.toml").read_text()
    assert all(path in text for path in there.values())


@pytest.mark.parametrize("change", [{"scale": 1.1}, {"label": 1}])
def test_other_data_at_another_path_are_refused_with_the_path(
    change: dict[str, Any], tmp_path: Path
) -> None:
    here, there = write_files(tmp_path / "a"), write_files(tmp_path / "b", **change)
    train_in_threads(stored(here, 1), tmp_path / "out")
    with refuses(ConfigError, "resume.data-changed") as caught:
        train_in_threads(stored(there, 2), tmp_path / "out")
    assert all(text in caught.value.message for text in ("data.train", here["train"]))


def rooted(root: str, kind: str = "plain", others: float = 0.0) -> Any:
    """Return samples that a function of a user reads from a folder."""
    x, y, x_test, y_test = user_nets.blobs()
    shift = float((Path(root) / "shift.txt").read_text())
    return x + shift, y, x_test, y_test


def test_a_path_of_a_function_may_differ_and_other_texts_may_not(tmp_path: Path) -> None:
    for name, shift in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shift.txt").write_text(str(shift))

    def started(epochs: int, **keys: Any) -> Any:
        data = {"name": f"{__name__}:rooted"} | keys
        run = user_nets.run("", epochs=epochs, model={"name": f"{__name__}:net"}, data=data)
        return train_in_threads(run, tmp_path / "out")

    started(1, root=str(tmp_path / "a"))
    with refuses(ConfigError, "resume.data-changed"):
        started(2, root=str(tmp_path / "c"))
    for keys in ({"kind": "other"}, {"others": 1.0}, {"normalise": False}):
        with refuses(ConfigError, "resume.settings-changed"):
            started(2, root=str(tmp_path / "b"), **keys)
    assert started(2, root=str(tmp_path / "b"))["epochs"] == 2


def test_a_checkpoint_without_a_description_of_its_data_needs_its_paths(tmp_path: Path) -> None:
    """An earlier version has written it."""
    files = {"train": "a/train.h5", "test": "a/test.h5"}
    saved, moved = stored(files, 1).to_table(), stored(files | {"test": "b/test.h5"}, 1)
    check_same_run(tmp_path, saved, moved, data_paths_may_differ=True)
    parts = stored({"train": ["a", "b"], "test": "c"}, 1)  # type: ignore[dict-item]
    check_same_run(tmp_path, saved, parts, data_paths_may_differ=True)
    with refuses(ConfigError, "resume.settings-changed"):
        check_same_run(tmp_path, saved, moved)


def with_mask() -> Any:
    """Return samples of two inputs, the second of which may change between two starts."""
    x, y, x_test, y_test = samples()
    return (x, np.full(len(x), STATE["slope"])), y, (x_test, np.full(len(x_test), 1.0)), y_test


class Masked(nn.Module):
    """A net of two inputs."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(functional.relu(self.first(x)) * mask[:, None])


def masked(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a net of two inputs."""
    return Masked(shape[0], classes)


def test_changed_further_inputs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of an earlier version does not know them."""
    tables = {"model": {"name": f"{__name__}:masked"}, "data": {"name": f"{__name__}:with_mask"}}
    train_in_threads(user_nets.run("", epochs=1, **tables), tmp_path)
    monkeypatch.setitem(STATE, "slope", 0.2)
    with refuses(ConfigError, "resume.data-changed"):
        train_in_threads(user_nets.run("", epochs=2, **tables), tmp_path)
    check_saved_data({"data": {"inputs": [1.0]}}, {"inputs": [1.0], "further inputs": [1.0]})
