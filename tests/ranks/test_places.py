"""Places change nothing in the result: which stage holds which block decides the speed alone.

Invariant: the reference is one stage with all blocks, or a run whose places never changed.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from dtrain.comm.backends.threads import run_ranks
from dtrain.errors import ConfigError
from dtrain.evaluation import evaluate_run
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.planning.report import plan_text
from dtrain.schedules.gpipe_1f1b import Flush
from tests import tiny
from tests.harness import some, train_in_threads
from tests.outcome import break_off
from tests.ranks.test_graph_models import NETS as GRAPH_NETS
from tests.ranks.test_graph_models import run as graph_run
from tests.ranks.test_memory import make_run
from tests.refusals import refuses

V, LOOP, APART = [0, 1, 1, 0], [0, 1, 0, 1], [1, 0, 0, 2]
ANY_PLACES = [
    ("local-head", "stream"),
    ("mono-forward", "stream"),
    ("backprop", "fill-drain"),
    ("backprop", "drained"),
    ("backprop", "pipelined"),
    ("f3", "stream"),
]


def train(out: Path, places: list[int] | None, replicas: int = 1, **changes: Any) -> dict[str, Any]:
    """Train the tiny run in four blocks on these places, or on one stage."""
    partition = {"blocks": 4} if places is None else {"blocks": 4, "places": places}
    stages = max(places or [0]) + 1
    defaults = {"partition": partition, "epochs": 1, "mesh__stages": stages}
    return train_in_threads(tiny.run(**{**defaults, **changes}), out, stages, replicas)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("objective", "schedule"), ANY_PLACES)
def test_any_places_train_the_same_bits(
    objective: str, schedule: str, replicas: int, tmp_path: Path
) -> None:
    changes = {"objective__name": objective, "schedule__name": schedule, "batch_size": 13}
    changes |= {"micro_batches": 1 if schedule == "pipelined" else 3}
    one = train(tmp_path / "one", None, replicas, **changes)
    number = ANY_PLACES.index((objective, schedule)) + replicas
    for places in some((V, LOOP, APART), number, 2):
        summary = train(tmp_path / str(places), places, replicas, **changes)
        assert summary["stages"] == max(places) + 1
        assert summary["digest"] == one["digest"], places


NETS = {
    "mlp": {"name": "mlp", "widths": [13, 11, 7, 6]},
    "dropping": {"name": "tests.tiny:dropping"},
    "normalised": {"name": "tests.tiny:normalised"},
    "writing": {"name": "tests.tiny:writing"},
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("schedule", ["interleaved", "fold"])
def test_a_loop_and_a_v_train_the_bits_of_1f1b(schedule: str, net: str, tmp_path: Path) -> None:
    """The schedule places four blocks on 1, 2 and 4 stages by itself."""
    changes = {"model": NETS[net], "objective__name": "backprop"}
    expected = train(tmp_path / "1f1b", [0, 0, 1, 1], schedule__name="1f1b", **changes)
    for stages in (1, 2, 4) if net == "mlp" else (2,):
        changes |= {"mesh__stages": stages, "partition": {"blocks": 4}, "epochs": 1}
        run = tiny.run(**changes, schedule__name=schedule)
        summary = train_in_threads(run, tmp_path / str(stages), stages)
        assert summary["digest"] == expected["digest"]


@pytest.mark.parametrize("schedule", ["pipelined", "stream"])
@pytest.mark.parametrize("places", [[0, 1, 0], [1, 0, 1]], ids=str)
def test_skips_pass_blocks_of_their_own_stage(
    schedule: str, places: list[int], tmp_path: Path
) -> None:
    run = graph_run("skips", schedule)
    cuts = list(run.partition.cuts)
    digests = {
        train_in_threads(graph_run("skips", schedule, partition=partition), out, stages)["digest"]
        for partition, out, stages in (
            ({"cuts": cuts}, tmp_path / "one", 1),
            ({"cuts": cuts, "places": places}, tmp_path / "places", 2),
        )
    }
    assert len(digests) == 1


@pytest.mark.parametrize("schedule", ["drained", "pipelined", "pipedream"])
def test_tied_parameters_may_be_on_any_stages(schedule: str, tmp_path: Path) -> None:
    """Blocks 0 and 2 hold copies of one weight, on one rank or on two."""
    digests = set()
    for places in ([0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1]):
        changes = {"schedule__name": schedule, "objective__name": "backprop"}
        changes |= {"partition": {"cuts": list(GRAPH_NETS["tied"]), "places": places}}
        changes |= {"micro_batches": 3 if schedule == "drained" else 1}
        run = graph_run("tied", "1f1b", **changes)
        out = tmp_path / str(places)
        digests.add(train_in_threads(run, out, max(places) + 1)["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize(
    ("objective", "schedule", "places"),
    [
        ("local-head", "stream", V),
        ("backprop", "fill-drain", V),
        ("backprop", "drained", LOOP),
        ("backprop", "pipelined", V),
        ("backprop", "fold", None),
        ("backprop", "interleaved", None),
    ],
)
def test_planned_memory_is_counted_memory(
    objective: str, schedule: str, places: list[int] | None, net: str, tmp_path: Path
) -> None:
    """Within 10 % on every rank."""
    partition = {"blocks": 4, "balance": "layers"} | ({"places": places} if places else {})
    run = make_run(net, objective, schedule, partition=partition, mesh__stages=2)
    plan = make_plan(run, 2)
    assert sorted(plan.layout.place) == [0, 0, 1, 1]
    planned = [rank.peak for rank in MemoryPlan(plan).rank_memory()]
    counted = train_in_threads(run, tmp_path)["peak_memory_bytes"]
    for planned_bytes, counted_bytes in zip(planned, counted, strict=True):
        assert abs(planned_bytes / counted_bytes - 1) < 0.1, (planned, counted)


def test_a_run_resumes_on_other_places(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint__every": 2, "objective__name": "local-head"}
    stayed = train(tmp_path / "stayed", V, **changes)
    train(tmp_path / "moved", V, **changes)
    for places in (LOOP, None):
        break_off(tmp_path / "moved", 2)
        moved = train(tmp_path / "moved", places, **changes)
        assert moved["digest"] == stayed["digest"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_with_places_is_evaluated_on_any_ranks(ranks: int, tmp_path: Path) -> None:
    summary = train(tmp_path, V)
    result = run_ranks(ranks, lambda comm: evaluate_run(tmp_path, comm))[0]
    assert result["accuracy"] == summary["test_accuracy"]


@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (3, 1), (2, 2), (4, 2)])
def test_places_give_way_where_their_stages_do_not_fit(ranks: int, stages: int) -> None:
    """On other ranks, as a script may run: the same blocks."""
    for partition in ({"places": V}, {"cuts": [1, 2, 3], "places": V}):
        layout = make_plan(tiny.run(partition=partition).fit_stages(ranks), ranks).layout
        assert (len(layout.block_layouts), layout.mesh.stages) == (4, stages)


def test_places_alone_say_the_numbers_of_blocks_and_stages() -> None:
    plan = make_plan(tiny.run(partition={"places": V}), 4)
    assert (plan.layout.place, len(plan.layout.block_layouts)) == (tuple(V), 4)
    assert (plan.layout.mesh.stages, plan.layout.mesh.replicas) == (2, 2)
    assert plan.run.to_table()["partition"]["places"] == tuple(V)
    assert not plan.blocks_assumed
    by_cuts = make_plan(tiny.run(partition={"cuts": [1, 2, 3], "places": V}), 2)
    assert (by_cuts.layout.cuts, by_cuts.layout.place) == ((1, 2, 3), tuple(V))


def test_a_plan_draws_places_that_do_not_ascend() -> None:
    drawing = ["stage 0 | 0 . . 3", "stage 1 | . 1 2 ."]
    lines = plan_text(make_plan(tiny.run(partition={"places": V}), 2)).splitlines()
    first = lines.index(drawing[0])
    assert lines[first : first + 2] == drawing
    ascending = plan_text(make_plan(tiny.run(partition={"places": [0, 0, 1, 1]}), 2))
    assert "| 0 1" not in ascending


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"partition": {"blocks": 3, "places": V}}, "partition.places-count"),
        ({"partition": {"cuts": [1, 2], "places": V}}, "partition.places-count"),
        (
            {"partition": {"places": [0, 2, 0, 1]}, "mesh__stages": 2},
            "partition.place-out-of-range",
        ),
        ({"partition": {"places": V}, "mesh__stages": 3}, "partition.stage-without-block"),
        ({"partition": {"places": [0, 2, 2, 0]}}, "partition.stage-without-block"),
        (
            {"partition": {"places": V}, "objective__name": "backprop"},
            "schedule.places-not-ascending",
        ),
        ({"partition": {"places": ["a"]}}, "run-file.wrong-type"),
    ],
)
def test_impossible_places_are_refused(changes: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        make_plan(tiny.run(**changes), 6)


class Careless(Flush):
    """1F1B that does not look at places."""

    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        return min(micro_batches, stages - 1 - stage)


def test_a_schedule_of_the_users_that_cannot_run_places_is_refused_by_the_proof() -> None:
    """Its `check_places` accepts any: the deadlock is found, and is a refusal."""
    run = tiny.run(
        partition={"places": V},
        objective__name="backprop",
        schedule={"name": f"{__name__}:Careless"},
    )
    with refuses(ConfigError, "schedule.places-deadlock"):
        make_plan(run, 2)


def test_time_is_measured_before_training_and_kept_when_resumed(tmp_path: Path) -> None:
    """The resolved run has the cuts; a second start goes on with these."""
    changes = {"partition": {"blocks": 3, "balance": "time"}, "mesh__stages": 2}
    train_in_threads(tiny.run(**changes, epochs=1), tmp_path, 2)
    table = tomllib.loads((tmp_path / "run.toml").read_text())["partition"]
    assert len(table["cuts"]) == 2
    assert "balance" not in table
    summary = train_in_threads(tiny.run(**changes, epochs=2), tmp_path, 2)
    assert summary["attempts"] == 2
    assert tomllib.loads((tmp_path / "run.toml").read_text())["partition"] == table
