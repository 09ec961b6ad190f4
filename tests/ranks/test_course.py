"""The course of a run: validation, best checkpoint, early stopping, averaged weights, rates.

Each key keeps the laws: the same bits and decisions on any number of stages, and a resumed run that
ends as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

import dtrain
from dtrain.callbacks import BestCheckpoint, EarlyStopping, Ema, Event
from dtrain.checkpoint.export import export
from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config import sections
from dtrain.config.run import RunConfig
from dtrain.config.sections import Stop
from dtrain.errors import ConfigError, DataError
from dtrain.evaluation import evaluate_run
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.session.session import Callback, Session
from dtrain.training import train
from tests import tiny
from tests.conftest import ROOT
from tests.harness import assert_same_model, train_in_threads
from tests.outcome import model, summary
from tests.refusals import refuses

SGD = {"name": "sgd", "lr": 0.5, "momentum": 0.9}
"""A rate at which the tiny run overshoots, so that metrics get worse now and then."""

COURSES: dict[str, dict[str, Any]] = {
    "validation": {"data__validation": 0.2},
    "every updates": {"evaluate": {"every-updates": 3}},
    "best": {"checkpoint__best": "validation_loss", "data__validation": 0.2},
    "stop": {"stop": {"metric": "test_loss", "patience": 2}, "optimizer": SGD, "epochs": 8},
    "stop inside an epoch": {
        "stop": {"metric": "test_loss", "patience": 3},
        "evaluate": {"every-updates": 1},
        "optimizer": SGD,
        "epochs": 8,
    },
    "ema": {"ema": {"decay": 0.9, "start": 2, "evaluate": True}, "data__validation": 0.2},
    "plateau": {"lr": {"name": "plateau", "patience": 0, "factor": 0.5}, "optimizer": SGD},
    "one-cycle": {"lr": {"name": "one-cycle"}},
    "function": {"lr": {"name": "tests.ranks.test_course:halving", "warmup-updates": 2}},
}
OUTCOMES = ("digest", "updates", "test_loss", "validation_loss", "ema_test_loss", "stop_reason")


def halving(update: int, updates_per_epoch: int, total_updates: int) -> float:
    """Return 1 in the first half of the run, 0.5 in the second."""
    return 1.0 if 2 * update < total_updates else 0.5


def run(course: str, **changes: Any) -> RunConfig:
    """Return the tiny run with a course."""
    return tiny.run(**{"epochs": 4, "checkpoint__every": 3, **COURSES[course], **changes})


def alone(config: RunConfig, out: Path, *callbacks: Callback) -> dict[str, Any]:
    """Train on one rank and return the summary."""
    return train(config, Comm(SingleBackend()), out, callbacks=callbacks)


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of a kind in `metrics.jsonl`."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def outcome(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the laws compare."""
    return {key: result.get(key) for key in (*OUTCOMES, "best")}


@pytest.fixture(scope="module", params=COURSES)
def course(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a course, its folder, and the summary of one rank."""
    out = tmp_path_factory.mktemp("course") / "one"
    return request.param, out, alone(run(request.param, mesh__stages=1), out)


def test_any_number_of_stages_takes_the_same_course(course: Any, tmp_path: Path) -> None:
    name, out, expected = course
    for stages, replicas in ((2, 1), (3, 1)):
        folder = tmp_path / str(stages)
        result = train_in_threads(run(name, mesh__stages=stages), folder, stages, replicas)
        assert outcome(result) == outcome(expected)
        assert_same_model(out, folder)


def test_replicas_decide_alike(course: Any, tmp_path: Path) -> None:
    name, _, expected = course
    result = train_in_threads(run(name, mesh__stages=2), tmp_path / "replicas", 2, 2)
    assert (result["updates"], result["status"]) == (expected["updates"], "finished")
    assert result["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-9)


def test_a_resumed_run_takes_the_same_course(course: Any, tmp_path: Path) -> None:
    """It goes on from every checkpoint that the run has written."""
    name, out, expected = course
    parts = tmp_path / "parts"

    class Broken(Exception):
        pass

    def break_off(session: Session, event: Event) -> None:
        if event.kind == "checkpoint" and event.update > attempts[0]:
            attempts[0] = event.update
            raise Broken

    attempts = [0]
    for _ in range(100):
        try:
            result = alone(run(name, mesh__stages=1), parts, break_off)
            break
        except Broken:
            continue
    assert attempts[0] > 4
    assert outcome(result) == outcome(expected)
    assert_same_model(out, parts)
    assert [row["epoch"] for row in records(parts, "eval")] == [
        row["epoch"] for row in records(out, "eval")
    ]


# ---- the guide


def snippets(language: str) -> list[str]:
    """Return the examples of the section on the course of a run, and of learning rates."""
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    text = "".join(
        guide.partition(f"## {title}\n")[2].partition("\n## ")[0]
        for title in ("Schedule the learning rate", "The course of a run")
    )
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_the_snippets_of_the_guide_train(tmp_path: Path) -> None:
    """All of them in one run, whose data, model and rates are replaced by tiny ones."""
    tables = [tomllib.loads(snippet) for snippet in snippets("toml")]
    assert len(tables) == 8
    merged: dict[str, Any] = {}
    for table in tables:
        for name, section in table.items():
            merged[name] = merged.get(name, {}) | section
    assert merged["data"].pop("name") == "digits"
    assert (merged["model"].pop("weights"), merged["lr"]["name"]) == ("runs/other", "rates:rates")
    merged["lr"] = tables[0]["lr"]
    tiny_data = {"name": "tests.tiny:samples"} | merged.pop("data")
    config = tiny.run(
        **{key: value for key, value in merged.items() if key != "model"}, data=tiny_data
    )
    result = alone(config, tmp_path / "run")
    assert {"validation_loss", "ema_test_loss", "ema_validation_metrics"} <= result.keys()


def test_the_functions_of_the_guide_train(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    for code in snippets("python"):
        exec(code, names)
    config = dataclasses.replace(tiny.run(), lr_schedule=names["rates"])
    alone(config, tmp_path / "run", *names["callbacks"])
    assert [row["lr"][0] for row in records(tmp_path / "run", "train")] == [0.01, 0.01 * 0.9]
    assert summary(tmp_path / "run")["best"]["metric"] == "accuracy"


# ---- validation


def test_validation_is_apart_and_recorded(tmp_path: Path) -> None:
    result = alone(run("validation"), tmp_path / "run")
    last = records(tmp_path / "run", "eval")[-2:]
    assert [row["split"] for row in last] == ["validation", "test"]
    assert last[0]["validation_loss"] == result["validation_loss"] != result["test_loss"]
    assert result["validation_metrics"] == {"accuracy": result["validation_accuracy"]}
    assert result["samples"] == 4 * 40
    evaluated = evaluate_run(tmp_path / "run", Comm(SingleBackend()), "validation")
    assert (evaluated["loss"], evaluated["samples"]) == (result["validation_loss"], 10)


def three_splits() -> tuple[np.ndarray, ...]:
    """Return the samples of the tiny run; the last of training are for validation."""
    x, y, x_test, y_test = tiny.samples()
    return x[:40], y[:40], x_test, y_test, x[40:], y[40:]


def test_a_function_may_return_a_third_split(tmp_path: Path) -> None:
    config = tiny.run(data__name="tests.ranks.test_course:three_splits")
    result = alone(config, tmp_path / "run")
    evaluated = evaluate_run(tmp_path / "run", Comm(SingleBackend()), "validation")
    assert (evaluated["loss"], evaluated["samples"]) == (result["validation_loss"], 10)
    with refuses(DataError, "data.validation-twice"):
        alone(
            tiny.run(data__name="tests.ranks.test_course:three_splits", data__validation=0.5),
            tmp_path / "twice",
        )


def test_data_of_python_may_have_a_third_split(tmp_path: Path) -> None:
    run = dtrain.Run(
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(10, 3)),
        data=three_splits(),
        objective="backprop",
        optimizer=dtrain.Optimizer("sgd", lr=0.1),
        epochs=2,
        dtype="float64",
    )
    stopping = EarlyStopping("validation_loss", patience=3)
    with Session(
        run, tmp_path / "run-{seed}", callbacks=[stopping], comm=Comm(SingleBackend())
    ) as session:
        for segment in session.segments():
            assert list(session.updates(segment)) == [segment.epoch]
            session.finish(segment)
            metrics = session.evaluate()
    assert metrics["loss"] == session.summary()["validation_loss"] == session.metric("loss")
    assert session.metric("test_loss") == summary(tmp_path / "run-0")["test_loss"]


# ---- the best checkpoint


def test_the_best_weights_are_kept_beside_the_newest(tmp_path: Path) -> None:
    """The run gets worse at its end, so the newest are not the best."""
    out, comm = tmp_path / "run", Comm(SingleBackend())
    config = run("best", checkpoint__best="test_loss", optimizer=SGD, checkpoint__keep=1)
    result = alone(config, out)
    losses = {
        row["update"]: row["test_loss"] for row in records(out, "eval") if row["split"] == "test"
    }
    best = min(losses, key=lambda update: losses[update])
    assert best < result["updates"]
    assert result["best"] == {"metric": "test_loss", "value": losses[best], "update": best}
    assert evaluate_run(out, comm, best=True)["loss"] == losses[best]
    assert evaluate_run(out, comm)["loss"] == result["test_loss"] > losses[best]
    exported = export(out, tmp_path / "best.pt", best=True)
    assert any(not torch.equal(exported[name], tensor) for name, tensor in model(out).items())
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["best", f"update-{result['updates']:08d}"]
    alone(tiny.run(**TINY_WARM | {"model__weights": str(out / "checkpoints/best")}), tmp_path / "w")
    assert summary(tmp_path / "w")["status"] == "finished"


def test_a_run_that_starts_afresh_replaces_the_best_of_a_lost_one(tmp_path: Path) -> None:
    """The lost run had saved its best weights, and no checkpoint yet."""
    out = tmp_path / "run"
    alone(tiny.run(epochs=4, checkpoint__best="train_loss", optimizer__lr=0.001), out)
    for folder in (out / "checkpoints").glob("update-*"):
        shutil.rmtree(folder)
    result = alone(tiny.run(epochs=1, checkpoint__best="train_loss"), out)
    [kept] = (out / "checkpoints" / "best").iterdir()
    assert kept.name == "update-00000004"
    assert evaluate_run(out, Comm(SingleBackend()), best=True)["loss"] == result["test_loss"]


TINY_WARM: dict[str, Any] = {"epochs": 1}


def test_best_weights_need_the_key(tmp_path: Path) -> None:
    alone(tiny.run(epochs=1), tmp_path / "run")
    with refuses(ConfigError, "run-folder.no-best-checkpoint"):
        export(tmp_path / "run", tmp_path / "best.pt", best=True)
    with refuses(ConfigError, "checkpoint.no-ema"):
        export(tmp_path / "run", tmp_path / "ema.pt", ema=True)
    with refuses(ConfigError, "evaluate.no-validation"):
        evaluate_run(tmp_path / "run", Comm(SingleBackend()), "validation")


# ---- early stopping


@pytest.mark.parametrize("name", ["stop", "stop inside an epoch"])
def test_a_stopped_run_is_finished_and_a_larger_patience_goes_on(name: str, tmp_path: Path) -> None:
    out, stop = tmp_path / "run", dict(COURSES[name]["stop"])
    first = alone(run(name), out)
    assert first["stop_reason"] is not None
    assert first["status"] == "finished"
    losses = [row["test_loss"] for row in records(out, "eval")]
    assert min(losses) == losses[-1 - stop["patience"]] < min(losses[-stop["patience"] :])
    again = alone(run(name), out)
    assert (outcome(again), again["attempts"]) == (outcome(first), 2)
    stop["patience"] += 3
    longer = alone(run(name, stop=stop), out)
    assert longer["updates"] > first["updates"]
    assert outcome(longer) == outcome(alone(run(name, stop=stop), tmp_path / "whole"))


def test_a_run_that_is_extended_stops_as_the_longer_one(tmp_path: Path) -> None:
    """The test at the end of the shorter run is none of the longer one's."""
    changes = {"evaluate": {"every": 2}, "stop": {"metric": "train_loss", "min-delta": 9.0}}
    alone(tiny.run(epochs=3, **changes), tmp_path / "run")
    longer = alone(tiny.run(epochs=20, **changes), tmp_path / "run")
    whole = alone(tiny.run(epochs=20, **changes), tmp_path / "whole")
    assert outcome(longer) == outcome(whole)
    assert whole["updates"] == 4 * 12


# ---- averaged weights


def averages(out: Path) -> dict[str, Tensor]:
    """Return the averaged weights of the newest checkpoint."""
    manifest = latest_checkpoint(out / "checkpoints")
    assert manifest is not None
    return manifest.load_prefix("ema/")


@pytest.mark.parametrize("objective", ["backprop", "mono-forward"])
def test_averages_are_those_of_a_plain_loop(objective: str, tmp_path: Path) -> None:
    """The weights after each update, of runs of one update more each, are averaged here."""
    decay, start, updates = 0.8, 2, 6
    changes: dict[str, Any] = {"epochs": None, "objective__name": objective}
    expected: dict[str, Tensor] = {}
    for count in range(1, updates + 1):
        alone(tiny.run(updates=count, **changes), tmp_path / "plain")
        for name, tensor in model(tmp_path / "plain").items():
            old = expected.get(name, tensor) if count > start else tensor
            expected[name] = decay * old + (1 - decay) * tensor
    ema = {"decay": decay, "start": start}
    alone(tiny.run(updates=updates, ema=ema, **changes), tmp_path / "ema")
    assert_same_model(tmp_path / "plain", tmp_path / "ema")
    for name, tensor in averages(tmp_path / "ema").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("stages", "schedule"), [(1, None), (2, None), (3, "pipelined")])
def test_averages_are_the_same_bits_on_any_stages(
    stages: int, schedule: str | None, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"ema": {"decay": 0.9, "evaluate": True}, "epochs": 2}
    if schedule is not None:
        changes |= {"schedule": {"name": schedule}, "objective__name": "backprop"}
        changes |= {"micro_batches": 1}
    alone(tiny.run(**changes, mesh__stages=1), tmp_path / "one")
    result = train_in_threads(tiny.run(**changes, mesh__stages=stages), tmp_path / "run", stages)
    ours, theirs = averages(tmp_path / "run"), averages(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    evaluated = evaluate_run(tmp_path / "run", Comm(SingleBackend()), ema=True)
    assert evaluated["loss"] == result["ema_test_loss"] != result["test_loss"]
    exported = export(tmp_path / "run", tmp_path / "ema.pt", ema=True)
    assert all(torch.equal(exported[name], ours[name]) for name in exported)


@pytest.mark.parametrize("sync", ["never", "local-sgd", "daso", "ab", "oialr", "diloco"])
def test_averages_need_equal_replicas(sync: str) -> None:
    with refuses(ConfigError, "ema.sync"):
        tiny.run(ema={"decay": 0.9}, sync__name=sync)


@pytest.mark.parametrize(
    "sync", [{"name": "every-step"}, {"name": "demo"}, {"name": "powersgd"}, {"name": "int8"}]
)
def test_averages_of_replicas_are_equal(sync: dict[str, Any], tmp_path: Path) -> None:
    """The replicas are on two hosts, so that transfers are compressed; on 1 and 2 stages."""
    found: list[dict[str, Tensor]] = []
    for stages in (1, 2):

        def work(comm: Comm, stages: int = stages) -> dict[str, Tensor]:
            ema = Ema(0.9)
            config = tiny.run(epochs=1, sync=sync, mesh__stages=stages, log__norms=True)
            train(config, comm, tmp_path / str(stages), callbacks=[ema])
            blocks = [[0, 1, 2]] if stages == 1 else [[0], [1, 2]]
            return {n: t for b in blocks[comm.rank % stages] for n, t in ema.weights(b).items()}

        hosts = [f"host{rank // stages}" for rank in range(2 * stages)]
        ranks = run_ranks(2 * stages, work, hosts=hosts)
        for stage in range(stages):
            first, other = ranks[stage], ranks[stages + stage]
            assert all(torch.equal(first[name], other[name]) for name in first)
        found.append({name: t for rank in ranks[:stages] for name, t in rank.items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_averages_are_planned_memory(tmp_path: Path) -> None:
    counted, planned = [], []
    for name, keys in (("plain", {}), ("ema", {"ema": {}})):
        config = tiny.run(epochs=1, mesh__stages=1, **keys)
        counted.append(alone(config, tmp_path / name)["peak_memory_bytes"][0])
        planned.append(MemoryPlan(make_plan(config, 1)).rank_memory()[0].peak)
    size = sum(tensor.nbytes for tensor in averages(tmp_path / "ema").values())
    assert counted[1] - counted[0] == planned[1] - planned[0] == size


# ---- learning rates


def test_the_rate_falls_where_torchs_does(tmp_path: Path) -> None:
    """Rates of the run's records, and torch's own scheduler on the losses of the run."""
    keys = {"factor": 0.3, "patience": 1, "threshold": 0.05, "cooldown": 1, "min-factor": 0.05}
    config = run("plateau", epochs=14, lr={"name": "plateau", **keys}, checkpoint__every=0)
    alone(config, tmp_path / "run")
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=SGD["lr"])
    scheduler = optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=0.3,
        patience=1,
        threshold=0.05,
        cooldown=1,
        min_lr=0.05 * SGD["lr"],
        eps=0,
    )
    rates = []
    for row in records(tmp_path / "run", "eval"):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(row["test_loss"])
    recorded = [row["lr"][0] for row in records(tmp_path / "run", "train")]
    assert recorded == pytest.approx(rates, rel=1e-12)
    assert len(set(rates)) > 2


# ---- records


def test_records_hold_norms_and_rates_per_block(tmp_path: Path) -> None:
    """With plain SGD of one update, weights and rates say what the gradient was."""
    changes: dict[str, Any] = {"epochs": None, "optimizer": {"name": "sgd", "lr": 0.25}}
    changes |= {"log__norms": True}
    for count in (1, 2):
        alone(tiny.run(updates=count, **changes), tmp_path / str(count))
    before, after = model(tmp_path / "1"), model(tmp_path / "2")
    last = records(tmp_path / "2", "train")[-1]
    for block, layers in enumerate([("fc1", "heads.0"), ("fc2", "heads.1")]):
        names = [name for name in after if name.startswith(layers)]
        norm = math.sqrt(sum(float((after[n] ** 2).sum()) for n in names))
        step = math.sqrt(sum(float(((after[n] - before[n]) ** 2).sum()) for n in names))
        assert last["weight_norm"][block] == pytest.approx(norm, rel=1e-12)
        assert last["gradient_norm"][block] == pytest.approx(step / 0.25, rel=1e-9)
    assert last["lr"] == [0.25] * 3
    assert len(last["loss"]) == 3
    alone(tiny.run(epochs=1), tmp_path / "plain")
    [plain] = records(tmp_path / "plain", "train")
    assert plain["lr"] == [0.01] * 3
    assert "gradient_norm" not in plain


# ---- callbacks


def test_callbacks_are_other_spellings_of_keys(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        **COURSES["stop"],
        "checkpoint__best": "accuracy",
        "ema": {"decay": 0.9},
    }
    expected = alone(tiny.run(**keys), tmp_path / "keys")
    events: list[str] = []
    callbacks = (
        EarlyStopping("test_loss", patience=2),
        BestCheckpoint("accuracy"),
        Ema(0.9),
        lambda session, event: events.append(event.kind),
    )
    result = alone(tiny.run(epochs=8, optimizer=SGD), tmp_path / "objects", *callbacks)
    assert outcome(result) == outcome(expected)
    for name in ("run.toml", "plan.txt"):
        assert (tmp_path / "objects" / name).read_text() == (tmp_path / "keys" / name).read_text()
    assert (events[0], events[-1]) == ("start", "end")


@pytest.mark.parametrize("name", COURSES)
def test_a_course_can_be_said_in_python(name: str) -> None:
    config = run(name)
    made = dtrain.Run.from_config(config)
    assert made.config == config
    assert tomllib.loads(made.to_toml()) == tomllib.loads(config.to_text())
    other = made.replace(lr=halving, stop={"patience": 2}, ema={"decay": 0.5})
    assert other.config.lr_schedule.instance.lr_factor(9, 4, 10) == 0.5
    assert (other.config.stop, other.config.ema) == (Stop(patience=2), sections.Ema(decay=0.5))


class Counter:
    """A callback of a user that counts updates, and stops the run."""

    def __init__(self, last: int) -> None:
        self.count, self.last = 0, last

    def __call__(self, session: Session, event: Event) -> None:
        self.count += event.kind == "update"
        if self.count == self.last:
            session.stop("enough")

    def state(self) -> dict[str, int]:
        return {"count": self.count}

    def restore(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_the_state_of_a_users_callback_is_kept(tmp_path: Path) -> None:
    first = alone(tiny.run(segment=1), tmp_path / "run", Counter(3))
    assert (first["updates"], first["status"], first["stop_reason"]) == (3, "finished", "enough")
    counter = Counter(5)
    second = alone(tiny.run(segment=1), tmp_path / "run", counter)
    assert (second["updates"], counter.count) == (5, 5)


def test_one_rank_that_stops_ends_the_run_on_all(tmp_path: Path) -> None:
    def stop_on_last(session: Session, event: Event) -> None:
        if event.kind == "segment" and session.rank == 1:
            session.stop("rank 1")

    def work(comm: Comm) -> dict[str, Any]:
        return train(tiny.run(mesh__stages=2), comm, tmp_path / "run", callbacks=[stop_on_last])

    results = run_ranks(2, work)
    assert [(row["updates"], row["stop_reason"]) for row in results] == [(4, "rank 1")] * 2


@pytest.mark.parametrize(
    ("callbacks", "key"),
    [
        ((Ema(0.9), Ema(0.99)), "callbacks.twice"),
        ((Ema(0.5),), "callbacks.differ-from-run"),
        ((EarlyStopping("speed", 3),), "metric.unknown"),
        ((EarlyStopping("validation_loss", 3),), "metric.unknown"),
        ((EarlyStopping("test_loss", 0),), "run-file.number-too-small"),
    ],
)
def test_wrong_callbacks_are_refused(
    callbacks: tuple[Callback, ...], key: str, tmp_path: Path
) -> None:
    with refuses(ConfigError, key):
        alone(tiny.run(ema={"decay": 0.9}), tmp_path / "run", *callbacks)
    assert not (tmp_path / "run" / "run.toml").exists()


# ---- warm starts, and folders


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    """All else is new; the same as from an exported file, on any number of stages."""
    alone(tiny.run(), tmp_path / "old")
    export(tmp_path / "old", tmp_path / "net.pt")
    warm = alone(tiny.run(model__weights=str(tmp_path / "old")), tmp_path / "warm")
    file = alone(tiny.run(model__weights=str(tmp_path / "net.pt")), tmp_path / "file")
    changes = {"model__weights": str(tmp_path / "old"), "mesh__stages": 3}
    stages = train_in_threads(tiny.run(**changes), tmp_path / "stages", 3)
    assert (
        warm["digest"] == file["digest"] == stages["digest"] != summary(tmp_path / "old")["digest"]
    )
    assert warm["updates"] == 8
    (tmp_path / "empty").mkdir()
    with refuses(ConfigError, "model.weights-no-checkpoint"):
        alone(tiny.run(model__weights=str(tmp_path / "empty")), tmp_path / "none")


def test_a_changed_rate_names_the_way_to_go_on(tmp_path: Path) -> None:
    alone(tiny.run(), tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        alone(tiny.run(optimizer__lr=0.001), tmp_path / "run")
    assert caught.value.key == "resume.settings-changed"
    assert f"--set model.weights={tmp_path / 'run'}" in caught.value.message


def test_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    out, comm = tmp_path / "run", Comm(SingleBackend())
    first = train(tiny.run(), comm, out)
    shutil.copytree(out, tmp_path / "copy")
    for number in (1, 2):
        again = train(tiny.run(optimizer__lr=0.02 * number), comm, out, "fresh")
        assert (again["attempts"], again["updates"]) == (1, 8)
        assert (tmp_path / f"run.old-{number}" / "summary.json").exists()
    for path in (tmp_path / "copy").rglob("*"):
        moved = tmp_path / "run.old-1" / path.relative_to(tmp_path / "copy")
        assert path.is_dir() or moved.read_bytes() == path.read_bytes()
    assert not (tmp_path / "run.old-1" / "owner.json").exists()
    assert again["digest"] != first["digest"]
    with refuses(ConfigError, "run-folder.fresh-moves-weights"):
        train(tiny.run(model__weights=str(out)), comm, out, "fresh")
