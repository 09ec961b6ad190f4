"""The Python API: a `Run` and a run file are two spellings of one thing; own loops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dtrain
from dtrain.checkpoint.export import load_state_dict
from dtrain.checkpoint.newest_checkpoint import newest_checkpoint
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.schedules.segments import Segment
from dtrain.training import train_session
from tests import tiny
from tests.harness import assert_same_model
from tests.outcome import summary
from tests.refusals import refuses


def net(width: int = 12) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 8), nn.Linear(8, 3)
    )


def make_run(**changes: Any) -> dtrain.Run:
    """Return a tiny run that is made in Python."""
    sections: dict[str, Any] = {
        "model": net,
        "data": tiny.samples(),
        "partition": dtrain.Partition(cuts=(3,)),
        "objective": "local-head",
        "optimizer": dtrain.Optimizer("adam", lr=0.01),
        "epochs": 2,
        "batch_size": 16,
        "micro_batches": 3,
        "dtype": "float64",
        "threads": 1,
    }
    return dtrain.Run(**sections | changes)


def train(run: dtrain.Run, out: Path, ranks: int = 1, **options: Any) -> dict[str, Any]:
    """Train on ranks that are threads; return the summary."""

    def work(comm: Comm) -> dict[str, Any]:
        session = dtrain.Session(run, out, comm=comm, **options)
        train_session(session)
        return session.summary()

    return run_ranks(ranks, work)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "tests.tiny:samples", "model": "tests.tiny:writing"},
        {
            "data": {"name": "tests.tiny:samples", "normalise": False},
            "model": {"name": "mlp", "widths": [13, 11]},
            "partition": None,
            "mesh": dtrain.Mesh(stages=2),
            "objective": dtrain.objectives.OBJECTIVES["dfa"](),
            "optimizer": dtrain.Optimizer(
                "sgd", lr=0.1, momentum=0.5, clip=1.0, no_decay=["bias"], weight_decay=0.1
            ),
            "lr": {"name": "cosine", "warmup_updates": 2},
            "sync": dtrain.syncs.SYNCS["local-sgd"](every=2),
        },
        {
            "data": "tests.graph_nets:fields",
            "model": "tests.graph_nets:unet",
            "task": dtrain.Task(loss="huber", metrics=["mae"], delta=0.5),
            "partition": None,
        },
    ],
    ids=["names", "every section", "task"],
)
def test_a_run_and_the_text_of_it_are_the_same_run(changes: dict[str, Any], tmp_path: Path) -> None:
    run = make_run(**changes)
    path = tmp_path / "again.toml"
    path.write_text(run.to_toml())
    again = dtrain.Run.read(path)
    assert again.config.to_table() == run.config.to_table()
    assert again.to_toml() == run.to_toml()
    assert dtrain.Run.read(path, set=["epochs=5"]).config.settings.epochs == 5
    assert run.replace(epochs=7).config.settings.epochs == 7
    assert run.replace(updates=3).config.settings.epochs is None


def test_a_run_of_objects_trains_as_that_of_its_text(tmp_path: Path) -> None:
    run = make_run(data="tests.tiny:samples", model={"name": net, "width": 9})
    path = tmp_path / "again.toml"
    path.write_text(run.to_toml())
    train(run, tmp_path / "objects", 2)
    train(dtrain.Run.read(path), tmp_path / "text")
    assert_same_model(tmp_path / "objects", tmp_path / "text")


def test_a_module_has_the_weights_of_rank_0_on_all_ranks(tmp_path: Path) -> None:
    first, starts = net(), dict[int, dict[str, torch.Tensor]]()

    def work(comm: Comm) -> None:
        module = first if comm.rank == 0 else net()
        run = make_run(model=module, optimizer=dtrain.Optimizer("sgd", lr=1e-9))
        with dtrain.Session(run, tmp_path / "out", comm=comm) as session:
            starts[comm.rank] = {k: v.clone() for k, v in module.state_dict().items()}
            segment = next(session.segments())
            list(session.updates(segment))
            session.finish(segment)
            session.save()

    run_ranks(2, work)
    trained = load_state_dict(tmp_path / "out")
    for name, tensor in first.state_dict().items():
        assert torch.equal(starts[1][name], tensor)
        assert torch.allclose(trained[name].float(), tensor, atol=1e-6)


@pytest.mark.parametrize(
    ("stages", "ranks", "fitted"), [(3, 2, 2), (3, 4, 2), (2, 1, 1), (3, 3, 3)]
)
def test_stages_that_do_not_fit_become_fewer(
    stages: int, ranks: int, fitted: int, tmp_path: Path
) -> None:
    run = make_run(
        mesh=dtrain.Mesh(stages=stages), partition=dtrain.Partition(cuts=(2, 3)), micro_batches=1
    )
    assert train(run, tmp_path, ranks)["stages"] == fitted
    assert dtrain.plan(run, ranks).table["stages"] == fitted
    if fitted != stages:
        with pytest.raises(ConfigError) as caught:
            dtrain.plan(run, ranks, exact_mesh=True)
        assert caught.value.key.startswith("mesh.")


def own_loop(run: dtrain.Run, out: Path, comm: Comm, leave: Callable[[int], bool]) -> str:
    """Train by hand; leave after the first update for which `leave` holds."""
    with dtrain.Session(run, out, comm=comm) as session:
        for segment in session.segments():
            for update in session.updates(segment):
                losses = session.losses()
                assert all(np.isfinite(loss) for loss in losses.values())
                if leave(update):
                    return "left"
            session.finish(segment)
            if segment.ends_epoch:
                metrics = session.evaluate()
                assert metrics.keys() == {"loss", "accuracy"}
                session.save()
    return str(session.summary()["digest"])


def test_a_loop_of_ones_own_trains_the_same_bits(tmp_path: Path) -> None:
    run = make_run(segment=3)
    digests = run_ranks(2, lambda comm: own_loop(run, tmp_path / "own", comm, lambda _: False))
    assert digests == [train(run, tmp_path / "train")["digest"]] * 2


def test_a_session_that_is_left_early_is_stopped_and_goes_on(tmp_path: Path) -> None:
    run, out = make_run(segment=3), tmp_path / "own"
    for ranks, last in ((2, 2), (1, 5)):  # before the first checkpoint, then in the second epoch
        run_ranks(ranks, lambda comm, last=last: own_loop(run, out, comm, lambda u: u == last))
        assert summary(out)["status"] == "stopped"
        assert not (out / "owner.json").exists()
    digest = run_ranks(2, lambda comm: own_loop(run, out, comm, lambda _: False))[0]
    assert digest == train(run, tmp_path / "train")["digest"]
    assert summary(out)["status"] == "finished"
    assert [epoch["epoch"] for epoch in newest_checkpoint(out).state["history"]] == [0, 1]


def test_callbacks_are_called_on_all_ranks_and_may_stop(tmp_path: Path) -> None:
    events: dict[int, list[tuple[str, int]]] = {0: [], 1: []}
    lock = threading.Lock()

    def note(session: dtrain.Session, event: dtrain.Event) -> None:
        with lock:
            events[session.rank].append((event.kind, event.update))
        if event.kind == "evaluation" and session.epoch == 1:
            session.stop("one epoch is enough")

    result = train(make_run(epochs=3), tmp_path, 2, callbacks=[note])
    assert (result["updates"], result["status"]) == (4, "finished")
    assert events[0] == events[1]
    kinds = [kind for kind, _ in events[0]]
    assert kinds == ["start", *["update"] * 4, "segment", "evaluation", "checkpoint", "end"]


@pytest.mark.parametrize(
    ("places", "objective", "key"),
    [
        ((0, 2), "local-head", "partition.stage-without-block"),
        ((1, 0), "backprop", "schedule.places-not-ascending"),
    ],
)
def test_wrong_places_are_refused_on_fewer_ranks_too(
    places: tuple[int, ...], objective: str, key: str
) -> None:
    partition = dtrain.Partition(cuts=(3,), places=places)
    with refuses(ConfigError, key):
        dtrain.plan(make_run(partition=partition, objective=objective), 1)


def test_without_stages_there_are_no_more_than_blocks(tmp_path: Path) -> None:
    """Two blocks: four ranks are two stages and two replicas."""
    result = train(make_run(), tmp_path, 4)
    assert (result["stages"], result["replicas"]) == (2, 2)


@pytest.mark.parametrize("method", ["evaluate", "save", "digest"])
def test_what_needs_all_blocks_is_refused_inside_a_segment(method: str, tmp_path: Path) -> None:
    def work(comm: Comm) -> None:
        with dtrain.Session(make_run(), tmp_path, comm=comm) as session:
            segment = next(session.segments())
            for _ in session.updates(segment):
                getattr(session, method)()

    with refuses(ConfigError, "session.segment-open"):
        run_ranks(1, work)


def test_a_segment_has_to_be_finished(tmp_path: Path) -> None:
    def work(comm: Comm) -> None:
        with dtrain.Session(make_run(segment=1), tmp_path, comm=comm) as session:
            for segment in session.segments():
                assert isinstance(segment, Segment)
                list(session.updates(segment))

    with refuses(ConfigError, "session.segment-unfinished"):
        run_ranks(1, work)


def test_wrong_arguments_are_refused_when_the_run_is_made() -> None:
    for changes, key in (
        ({"objective": "backpropp"}, "objective.unknown"),
        ({"mesh": 3}, "run.wrong-section"),
        ({"partition": {"block": 2}}, "run-file.unknown-key"),
        ({"epochs": None}, "run-file.length"),
        ({"objective": nn.Linear}, "user-code.no-strategy"),
    ):
        with refuses(ConfigError, key):
            make_run(**changes)


def test_after_training(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = make_run(epochs=6)
    result = dtrain.train(run, out)
    assert result.rank == 0
    assert len(result.history) == 6
    assert result.test_accuracy == result.summary["metrics"]["accuracy"]
    assert result.history[-1]["test_accuracy"] == result.test_accuracy
    assert result.history[-1]["train_loss"] == result.summary["train_loss"]
    metrics = dtrain.evaluate(out)
    assert metrics["accuracy"] == result.test_accuracy
    assert dtrain.evaluate(out, run=run) == metrics
    state = result.state_dict()
    assert state is not None
    module = net().double()
    module.load_state_dict(state)
    exported = dtrain.export(out, tmp_path / "net.pt")
    assert exported.keys() == state.keys()
