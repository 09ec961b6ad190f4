"""Law of frozen blocks: their layers keep their first weights, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.objectives import OBJECTIVES
from dtrain.planning.block_factory import make_block
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.planning.report import plan_table, plan_text
from dtrain.schedules import SCHEDULES
from dtrain.syncs import SYNCS
from tests import tiny
from tests.harness import pairs, train_in_threads
from tests.outcome import break_off, model
from tests.refusals import refuses

PAIRS = pairs()
NORMAL = {"model": {"name": "tests.tiny:normalised"}, "micro_batches": 1}


def block_run(objective: str, schedule: str, **changes: Any) -> RunConfig:
    """Return a run of a single epoch; what updates at once gets one micro-batch."""
    micros = 1 if SCHEDULES[schedule].delays_count_micro_batches else 2
    named = {"objective__name": objective, "schedule__name": schedule, "micro_batches": micros}
    return tiny.run(**{"epochs": 1, "mesh__stages": 2} | named | changes)


def trained(run: RunConfig, out: Path, ranks: int) -> dict[str, Any]:
    """Train on a number of threads and return the summary."""
    stages = run.mesh.stages or ranks
    return train_in_threads(run, out, stages=stages, replicas=ranks // stages)


def first_parameters(run: RunConfig, count: int) -> list[dict[str, Tensor]]:
    """Return the parameters of every block as the seed draws them."""
    layout = make_plan(run, count).layout
    blocks = [
        make_block(run, layout, b, torch.device("cpu")) for b in range(len(layout.block_layouts))
    ]
    return [{name: p.detach() for name, p in block.parameters.items()} for block in blocks]


def assert_frozen(run: RunConfig, out: Path, count: int, frozen: set[int]) -> None:
    """Assert that the layers of the frozen blocks are what they were, and that the last block
    moved, unless it is one of them."""
    tensors, moved, blocks = model(out), set(), first_parameters(run, count)
    for block, before in enumerate(blocks):
        for name, tensor in before.items():
            if block in frozen and not name.startswith("heads."):
                assert torch.equal(tensors[name], tensor), name
            elif not torch.equal(tensors[name], tensor):
                moved.add(block)
    assert moved >= {len(blocks) - 1} - frozen


CELLS = [
    (*pair, sync)
    for turn, pair in enumerate(PAIRS)
    for syncs in [tiny.suited(pair[1])]
    for sync in (syncs if pair[0] == "mono-forward" else [syncs[turn % len(syncs)]])
    if pair[1] == OBJECTIVES[pair[0]]().default_schedule
]
"""Every objective in its own order with, by turns, every sync; one objective with all of them."""


@pytest.mark.parametrize(("objective", "schedule", "sync"), CELLS)
def test_frozen_weights_never_change(
    objective: str, schedule: str, sync: str, tmp_path: Path
) -> None:
    """All but the last block; three replicas that may train apart, clipped over blocks.

    Thirds of three equal weights do not always add up to them.
    """
    changes = {"sync__name": sync, "partition__frozen": True, "optimizer__clip": 0.5}
    run = block_run(objective, schedule, **changes, mesh__stages=1)
    trained(run, tmp_path, 3)
    assert_frozen(run, tmp_path, 3, {0, 1})


@pytest.mark.parametrize("objective", tiny.PATTERNS)
@pytest.mark.parametrize("frozen", [[1], [0, 1, 2]])
def test_blocks_are_frozen_by_number(objective: str, frozen: list[int], tmp_path: Path) -> None:
    """Gradients pass through a frozen block; nothing at all may be left to train."""
    schedule = OBJECTIVES[objective]().default_schedule
    run = block_run(objective, schedule, partition__frozen=frozen)
    trained(run, tmp_path, 2)
    assert_frozen(run, tmp_path, 2, set(frozen))


@pytest.mark.parametrize("objective", tiny.PATTERNS)
def test_a_frozen_run_is_resumed_as_if_uninterrupted(objective: str, tmp_path: Path) -> None:
    """Law 5, in the middle of an epoch, where a rank may own nothing that learns."""
    syncs = tiny.suited(OBJECTIVES[objective]().default_schedule)
    sync = syncs[list(OBJECTIVES).index(objective) % len(syncs)]
    changes = {
        "sync__name": sync,
        "partition__frozen": True,
        "epochs": None,
        "checkpoint__every": 3,
    }
    schedule = OBJECTIVES[objective]().default_schedule
    whole = trained(block_run(objective, schedule, **changes, updates=6), tmp_path / "whole", 4)
    for updates in (3, 6):
        length = (
            6 if SYNCS[sync]().traits().depends_on_run_length else updates
        )  # its phases follow it
        parts = trained(
            block_run(objective, schedule, **changes, updates=length), tmp_path / "parts", 4
        )
        if updates < 6:
            break_off(tmp_path / "parts", updates)
    assert parts["attempts"] == 2
    assert whole["digest"] == parts["digest"]


@pytest.mark.parametrize("objective", tiny.PATTERNS)
def test_a_frozen_block_is_the_same_on_any_number_of_ranks(objective: str, tmp_path: Path) -> None:
    schedule = OBJECTIVES[objective]().default_schedule
    changes = {"partition": {"blocks": 3, "frozen": [0, 1], "recompute": True}}
    digests = {
        trained(block_run(objective, schedule, **changes, mesh__stages=n), tmp_path / str(n), n)[
            "digest"
        ]
        for n in (1, 2, 3)
    }
    assert len(digests) == 1


def test_batch_statistics_of_a_frozen_block_go_on(tmp_path: Path) -> None:
    changes = NORMAL | {"partition": {"cuts": [3], "frozen": True}, "mesh__stages": 1}
    run = tiny.run(**changes)
    trained(run, tmp_path, 1)
    assert_frozen(run, tmp_path, 1, {0})
    assert model(tmp_path)["2.running_mean"].abs().sum() > 0
    assert model(tmp_path)["2.num_batches_tracked"] == 8


@pytest.mark.parametrize(("frozen", "named"), [([3], 3), ([0, -1], -1), ([7, 1], 7)])
def test_a_block_that_is_not_there_is_refused_by_name(frozen: list[int], named: int) -> None:
    with refuses(ConfigError, "partition.unknown-block") as caught:
        make_plan(tiny.run(partition__frozen=frozen), 1)
    assert f"block {named}," in caught.value.message


@pytest.mark.parametrize("stages", [1, 3])
def test_a_plan_knows_what_is_frozen(stages: int, tmp_path: Path) -> None:
    """No gradients and no optimizer of frozen layers; the heads' remain. And what is counted is
    what is planned."""
    changes = {"model": {"name": "mlp", "widths": [300, 200, 100]}, "mesh__stages": stages}
    free = make_plan(tiny.run(**changes), stages)
    run = tiny.run(**changes, partition__frozen=[0, 1])
    plan = make_plan(run, stages)
    parts = [(part.parameters, part.head_parameters) for part in free.layout.block_layouts]
    trains = [heads + layers * (block == 2) for block, (layers, heads) in enumerate(parts)]
    rows = MemoryPlan(plan).to_dicts()
    assert sum(row["gradients_bytes"] for row in rows) == 8 * sum(trains)
    assert sum(row["parameters_bytes"] for row in rows) == 8 * sum(map(sum, parts))
    before = sum(row["optimizer_bytes"] for row in MemoryPlan(free).to_dicts())
    tensors = sum(map(sum, parts))
    after = sum(row["optimizer_bytes"] for row in rows)
    assert after < before * (sum(trains) / tensors) * 1.1
    counted = trained(run, tmp_path, stages)["peak_memory_bytes"]
    for one, other in zip(MemoryPlan(plan).rank_memory(), counted, strict=True):
        assert abs(one.peak / other - 1) < 0.1


def test_a_plan_says_what_is_frozen() -> None:
    plan = make_plan(tiny.run(partition__frozen=True), 1)
    assert [block["frozen"] for block in plan_table(plan)["blocks"]] == [True, True, False]
    assert plan_text(plan).count("(frozen)") == 2
    assert "(frozen)" not in plan_text(make_plan(tiny.run(), 1))
