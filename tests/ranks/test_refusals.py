"""Mistakes in run files, data, models, meshes, environment and user code, in one table.

All ranks refuse together, with one message and its key, before anything is written: the checkpoint
of an earlier run stays as it is. `tests/system/test_refusals.py` has a sample with real processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtrain.checkpoint.resume import find_checkpoint
from dtrain.cli import main
from dtrain.comm.agree import all_or_none
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import CheckpointError, ConfigError, DataError, DtrainError
from dtrain.schema import dump_toml
from dtrain.training import train
from tests import tiny
from tests.conftest import ROOT
from tests.harness import train_in_threads

RANKS = 3
UNKNOWN, TYPE, SMALL = "run-file.unknown-key", "run-file.wrong-type", "run-file.number-too-small"

Changes = dict[str, Any]
"""Of the tiny run."""


class Case(NamedTuple):
    """A mistake: changes of the tiny run, the key of its error, and words of the message."""

    changes: Changes
    key: str
    words: tuple[str, ...] = ()


def case(key: str, *words: str, **changes: Any) -> Case:
    """Return a case."""
    return Case(changes, key, words)


# ---- run files

RUN_FILE = [
    case(UNKNOWN, "'batch-size'", batchsize=3),
    case(UNKNOWN, "'depth'", objective__depth=3),
    case(UNKNOWN, "'every'", "[sync]", sync__every=3),
    case(UNKNOWN, "'momentun'", optimizer__momentun=0.9),
    case(UNKNOWN, "'final'", lr__final=0.1),
    case(UNKNOWN, "'metric'", stop__metrics="loss"),
    case(UNKNOWN, "'shuffle'", data__shufle="full"),
    case(UNKNOWN, sync={"name": "int8", "inner": {"evry": 1}}),
    case(UNKNOWN, "'non-finite'", numerics={"nonfinite": "stop"}),
    case(SMALL, "batch-size", batch_size=0),
    case(SMALL, micro_batches=0),
    case(SMALL, threads=0),
    case(SMALL, mesh__stages=0),
    case(SMALL, checkpoint__keep=0),
    case(SMALL, evaluate__every=0),
    case(SMALL, evaluate__every_updates=-1),
    case(SMALL, stop__patience=0),
    case(SMALL, stop__min_delta=-0.1),
    case(SMALL, ema__start=-1),
    case(SMALL, numerics={"max-skipped": 0}),
    case(SMALL, numerics={"check-replicas": -1}),
    case(TYPE, batch_size="many"),
    case(TYPE, batch_size=True),
    case(TYPE, dtype="float16"),
    case(TYPE, device="gpu"),
    case(TYPE, data__shuffle="some"),
    case(TYPE, data__validation=True),
    case(TYPE, mesh__placement="node"),
    case(TYPE, partition__balance="flop"),
    case(TYPE, partition__cuts=[1, 2.5]),
    case(TYPE, log__every_s="often"),
    case(TYPE, numerics={"non-finite": "ignore"}),
    case(TYPE, optimizer={"name": "sgd", "clip": 1, "clip-over": "all"}),
    case(TYPE, sync={"name": "warmup", "inner": "daso"}),
    case("run-file.length", updates=5),
    case("run-file.length", epochs=None),
    case("run-file.no-table", model="mlp"),
    case("run-file.no-table", lr="cosine"),
    case("run-file.name-missing", model={}),
    case("run-file.underscore", "weight-decay", optimizer={"name": "sgd", "weight_decay": 0.1}),
    case("run-file.quoted-number", optimizer__clip="1"),
    case("run-file.seed-too-large", seed=2**64),
    case("timeouts.out-of-range", timeouts={"update": -1}),
    case("out.unknown-key", out="{sead}"),
    case("out.malformed", out="{seed"),
]

# ---- strategies

STRATEGIES = [
    case("objective.unknown", "mono-forward", objective__name="mono_forward"),
    case("schedule.unknown", "1f1b", schedule__name="1fb1"),
    case("sync.unknown", "never", sync__name="always"),
    case("sync.unknown", sync={"name": "int8", "inner": {"name": "x"}}),
    case("optimizer.unknown", "'sgd'", optimizer__name="sdg"),
    case("lr.unknown", "cosine", lr__name="cosin"),
    case("data.unknown", "digits", data__name="digit"),
    case("model.unknown", "mlp", model__name="mpl"),
    case("sampler.unknown", data__sampler="balanced2"),
    case("augment.unknown", data__augment="flip"),
    case("log.unknown-tracker", log__trackers=["wandbb"]),
    case("checkpoint.unknown-signal", checkpoint__signals=["KILL"]),
    case("optimizer.rejected", "-1.0", optimizer={"name": "sgd", "lr": -1.0}),
    case("optimizer.rejected", optimizer__betas=[0.9]),
    case("optimizer.clip-out-of-range", optimizer__clip=-1.0),
    case("optimizer.clip-out-of-range", optimizer__clip=float("nan")),
    case("optimizer.clip-out-of-range", optimizer__clip=float("inf")),
    case("optimizer.clip-over-without-clip", optimizer__clip_over="model"),
    case("optimizer.scale-from-negative", optimizer={"name": "sgd", "scale-from": -1}),
    case("optimizer.scale-from-needs-momentum", optimizer={"name": "sgd", "scale-from": 8}),
    case("lr.too-small", lr__warmup_updates=-1),
    case("lr.no-fraction", lr={"name": "cosine", "final": 1.5}),
    case("lr.step-epochs", lr={"name": "step"}),
    case("lr.step-epochs", lr={"name": "step", "every-epochs": 2, "epochs": [3]}),
    case("lr.too-small", lr={"name": "step", "epochs": [0]}),
    case("lr.too-small", lr={"name": "step", "every-epochs": -1}),
    case("lr.no-fraction", lr={"name": "step", "every-epochs": 1, "gamma": -0.1}),
    case("sync.too-small", sync={"name": "local-sgd", "every": 0}),
    case("sync.too-small", sync={"name": "local-sgd", "warmup-updates": -1}),
    case("schedule.route-unsupported", "1f1b", objective__name="backprop", schedule__name="stream"),
    case("schedule.micro-batches-not-one", objective__name="backprop", schedule__name="pipelined"),
    case("evaluate.two-intervals", evaluate={"every": 1, "every-updates": 5}),
    case("ema.decay-out-of-range", ema__decay=1.0),
    case("ema.sync", ema__decay=0.9, sync__name="never"),
    case("metric.unknown", "accuracy", stop__metric="acuracy"),
    case("task.unknown-loss", task={"loss": "crossentropy"}),
    case("task.unknown-metric", task={"metrics": ["acc"]}),
    case("user-code.no-function", lr__name="tests.tiny:samples2"),
    case("user-code.no-function", "'absent'", objective__name=f"{__name__}:absent"),
    case("user-code.no-module", "'nowhere'", objective__name="nowhere:Focal"),
    case("user-code.no-module", "'nowhere'", model={"name": "nowhere:net"}),
    case("user-code.malformed-name", objective__name="Focal:"),
    case("user-code.no-strategy", sync__name=f"{__name__}:Narrow"),
    case("user-code.no-strategy", schedule__name=f"{__name__}:number"),
]

# ---- partition and mesh

PARTITION = [
    case("partition.cuts-exclude-blocks", partition__cuts=[1]),
    case("partition.cuts-exclude-balance", partition={"cuts": [1], "balance": "flops"}),
    case("partition.unknown-layer", "fc9", "fc1", "head", partition={"cuts": ["fc2", "fc9"]}),
    case("partition.cut-out-of-range", partition={"cuts": [1, 99]}),
    case("partition.cuts-not-ascending", partition={"cuts": [3, 2]}),
    case("partition.fewer-blocks-than-stages", "blocks", partition__blocks=2),
    case("partition.blocks-out-of-range", "blocks", partition__blocks=9),
    case("partition.weights-count", partition__weights=[1, 2]),
    case("partition.weight-not-positive", partition__weights=[1, 2, 0]),
    case("partition.unknown-block", partition__frozen=[7]),
    case("partition.places-count", partition__places=[0, 1, 2, 2]),
    case("partition.stage-without-block", partition__places=[0, 0, 2]),
    case("mesh.ranks-indivisible", "stages", mesh__stages=2),
    case("model.mlp-widths", "widths", model__widths=[16, 0]),
]

# ---- models of users


class Narrow(nn.Sequential):
    """A net whose layers do not fit."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(10, 16), nn.Linear(8, 3), nn.Linear(3, 3))


def number() -> int:
    """Return no model."""
    return 3


def empty() -> nn.Sequential:
    """Return a net without layers."""
    return nn.Sequential()


def shared_layer() -> nn.Sequential:
    """Return a chain that holds a layer twice, in two blocks."""
    one = nn.Linear(10, 10)
    return nn.Sequential(nn.Flatten(), one, nn.ReLU(), one, nn.Linear(10, 3))


def few_outputs() -> nn.Sequential:
    """Return a net with fewer outputs than classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))


def wants_width(width: int) -> nn.Sequential:
    """Return a net that needs a key of [model]."""
    return nn.Sequential(nn.Flatten(), nn.Linear(10, width), nn.ReLU(), nn.Linear(width, 3))


def listed() -> list[Any]:
    """Return layers that are no factories."""
    return [("a", nn.Flatten()), ("b", nn.Linear(10, 3))]


def repeated() -> list[Any]:
    """Return two layers of one name."""
    return [("a", nn.Flatten), ("b", lambda: nn.Linear(10, 10)), ("b", lambda: nn.Linear(10, 3))]


MODELS = [
    case("model.function-result", "torch.nn.Module", model={"name": f"{__name__}:number"}),
    case("model.no-layers", model={"name": f"{__name__}:empty"}),
    case("model.layer-input", "'2'", "(16,)", model={"name": f"{__name__}:Narrow"}),
    case("model.tied-schedule", "'1.weight'", model={"name": f"{__name__}:shared_layer"}),
    case("model.outputs-not-classes", "'3'", model={"name": f"{__name__}:few_outputs"}),
    case("user-code.missing-argument", model={"name": f"{__name__}:wants_width"}),
    case("user-code.no-function", "'absent'", model={"name": f"{__name__}:absent"}),
    case("model.layer-not-a-factory", model={"name": f"{__name__}:listed"}),
    case("model.layer-name-repeated", "'b'", model={"name": f"{__name__}:repeated"}),
    case(UNKNOWN, "'depth'", "widths", model={"name": "mlp", "depth": 3}),
    case("model.weights-missing", model__weights="absent.pt"),
    case("model.weights-unreadable", model__weights="tiny.py"),
    case("model.open-unknown", model__open=["fc9"]),
]

# ---- data of users

Arrays = tuple[Any, ...]


def changed(change: Callable[[list[Any]], object]) -> Callable[[], Arrays]:
    """Return a function of data: the tiny samples after a change."""

    def data() -> Arrays:
        arrays = [array.copy() for array in tiny.samples()]
        change(arrays)
        return tuple(arrays)

    return data


def put(array: int, place: tuple[int, ...], value: float) -> Callable[[], Arrays]:
    """Return data with one other number."""

    def change(arrays: list[Any]) -> None:
        arrays[array] = arrays[array].astype(np.float64) if array in (0, 2) else arrays[array]
        arrays[array][place] = value

    return changed(change)


def with_part(second: float = 0.0, target: float = 0.0) -> Callable[[], Arrays]:
    """Return data with a second input, float targets and a validation split."""

    def data() -> Arrays:
        x, _, x_test, _ = tiny.samples()
        parts = [np.zeros((len(a), 4)) for a in (x, x_test)]
        parts[1][6, 3] = second
        targets = [np.zeros((len(a), 3)) for a in (x, x_test)]
        targets[0][17, 1] = target
        return (x, parts[0]), targets[0], (x_test, parts[1]), targets[1]

    return data


def validation() -> Arrays:
    """Return three splits, of which that for validation has a NaN."""
    x, y, x_test, y_test = tiny.samples()
    x_validation = x_test.copy()
    x_validation[4, 1, 2] = np.nan
    return x, y, x_test, y_test, x_validation, y_test


class Items(torch.utils.data.Dataset[Any]):
    """A torch Dataset with one sample that is not finite."""

    def __init__(self, size: int, bad: int = -1) -> None:
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.full((2, 5), float(index))
        return (x * torch.inf if index == self.bad else x), index % 3


def torch_items() -> Any:
    """Return torch Datasets of which one is not finite."""
    return Items(50), Items(17, bad=11)


def drawn() -> Arrays:
    """Return other samples in every call."""
    return tiny.unseeded()


def three() -> Arrays:
    """Return an incomplete split."""
    return tiny.samples()[:3]


def swap_text(arrays: list[Any]) -> None:
    arrays[1] = np.array(["cat"] * 50)


NAN_TRAIN = put(0, (13, 1, 4), np.nan)
INF_TEST = put(2, (5, 0, 3), np.inf)
NEGATIVE = put(1, (7,), -1)
UNKNOWN_LABEL = put(3, (2,), 9)
OTHER_WIDTH = changed(lambda a: a.__setitem__(2, a[2][:, :, :4]))
UNEVEN = changed(lambda a: a.__setitem__(1, a[1][1:]))
NO_SAMPLES = changed(lambda a: (a.__setitem__(0, a[0][:0]), a.__setitem__(1, a[1][:0])))
FRACTIONS = changed(lambda a: a.__setitem__(1, a[1] + 0.5))
TEXTS = changed(lambda a: a.__setitem__(0, a[0].astype(str)))
OBJECTS = changed(lambda a: a.__setitem__(0, a[0].astype(object)))
BAD_PART, BAD_TARGET = with_part(second=np.nan), with_part(target=np.inf)
CLASS_NAMES = changed(swap_text)


class Sum(nn.Module):
    """A net of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(10, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, part: Tensor) -> Tensor:
        return self.last(self.second(self.first(x.flatten(1))).relu() + part.sum(1, keepdim=True))


REGRESSION: Changes = {
    "model": {"name": f"{__name__}:Sum"},
    "partition": {"cuts": ["second", "last"]},
    "task": {"loss": "mse"},
}


def data(name: str, key: str, *words: str, **changes: Any) -> Case:
    """Return a case of data in this module."""
    return Case({"data__name": f"{__name__}:{name}"} | changes, key, words)


DATA = [
    data("NAN_TRAIN", "data.not-finite", "sample 13 of the train split", "channel 1", "nan"),
    data("NAN_TRAIN", "data.not-finite", "sample 13 of the train split", data__normalise=False),
    data("INF_TEST", "data.not-finite", "sample 5 of the test split", "channel 0", "inf"),
    data("validation", "data.not-finite", "sample 4 of the validation split", "channel 1", "nan"),
    data("torch_items", "data.not-finite", "sample 11 of the test split", "inf"),
    data("BAD_PART", "data.not-finite", "sample 6 of the test split", "input 1", "3", **REGRESSION),
    data("BAD_TARGET", "data.targets-not-finite", "train", "sample 17", **REGRESSION),
    data("NEGATIVE", "data.labels-negative", "-1"),
    data("UNKNOWN_LABEL", "data.labels-out-of-range", "9"),
    data("OTHER_WIDTH", "data.splits-shapes-differ"),
    data("UNEVEN", "data.lengths-differ", "49"),
    data("NO_SAMPLES", "data.samples-empty"),
    data("FRACTIONS", "data.labels-not-integers"),
    data("TEXTS", "data.samples-dtype"),
    data("OBJECTS", "data.samples-dtype", "object"),
    data("CLASS_NAMES", "data.labels-text", "compact"),
    data("drawn", "data.ranks-differ"),
    data("three", "data.function-result"),
    data("number", "data.function-result"),
    data("absent", "user-code.no-function", "'absent'"),
    case("data.validation-no-share", data__validation=1.0),
    case("data.validation-no-share", data__validation=-0.1),
    case("data.channels-axis", data__channels=7),
    case("data.channels-negative", data__channels=-1),
    case("data.augment-needs-images", data__augment="crop-flip"),
    case("data.last-batch-too-small", batch_size=49, model={"name": "tests.tiny:normalised"}),
    case("task.shapes-differ", "(1,)", "()", task={"loss": "mse"}),
]

# ---- files and environment


def stored(change: Callable[[h5py.File], object] | None, name: str = "train.h5") -> Any:
    """Return a function that writes two files of HDF5, one of them with a mistake."""

    def write(folder: Path) -> Changes:
        x, y, x_test, y_test = tiny.samples()
        files = {"train.h5": (x, y), "test.h5": (x_test, y_test)}
        for file_name, (inputs, labels) in files.items():
            with h5py.File(folder / file_name, "w") as file:
                file["x"], file["y"] = inputs, labels
                if file_name == name and change is not None:
                    change(file)
        paths = {split: str(folder / f"{split}.h5") for split in ("train", "test")}
        return {"data": {"name": "hdf5"} | paths}

    return write


def set_nan(file: h5py.File) -> None:
    file["x"][30, 1, 2] = np.nan


def damaged(content: bytes | None) -> Any:
    """Return a function that writes two files and spoils one."""

    def write(folder: Path) -> Changes:
        changes: Changes = stored(None)(folder)
        if content is None:
            (folder / "test.h5").unlink()
        else:
            (folder / "test.h5").write_bytes(content)
        return changes

    return write


FILES: list[tuple[Any, str, str]] = [
    (stored(set_nan), "data.not-finite", "sample 30 of the train split"),
    (stored(lambda file: file.pop("y")), "data.hdf5-dataset-missing", "train.h5"),
    (stored(lambda file: file.pop("x"), "test.h5"), "data.hdf5-dataset-missing", "test.h5"),
    (damaged(None), "data.file-missing", "test.h5"),
    (damaged(b""), "data.file-damaged", "test.h5"),
    (damaged(b"hello"), "data.file-damaged", "test.h5"),
    (lambda folder: stored(None)(folder) | {"data__tset": "a"}, UNKNOWN, "'test'"),
    (lambda _: {"data": {"name": "hdf5", "train": "", "test": "b"}}, "data.path-invalid", "train"),
    (
        lambda folder: {"data": {"name": "hdf5", "train": stored(None)(folder)["data"]["train"]}},
        "data.no-test-split",
        "test",
    ),
    (
        lambda _: {"data": {"name": "hdf5", "train": "$NOWHERE/a.h5", "test": "b.h5"}},
        "data.variable-unset",
        "NOWHERE",
    ),
    (lambda _: {"device": "cuda"}, "device.no-cuda", "cuda"),
    (
        lambda _: {"optimizer": {"name": "adamw", "no-decay": ["norm"]}},
        "optimizer.no-decay-unmatched",
        "norm",
    ),
]

CASES = [*RUN_FILE, *STRATEGIES, *PARTITION, *MODELS, *DATA]
assert len(CASES) + len(FILES) >= 80


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that has a checkpoint."""
    out = tmp_path_factory.mktemp("earlier") / "run"
    train_in_threads(tiny.run(epochs=1, mesh__stages=RANKS), out, RANKS)
    return out


@pytest.fixture(autouse=True)
def time_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the checks of data enough time on a machine that is busy."""
    monkeypatch.setattr("dtrain.session.data_notes.CHECK_S", 60.0)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of each file of a folder."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
    }


def refusals(changes: Changes, out: Path) -> list[tuple[type[DtrainError], str, str] | None]:
    """Start a run on all ranks; return the error of each."""
    changes = dict(changes)
    folder = out.with_name(changes.pop("out")) if "out" in changes else out

    def start(comm: Comm) -> tuple[type[DtrainError], str, str] | None:
        try:
            run = all_or_none(comm, lambda: tiny.run(**changes))
            train(run, comm, folder)
        except DtrainError as error:
            return (type(error), error.key, error.message) if error.on_all_ranks else None
        return None

    return run_ranks(RANKS, start)


def assert_refused(errors: list[Any], key: str, words: tuple[str, ...]) -> None:
    """Assert that all ranks have raised the same error, with this key and these words."""
    assert errors[0] is not None, "nothing was refused"
    kind, actual_key, message = errors[0]
    assert actual_key == key, message
    assert set(errors) == {errors[0]}
    assert kind in (ConfigError, DataError, CheckpointError)
    assert "\n\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("mistake", CASES, ids=[f"{n}-{case.key}" for n, case in enumerate(CASES)])
def test_all_ranks_refuse_together(mistake: Case, earlier: Path) -> None:
    """An earlier run in the folder, its checkpoint included, is untouched."""
    before = files(earlier)
    assert_refused(refusals(mistake.changes, earlier), mistake.key, mistake.words)
    assert files(earlier) == before
    assert [path.name for path in earlier.parent.iterdir()] == ["run"]


@pytest.mark.parametrize(("write", "key", "word"), FILES, ids=[key for _, key, _ in FILES])
def test_files_and_surroundings_are_refused_together(
    write: Any, key: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a start leaves, the next one takes for its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("NOWHERE", raising=False)
    out = tmp_path / "run"
    assert_refused(refusals(write(tmp_path), out), key, (word,))
    assert find_checkpoint(out, "never") is None
    assert not (out / "owner.json").exists()


@pytest.mark.parametrize(
    ("override", "code"),
    [("mesh.stages=2", 2), ("epochs=0", 2), ("data.name=faults:bad_labels", 3)],
)
def test_a_plan_refuses_what_a_start_refuses(
    override: str,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It prints one error alone, and returns its exit code."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "system" / "user")
    (tmp_path / "run.toml").write_text(dump_toml(tiny.TABLE))
    options = ["--ranks", str(RANKS), "--set", override]
    assert main(["plan", str(tmp_path / "run.toml"), *options]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("dtrain: ")
    assert printed.err.count("dtrain: ") == 1
