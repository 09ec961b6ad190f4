"""A run that is told to stop, at any update, and started again equals the undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.callbacks import Event
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.errors import SAVED_CODE, ConfigError, Interrupted
from dtrain.objectives import OBJECTIVES
from dtrain.schedules import SCHEDULES
from dtrain.session.session import Session
from dtrain.training import train
from tests import tiny
from tests.harness import FULL, cells, train_in_threads
from tests.outcome import break_off
from tests.ranks.contract import early_ends
from tests.refusals import refuses

UPDATES = 10
"""Updates of an epoch, which is one segment."""

COUNTED = ("digest", "updates", "samples", "train_loss", "train_loss_per_block", "test_loss")
COUNTED += ("test_accuracy", "bytes_intra_node", "bytes_inter_node", "status", "low_rank")

MEASURED = ("time_s", "unix_s", "attempt", "samples_per_s", "train_s", "eval_s", "save_s")
MEASURED += ("slowest_rank", "slowest_busy_s", "slowest_host", "stage_median_busy_s", "step_s")
MEASURED += ("wait_s", "memory_bytes", "peak_tflops", "peak_share", "tflops")
"""Keys of records that differ between two runs of the same program."""


def run_of(objective: str, schedule: str, sync: str, **changes: Any) -> RunConfig:
    """Return a tiny run of two epochs, each of one segment."""
    return tiny.run(
        objective__name=objective,
        schedule__name=schedule,
        sync__name=sync,
        batch_size=5,
        micro_batches=1 if SCHEDULES[schedule].asynchronous else 2,
        **changes,
    )


def stop_at(update: int, ranks: set[int], numbers: tuple[int, ...] = (signal.SIGTERM,)) -> Any:
    """Return a callback that interrupts the run on some ranks when they have done an update."""

    def callback(session: Session, event: Event) -> None:
        if event.kind == "update" and event.update == update and session.rank in ranks:
            for number in numbers:
                session.interrupt(number)

    return callback


def train_until_stopped(
    run: RunConfig, out: Path, ranks: int, callback: Callable[..., None], seed: int = 0
) -> list[tuple[int, str]]:
    """Train on threads; return code and key with which each rank was interrupted."""

    def work(comm: Comm) -> tuple[int, str]:
        try:
            train(run, comm, out, callbacks=[callback])
        except Interrupted as end:
            return end.code, end.key
        return 0, ""

    return run_ranks(ranks, work, seed=seed)


def summary(out: Path) -> dict[str, Any]:
    """Return `summary.json` of a run."""
    content: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return content


def records(out: Path, *kinds: str) -> list[dict[str, Any]]:
    """Return the records of some kinds, without what is measured."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in MEASURED}
        for row in rows
        if row["kind"] in kinds
    ]


def may_stop_anywhere(objective: str, schedule: str) -> bool:
    """Return whether the end of a segment has no effect on what a pair trains."""
    kind = OBJECTIVES[objective]()
    late = any(route.lag for route in kind.routes(3, "train"))
    sums = kind.accumulated_buffers or kind.broadcast_buffers
    return not (late or sums or SCHEDULES[schedule].asynchronous)


def covering(cells: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return cells in which every objective, schedule and sync of `cells` is found; all of them
    with `DTRAIN_FULL=1`."""
    if FULL:
        return list(cells)
    missing = {(place, name) for cell in cells for place, name in enumerate(cell)}
    cover = []
    while missing:
        best = max(cells, key=lambda cell: len(missing.intersection(enumerate(cell))))
        missing -= set(enumerate(best))
        cover.append(best)
    return cover


CELLS = covering([cell for cell in cells() if may_stop_anywhere(*cell[:2])])


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_run_stopped_at_any_update_and_resumed_is_the_undisturbed_one(
    cell: tuple[str, str, str], tmp_path: Path
) -> None:
    """On 1, 2 x 2 or 3 ranks; one rank or all are told, once or twice, in one of two epochs."""
    chance = random.Random(repr(cell))
    stages, replicas = chance.choice([(1, 1), (2, 2), (3, 1), (1, 3)])
    ranks = stages * replicas
    run = run_of(*cell, mesh__stages=stages)
    update = chance.choice([*range(1, UPDATES - 3), *range(UPDATES + 1, 2 * UPDATES - 3)])
    told = {chance.randrange(ranks)} if chance.random() < 0.5 else set(range(ranks))
    whole = train_in_threads(run, tmp_path / "whole", stages, replicas)
    numbers = (signal.SIGTERM, signal.SIGUSR1)[: chance.randint(1, 2)]
    ends = train_until_stopped(
        run, tmp_path / "parts", ranks, stop_at(update, told, numbers), seed=update
    )
    assert ends == [(SAVED_CODE, "interrupted.saved")] * ranks
    stopped = summary(tmp_path / "parts")
    assert stopped["status"] == "stopped"
    assert update <= stopped["updates"] <= 2 * UPDATES
    assert stopped["updates"] == stopped["samples"] // 5
    resumed = train_in_threads(run, tmp_path / "parts", stages, replicas)
    assert {key: resumed[key] for key in COUNTED} == {key: whole[key] for key in COUNTED}
    for kind in ("train", "eval"):
        assert records(tmp_path / "parts", kind) == records(tmp_path / "whole", kind)


def test_all_that_follows_updates_and_evaluations_goes_on(tmp_path: Path) -> None:
    """Averaged weights, norms, the best checkpoint, early stopping and a schedule of the rate."""
    changes: dict[str, Any] = {
        "mesh__stages": 2,
        "epochs": 3,
        "ema": {"decay": 0.9, "evaluate": True},
        "stop": {"metric": "loss", "patience": 2},
        "checkpoint": {"best": "accuracy"},
        "evaluate": {"every-updates": 4},
        "lr": {"name": "cosine"},
        "log": {"norms": True},
        "trace": True,
        "data__validation": 0.2,
    }
    run = run_of("backprop", "1f1b", "every-step", **changes)
    whole = train_in_threads(run, tmp_path / "whole", 2, 2)
    for update in (2, 4, 7):
        train_until_stopped(run, tmp_path / "parts", 4, stop_at(update, {2}), seed=update)
    resumed = train_in_threads(run, tmp_path / "parts", 2, 2)
    assert resumed["attempts"] > 2
    for key in (*COUNTED, "best", "stop_reason", "validation_loss", "ema_test_loss"):
        assert resumed[key] == whole[key], key
    for kind in ("train", "eval"):
        assert records(tmp_path / "parts", kind) == records(tmp_path / "whole", kind)


def test_the_rest_of_a_segment_may_be_trained_on_other_ranks(tmp_path: Path) -> None:
    """To the bit on other stages, up to rounding on other replicas; no sample counts twice."""
    run = run_of("mono-forward", "stream", "every-step", epochs=1)
    whole = train_in_threads(run, tmp_path / "whole", 1)
    for number, (start, end) in enumerate([((3, 1), (2, 1)), ((1, 2), (3, 1)), ((1, 1), (1, 3))]):
        out = tmp_path / str(number)
        first = run_of("mono-forward", "stream", "every-step", epochs=1, mesh__stages=start[0])
        ends = train_until_stopped(first, out, start[0] * start[1], stop_at(4, {0}))
        assert ends[0][0] == SAVED_CODE
        moved = run_of("mono-forward", "stream", "every-step", epochs=1, mesh__stages=end[0])
        rest = train_in_threads(moved, out, *end)
        assert (rest["samples"], rest["updates"]) == (whole["samples"], whole["updates"])
        expected = pytest.approx(whole["train_loss_per_block"], rel=1e-12)
        assert rest["train_loss_per_block"] == expected
        if start[1] == end[1]:
            assert rest["digest"] == whole["digest"]
            assert rest["train_loss_per_block"] == whole["train_loss_per_block"]


LATE_CELLS = [
    ("dni", "pipelined", "every-step"),
    ("man", "stream", "local-sgd"),
    ("cafo", "stream", "every-step"),
    ("backprop", "pipedream", "daso"),
]
"""What is delayed, or summed up to the end of a segment: such runs stop there."""


@pytest.mark.parametrize("cell", LATE_CELLS, ids="-".join)
def test_other_runs_stop_at_the_end_of_the_segment(
    cell: tuple[str, str, str], tmp_path: Path
) -> None:
    """The evaluation that is due there comes after the restart, and nothing else differs."""
    run = run_of(*cell, mesh__stages=2)
    whole = train_in_threads(run, tmp_path / "whole", 2, 2)
    ends = train_until_stopped(run, tmp_path / "parts", 4, stop_at(3, {1}))
    assert [code for code, _ in ends] == [SAVED_CODE] * 4
    assert summary(tmp_path / "parts")["updates"] == UPDATES
    assert records(tmp_path / "parts", "eval") == []
    resumed = train_in_threads(run, tmp_path / "parts", 2, 2)
    assert {key: resumed[key] for key in COUNTED} == {key: whole[key] for key in COUNTED}
    for kind in ("train", "eval"):
        assert records(tmp_path / "parts", kind) == records(tmp_path / "whole", kind)


def test_checkpoints_by_the_clock_change_nothing(tmp_path: Path) -> None:
    """As many as possible: one at every update that all ranks agree on."""
    cell = ("backprop", "1f1b", "every-step")
    whole = train_in_threads(run_of(*cell, mesh__stages=2), tmp_path / "whole", 2, 2)
    run = run_of(*cell, mesh__stages=2, checkpoint={"every-minutes": 1e-9, "keep": 1000})
    often = train_in_threads(run, tmp_path / "often", 2, 2)
    assert {key: often[key] for key in COUNTED} == {key: whole[key] for key in COUNTED}
    for kind in ("train", "eval"):
        assert records(tmp_path / "often", kind) == records(tmp_path / "whole", kind)
    assert len(records(tmp_path / "often", "checkpoint")) > 4
    for folder in sorted((tmp_path / "often" / "checkpoints").iterdir())[1:-1:3]:
        again = tmp_path / folder.name
        shutil.copytree(tmp_path / "often", again)
        break_off(again, int(folder.name.removeprefix("update-")))
        resumed = train_in_threads(run_of(*cell, mesh__stages=2), again, 2, 2)
        assert {key: resumed[key] for key in COUNTED} == {key: whole[key] for key in COUNTED}


@pytest.mark.parametrize("kind", ["start", "segment", "evaluation", "checkpoint"])
def test_a_run_that_is_told_between_segments_loses_nothing(kind: str, tmp_path: Path) -> None:
    """A rank other than the first is told, again and again, in the first such moment."""

    def callback(session: Session, event: Event) -> None:
        if event.kind == kind and session.rank == 1:
            session.interrupt()

    run = run_of("mono-forward", "stream", "every-step")
    whole = train_in_threads(run, tmp_path / "whole", 1, 2)
    for attempt in range(3):
        out = tmp_path / "parts"
        ends = train_until_stopped(run, out, 2, callback if attempt < 2 else lambda *_: None)
        # The last evaluation of a run is finished, and then there is nothing left to stop.
        is_stopped = attempt < (2 if kind == "start" else 1)
        assert [code for code, _ in ends] == [SAVED_CODE if is_stopped else 0] * 2
    resumed = summary(tmp_path / "parts")
    assert {key: resumed[key] for key in COUNTED} == {key: whole[key] for key in COUNTED}
    assert records(tmp_path / "parts", "eval") == records(tmp_path / "whole", "eval")


@pytest.mark.parametrize("ranks", [1, 2, 5, 6, 23])
@pytest.mark.parametrize("seed", range(4))
def test_all_ranks_decide_for_one_update_that_none_has_passed(ranks: int, seed: int) -> None:
    """A pipeline of ranks, of which some are asked at random moments, and several times."""
    first, *others = run_ranks(ranks, lambda comm: early_ends(comm, seed), seed=seed)
    assert all(ends == first for ends in others)


def test_the_time_limit_of_the_job_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an update that might not end in time; the next job goes on."""
    monkeypatch.setenv("DTRAIN_JOB_END_TIME", str(round(time.time()) + 5))
    run = run_of("backprop", "1f1b", "every-step", checkpoint={"stop-before-limit": True})
    ends = train_until_stopped(run, tmp_path / "out", 2, lambda *_: None)
    assert ends == [(SAVED_CODE, "interrupted.saved")] * 2
    assert summary(tmp_path / "out")["status"] == "stopped"
    monkeypatch.setenv("DTRAIN_JOB_END_TIME", str(round(time.time()) + 5000))
    resumed = train_in_threads(run, tmp_path / "out", 1, 2)
    whole = train_in_threads(run, tmp_path / "whole", 1, 2)
    assert resumed["digest"] == whole["digest"]


def test_a_limit_that_nobody_knows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DTRAIN_JOB_END_TIME", "SLURM_JOB_END_TIME", "SLURM_JOB_ID", "DTRAIN_JOB"):
        monkeypatch.delenv(name, raising=False)
    with refuses(ConfigError, "checkpoint.no-limit-known"):
        train_in_threads(tiny.run(checkpoint={"stop-before-limit": True}), tmp_path)
    with refuses(ConfigError, "checkpoint.unknown-signal"):
        tiny.run(checkpoint={"signals": ["KILL"]})
