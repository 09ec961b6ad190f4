"""Trackers: each holds the records of all starts; one that fails ends no training."""

from __future__ import annotations

import csv
import json
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.sections import Log
from dtrain.errors import ConfigError
from dtrain.schema import Table
from dtrain.tracking import TRACKERS
from dtrain.tracking.base import RunFacts, Tracker, scalars
from dtrain.tracking.metrics_file import MetricsFile
from dtrain.tracking.recorder import Recorder, make_trackers
from tests import tiny
from tests.conftest import ROOT
from tests.refusals import refuses

SETTINGS: Table = {"epochs": 2, "optimizer": {"name": "adam", "lr": 0.01}, "data": {"cuts": [1, 2]}}
PACKAGES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
"""Packages that a test of a tracker needs."""


def record(update: int, loss: float) -> dict[str, Any]:
    """Return a `train` record."""
    head = {"time_s": 0.5 * update, "unix_s": 1e9 + update, "attempt": 1, "update": update}
    return head | {"epoch": 0, "loss": [None, loss], "step_s": {"max": 0.25}, "slowest_host": "a"}


class Listing(Tracker):
    """A user's tracker, which lists its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, run: Table, facts: RunFacts) -> None:
        self.calls.append(("start", run, facts))

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        self.calls.append((kind, values))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.calls.append(("finish", summary))

    def close(self) -> None:
        self.calls.append(("close",))


class Failing(Listing):
    """A tracker whose service does not answer."""

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        super().record(kind, values)
        raise ConnectionError("no service")


def track(name: str, folder: Path, attempt: int, losses: Mapping[int, float]) -> None:
    """Pass one start of a run to a tracker; `losses` are those of the last block by update."""
    recorder = Recorder(make_trackers([name], folder))
    recorder.start(SETTINGS, RunFacts(folder, folder.name, attempt, min(losses)))
    for update, loss in losses.items():
        recorder.record("train", record(update, loss))
    recorder.finish({"status": "finished", "updates": max(losses), "samples": 8, "digest": "00"})
    recorder.close()


def read_csv(folder: Path) -> dict[int, float]:
    with (folder / "csv" / "train.csv").open(newline="") as file:
        return {int(row["update"]): float(row["loss/1"]) for row in csv.DictReader(file)}


def read_tensorboard(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss/1")}


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in the format of LevelDB, after a header of 7 bytes."""
    position, record, block = 7, b"", 32768
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
        _, size, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def read_wandb(folder: Path) -> dict[int, float]:
    """Return the losses in the files of all offline runs, which all have one id."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {f"run-{(folder / 'wandb' / 'run-id').read_text()}"}
    losses = {}
    for file in files:
        for data in leveldb_records(file.read_bytes()):
            items = Record.FromString(data).history.item
            values = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            if "train/loss/1" in values:
                losses[values["update"]] = values["train/loss/1"]
    return losses


def read_mlflow(folder: Path) -> dict[int, float]:
    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("dtrain")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.01"
    history = client.get_metric_history(run.info.run_id, "train/loss/1")
    return {metric.step: metric.value for metric in history}


READERS: dict[str, Callable[[Path], dict[int, float]]] = {
    "csv": read_csv,
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_holds_the_records_of_all_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "run 1"
    folder.mkdir()
    track(name, folder, 1, {4: 2.5, 8: 1.5})
    track(name, folder, 2, {12: 0.5})
    assert READERS[name](folder) == {4: 2.5, 8: 1.5, 12: 0.5}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [4, 8, 12]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_without_its_package_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torch.utils.tensorboard", "tensorboardX", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    with refuses(ConfigError, "log.tracker-package") as caught:
        make_trackers([name], tmp_path)
    assert f"pip install {name}" in str(caught.value)


def test_every_tracker_with_a_package_is_an_extra() -> None:
    import configparser

    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert parser["options.extras_require"].keys() >= PACKAGES.keys() == TRACKERS.keys() - {"csv"}


def test_a_run_file_names_trackers_and_classes() -> None:
    named = Log(trackers=("csv", "tests.rule.test_tracking:Listing"))
    assert tiny.run(log={"trackers": list(named.trackers)}).log.trackers == named.trackers
    assert Log(trackers=(Listing(), "csv")).to_table()["trackers"] == [
        "tests.rule.test_tracking:Listing",
        "csv",
    ]
    listing = Listing()
    given = tiny.run(log={"trackers": [listing, "csv"]}).log.trackers
    assert make_trackers(given, ROOT)[0] is listing
    _, tracker = make_trackers(named.trackers, ROOT)
    assert type(tracker).__name__ == "Listing"
    with refuses(ConfigError, "log.unknown-tracker"):
        tiny.run(log={"trackers": ["tensorbord"]})
    with refuses(ConfigError, "log.no-tracker"):
        make_trackers(["tests.rule.test_tracking:read_nothing"], ROOT)
    with refuses(ConfigError, "run-file.wrong-type"):
        tiny.run(log={"trackers": [3]})


def read_nothing() -> None:
    """No tracker."""


def test_a_tracker_that_fails_warns_once_and_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, listing = Failing(), Listing()
    recorder = Recorder([failing, listing])
    facts = RunFacts(tmp_path, "run", 1, 0)
    recorder.start(SETTINGS, facts)
    records = [record(update, 1.0) for update in (1, 2, 3)]
    for values in records:
        recorder.record("train", values)
    recorder.finish({"status": "finished"})
    recorder.close()
    recorder.close()
    calls = [("start", SETTINGS, facts), *(("train", values) for values in records)]
    assert listing.calls == [*calls, ("finish", {"status": "finished"}), ("close",)]
    assert failing.calls == listing.calls
    assert capsys.readouterr().err.count("ConnectionError") == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"kind": "train", **r} for r in records]


def test_numbers_are_found_in_lists_and_dicts() -> None:
    values = record(3, 1.5) | {"metrics": {"mae": 2, "r2": None}, "good": True, "empty": []}
    assert scalars(values) == {"loss/1": 1.5, "step_s/max": 0.25, "metrics/mae": 2.0}


def test_a_new_column_widens_a_csv_file(tmp_path: Path) -> None:
    track("csv", tmp_path, 1, {4: 2.5})
    (tracker,) = make_trackers(["csv"], tmp_path)
    tracker.start(SETTINGS, RunFacts(tmp_path, "run", 2, 4))
    tracker.record("train", record(8, 1.5) | {"added": 7})
    with (tmp_path / "csv" / "train.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["loss/1"], first["added"]) == ("2.5", "")
    assert (second["loss/1"], second["added"]) == ("1.5", "7.0")


def test_a_torn_line_of_metrics_is_removed(tmp_path: Path) -> None:
    """A run that was killed, or whose disk was full, left half of a record."""
    path = tmp_path / "metrics.jsonl"
    whole = "".join(f'{{"update": {update}}}\n' for update in range(10_000))
    for text in (whole, whole + '{"kind": "tra', '{"kind"', "x" * 200_000, whole + "x" * 200_000):
        path.write_text(text)
        file = MetricsFile()
        file.start({}, RunFacts(tmp_path, "run", 1, 0))
        file.record("train", {"update": 5})
        kept = whole if text.startswith(whole) else ""
        assert path.read_text() == kept + '{"kind": "train", "update": 5}\n'
