"""Warnings of a plan: each is one line, with its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli import main
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.mesh import PLACEMENTS
from dtrain.objectives.local_head import LocalHead
from dtrain.objectives.mono_forward import MonoForward
from dtrain.planning.placement_warnings import placement_warnings
from dtrain.planning.plan import Plan, make_plan
from dtrain.planning.warnings import plan_warnings
from dtrain.schema import dump_toml
from dtrain.training import train
from tests import tiny

DEEP: dict[str, Any] = {"model": {"name": "mlp", "widths": [60, 60, 60, 60, 60]}}
PICTURES: dict[str, Any] = {
    "data": {"name": "tests.ranks.test_memory:pictures"},
    "model": {"name": "cnn", "widths": [[8, 8], [8]]},
    "partition": {"blocks": 2},
}


def make_tiny_plan(ranks: int = 1, **changes: Any) -> Plan:
    """Return the plan of a tiny run."""
    return make_plan(tiny.run(**changes), ranks)


def warnings_with(text: str, ranks: int = 1, **changes: Any) -> list[str]:
    """Return the warnings that contain `text`; all are single lines."""
    lines = plan_warnings(make_tiny_plan(ranks, **changes))
    assert all(line and "\n" not in line for line in lines)
    return [line for line in lines if text in line]


@pytest.mark.parametrize("blocks", [4, 5, 6])
def test_more_blocks_than_an_objective_trains(blocks: int) -> None:
    lines = warnings_with("[partition] blocks = 4", **DEEP, partition__blocks=blocks)
    assert [line.split(":")[0] for line in lines] == [f"{blocks} blocks"] * (blocks > 4)
    assert all("'mono-forward'" in line for line in lines)
    backprop = {"partition__blocks": blocks, "objective__name": "backprop"}
    assert warnings_with("[partition] blocks", **DEEP, **backprop) == []


def test_an_objective_may_scale_to_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not MonoForward().scales_to_many_blocks
    monkeypatch.setattr(MonoForward, "scales_to_many_blocks", True)
    assert warnings_with("[partition] blocks = 4", **DEEP, partition__blocks=6) == []


def test_heads_that_are_large_beside_their_blocks() -> None:
    """Blocks of 10 x 60 + 60, 60 x 60 + 60 and more; heads of 60 x 3."""
    cuts = {"cuts": [1, 2]}
    (line,) = warnings_with("heads", **DEEP, partition=cuts)
    assert "parameters: block 0 (27 %); such" in line  # and 4.9 % of block 1
    nine_layers = {"name": "mlp", "widths": [8] * 9}
    (line,) = warnings_with("heads", model=nine_layers, partition={"blocks": 10})
    assert "9 of 10 blocks, most in block 1 (33 %)" in line
    assert warnings_with("heads", **DEEP, partition=cuts, objective__name="backprop") == []


def test_a_block_without_parameters_has_the_largest_head_of_all() -> None:
    """The first layer of the user's net flattens."""
    model = {"name": "tests.tiny:normalised"}
    (line,) = warnings_with("heads", model=model, partition={"cuts": [1]})
    assert "block 0 (no parameters); such" in line


@pytest.mark.parametrize(
    ("batch", "micros", "replicas", "rows"),
    [(64, 4, 1, None), (60, 4, 1, 15), (64, 2, 4, 8), (500, 11, 1, 14), (64, 2, 2, None)],
)
def test_batch_statistics_of_few_samples(
    batch: int, micros: int, replicas: int, rows: int | None
) -> None:
    """The smallest micro-batch of a full update, of 160 samples at most."""
    sizes = {"batch_size": batch, "micro_batches": micros, "mesh__stages": 1}
    lines = warnings_with("under 16", replicas, **PICTURES, **sizes)
    assert len(lines) == (rows is not None)
    for line in lines:
        assert f"micro-batches of {rows} samples" in line
        assert f"batch-size = {16 * micros * replicas}" in line
    without_norm = PICTURES | {"model": {**PICTURES["model"], "norm": "none"}}
    assert warnings_with("under 16", replicas, **without_norm, **sizes) == []


def test_samples_that_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and heads with batch statistics, and losses over a micro-batch."""
    (line,) = warnings_with("batch statistics in", **PICTURES)
    assert "batch statistics in conv1, conv2, conv3: results depend" in line
    head = {"name": "local-head", "head": "dgl"}
    (line,) = warnings_with("batch statistics in", **PICTURES, objective=head)
    assert "conv3, heads.0: results depend" in line
    deep = {**PICTURES, "model": {"name": "cnn", "widths": [[8] * 7]}}
    (line,) = warnings_with("batch statistics in", **deep)
    assert "conv1 ... conv7 (7 of them)" in line
    assert warnings_with("results depend") == []
    monkeypatch.setattr(LocalHead, "couples_samples", lambda self, spec: spec.index == 1)
    (line,) = warnings_with("results depend", objective={"name": "local-head"})
    assert line.startswith("the loss of block 1 ")


def test_an_objective_has_its_own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    def warnings(self: MonoForward, specs: list[object], rows: int) -> list[str]:
        return [f"{len(specs)} blocks of {rows} rows"]

    monkeypatch.setattr(MonoForward, "warnings", warnings)
    assert plan_warnings(make_tiny_plan())[-1] == "3 blocks of 6 rows"


def test_a_run_and_its_plan_contain_all_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lines that begin with `note` at the start, as `Notes` in `plan.txt`, and as values."""
    changes: dict[str, Any] = {"epochs": 1, "partition__frozen": [1], "partition__blocks": 5}
    expected = plan_warnings(make_tiny_plan(**changes))
    assert len(expected) >= 2
    train(tiny.run(**changes), Comm(SingleBackend()), tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert [line[10:] for line in printed if line.startswith("note ")] == expected
    assert "frozen    block 1: 154 parameters keep their initial values" in printed
    plan_text = (tmp_path / "plan.txt").read_text()
    assert plan_text.split("\nNotes\n")[1].splitlines() == expected
    monkeypatch.chdir(tmp_path)
    (tmp_path / "again.toml").write_text((tmp_path / "run.toml").read_text())
    assert main(["plan", "again.toml", "--ranks", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cautions"] == expected
    quiet = tmp_path / "quiet"
    train(tiny.run(epochs=1, objective__name="backprop"), Comm(SingleBackend()), quiet)
    assert "note " not in capsys.readouterr().out
    assert "Notes" not in (quiet / "plan.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "micros"),
    [
        ({"objective__name": "backprop", "micro_batches": 1}, 8),
        ({"objective__name": "backprop", "micro_batches": 1, "batch_size": 6}, 6),
        ({"objective__name": "backprop", "micro_batches": 2}, None),
        ({"objective__name": "backprop", "micro_batches": 1, "schedule__name": "pipelined"}, None),
        ({"objective__name": "mono-forward", "micro_batches": 1}, None),
    ],
)
def test_backprop_with_one_micro_batch_on_several_stages(
    changes: dict[str, Any], micros: int | None
) -> None:
    lines = warnings_with("one micro-batch on 3 stages", 3, mesh__stages=3, **changes)
    assert len(lines) == (micros is not None)
    for line in lines:
        assert "67 %" in line
        assert f"micro-batches = {micros} " in line
    assert warnings_with("one micro-batch", 3, mesh__stages=1, **changes) == []


@pytest.mark.parametrize(
    ("batch", "replicas", "counts"),
    [(16, 4, "2 of 4 replicas"), (2, 4, "2 of 4 replicas"), (16, 2, None), (10, 4, None)],
)
def test_replicas_without_samples(batch: int, replicas: int, counts: str | None) -> None:
    """The last update of 50 samples has 2 of 16; updates of 2 are too few for 4 replicas."""
    lines = warnings_with("no samples", replicas, batch_size=batch, mesh__stages=1)
    assert [line.partition(" have")[0] for line in lines] == ([] if counts is None else [counts])
    assert all(("in any update" in line) == (batch == 2) for line in lines)


@pytest.mark.parametrize("stages", [1, 2])
def test_blocks_of_very_unequal_costs(stages: int) -> None:
    """The last block is one of 60 x 3 beside four of 60 x 60."""
    sizes = {"partition__blocks": None, "partition__cuts": [5], "mesh__stages": stages}
    (line,) = warnings_with("multiply-adds", stages, **DEEP, **sizes)
    assert line.startswith("stages" if stages > 1 else "blocks")
    assert "cuts" in line
    even = sizes | {"partition__cuts": [3]}
    assert warnings_with("multiply-adds", stages, **DEEP, **even) == []
    joined = sizes | {"objective__name": "backprop"}
    assert len(warnings_with("multiply-adds", stages, **DEEP, **joined)) == stages - 1


@pytest.mark.parametrize(
    ("placement", "nodes", "stages", "cures"),
    [
        ("stages-in-node", "aabb", 2, None),
        ("stages-in-node", "aaabbbcc", 4, None),  # more stages than ranks of a node
        ("stages-in-node", "abab", 1, None),
        ("stages-in-node", "abab", 2, ["distribution=block", "replicas-in-node"]),
        ("stages-in-node", "abab", 4, ["distribution=block"]),
        ("stages-in-node", "aaabbb", 2, ["a multiple of 2 ranks"]),
        ("replicas-in-node", "abab", 2, ["distribution=block", "stages-in-node"]),
        ("replicas-in-node", "aabb", 2, None),
        ("replicas-in-node", "aaab", 2, ["a multiple of 2 ranks"]),
    ],
)
def test_ranks_that_cross_nodes_against_the_placement(
    placement: str, nodes: str, stages: int, cures: list[str] | None
) -> None:
    """By a cyclic distribution or uneven nodes; the warning has what to type, and nothing else."""
    mesh = {"stages": stages, "placement": placement}
    plan = make_tiny_plan(len(nodes), mesh=mesh, partition__blocks=4)
    lines = placement_warnings(plan, list(map("abc".index, nodes)), list(nodes))
    assert len(lines) == (cures is not None)
    for text in ("distribution=block", "a multiple of 2 ranks", *PLACEMENTS):
        cure = "".join(lines).rpartition("; ")[2]
        assert (text in cure) == (text in (cures or ())), lines


def test_a_start_says_and_records_what_crosses_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As all notes: in the output, and in the record of the start. Host names may be equal."""
    run = tiny.run(mesh__stages=2, epochs=1)
    nodes = [0, 1, 0, 1]
    run_ranks(4, lambda comm: train(run, comm, tmp_path), hosts=["a"] * 4, nodes=nodes)
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert record["nodes"] == nodes
    (note,) = (note for note in record["notes"] if "distribution=block" in note)
    assert note in capsys.readouterr().out


def test_plans_of_nodes_warn_before_a_run_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a costs file, and before a job is submitted: three ranks of a node, two stages."""
    table = tiny.TABLE | {"mesh": {"stages": 2}}
    (tmp_path / "run.toml").write_text(dump_toml(table))
    (tmp_path / "costs.toml").write_text(
        "multiply-adds-per-s = 1e9\nranks-per-node = 3\n"
        "[links.intra-node]\nbytes-per-s = 1e9\n[links.inter-node]\nbytes-per-s = 1e9\n"
    )
    job = ["--site", "generic", "--nodes", "2", "--ranks-per-node", "3", "--dry-run"]
    for words in (
        ["plan", "--ranks", "6", "--costs", str(tmp_path / "costs.toml")],
        ["submit", *job, "--out", str(tmp_path / "out")],
    ):
        command, *options = words
        assert main([command, str(tmp_path / "run.toml"), *options]) == 0
        printed = capsys.readouterr()
        assert "a multiple of 2 ranks" in printed.out + printed.err, words


@pytest.mark.parametrize(
    ("placement", "nodes", "text"),
    [
        ("stages-in-node", "aabb", "a node of its own"),
        ("replicas-in-node", "aabb", "on one node"),
        ("stages-in-node", "aaaa", "on one node"),
        ("stages-in-node", "aaaabbbb", None),
    ],
)
def test_daso_on_nodes_that_do_not_suit_it(placement: str, nodes: str, text: str | None) -> None:
    changes: dict[str, Any] = {"sync": {"name": "daso"}, "epochs": 9}
    plan = make_tiny_plan(len(nodes), mesh={"stages": 2, "placement": placement}, **changes)
    lines = placement_warnings(plan, list(map("abc".index, nodes)), list(nodes))
    assert len(lines) == (text is not None)
    assert all(str(text) in line for line in lines)
