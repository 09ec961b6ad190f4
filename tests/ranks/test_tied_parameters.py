"""Tied parameters without a flush: equal copies, the same bits on any ranks, and a plain loop."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError
from dtrain.planning.cost_file import read_cost_file
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.planning.report import plan_table
from tests import graph_nets, tiny
from tests.harness import assert_same_model, train_in_threads
from tests.outcome import break_off, model
from tests.ranks.test_graph_models import NETS, SETTINGS, SGD, plain_data
from tests.refusals import refuses

SCHEDULES: dict[str, dict[str, Any]] = {
    "flush": {"schedule": {"name": "1f1b"}, "micro_batches": 2, "batch_size": 10},
    "pipelined": {"schedule": {"name": "pipelined"}},
    "stash": {"schedule": {"name": "pipelined", "weights": "stash"}},
    "pipedream": {"schedule": {"name": "pipedream"}},
    "dfa": {"schedule": {"name": "pipelined"}, "objective__name": "dfa"},
    "vertical": {"schedule": {"name": "pipedream", "vertical-sync": True}},
    "2bw": {"schedule": {"name": "pipedream-2bw"}, "micro_batches": 2, "batch_size": 10},
}
COSTS = """
multiply-adds-per-s = 1e9
[links.intra-node]
bytes-per-s = 1e9
latency-s = 1e-6
"""
LATE = [name for name in SCHEDULES if name != "flush"]


def tied_run(net: str, schedule: str, **changes: Any) -> Any:
    """Return a run of a net with ties, in two epochs of ten updates of five samples."""
    table = {
        "model": {"name": f"tests.graph_nets:{net}"},
        "partition": {"cuts": list(NETS.get(net, ()))},
        "objective__name": "backprop",
        "micro_batches": 1,
        "batch_size": 5,
    }
    return tiny.run(**deepcopy(table | SETTINGS.get(net, {}) | SCHEDULES[schedule] | changes))


@pytest.mark.parametrize("schedule", LATE)
def test_copies_stay_equal_and_ranks_change_no_bit(schedule: str, tmp_path: Path) -> None:
    """Also in segments of 3, 3 and 2 updates, and with a replica that has none of the last one's
    samples. `dfa` updates both blocks in the same cycle."""
    changes = {"optimizer": {"name": "adamw", "lr": 0.01}, "segment": 3, "batch_size": 7}
    digests = set()
    for stages, replicas in ((1, 1), (3, 1), (1, 2), (2, 2)):
        out = tmp_path / f"{stages} {replicas}"
        config = tied_run("tied", schedule, mesh__stages=stages, **changes)
        summary = train_in_threads(config, out, stages=stages, replicas=replicas)
        tensors = model(out)
        assert torch.equal(tensors["first.weight"], tensors["last.weight"])
        digests.add((replicas, summary["digest"]))
    assert len(digests) == 2


@pytest.mark.parametrize("schedule", ["flush", "pipedream"])
def test_the_optimizer_treats_all_copies_alike(schedule: str, tmp_path: Path) -> None:
    """The embedding's copy in the head is no matrix for muon, and is decayed as an embedding is."""
    rest = {"name": "adamw", "lr": 0.01, "weight-decay": 0.1}
    optimizer = {"name": "muon", "lr": 0.01, "no-decay": ["embedding"], "rest": rest}
    config = tied_run("language_model", schedule, optimizer=optimizer)
    train_in_threads(config, tmp_path, stages=2)
    tensors = model(tmp_path)
    assert torch.equal(tensors["embedding.weight"], tensors["head.weight"])


@pytest.mark.parametrize("schedule", ["stash", "2bw"])
def test_several_copies_on_a_rank_change_no_bit(schedule: str, tmp_path: Path) -> None:
    """A layer in three blocks out of five, of which one rank holds two."""
    changes = {"partition": {"cuts": ["1", "2", "3", "4"]}, "segment": 7}
    changes |= {"micro_batches": 4} if schedule == "2bw" else {}
    config = tied_run("thrice", schedule, **changes)
    digests = {
        train_in_threads(config, tmp_path / str(stages), stages=stages)["digest"]
        for stages in (1, 2, 5)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("schedule", ["pipelined", "pipedream"])
def test_a_resumed_run_equals_an_uninterrupted_one(schedule: str, tmp_path: Path) -> None:
    config = tied_run("tied", schedule, segment=4)
    train_in_threads(config, tmp_path / "whole", stages=3)
    train_in_threads(config, tmp_path / "broken", stages=2)
    break_off(tmp_path / "broken", 12)
    train_in_threads(config, tmp_path / "broken", stages=3)
    assert_same_model(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    ("schedule", "delay", "lag"), [("pipelined", 2, 2), ("stash", 2, 2), ("pipedream", 1, 1)]
)
def test_two_blocks_equal_a_plain_loop(schedule: str, delay: int, lag: int, tmp_path: Path) -> None:
    changes = {"optimizer": SGD, "partition": {"cuts": ["middle"]}}
    train_in_threads(tied_run("tied", schedule, **changes), tmp_path, stages=2)
    expected, tensors = plain_loop(delay, lag), model(tmp_path)
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-12, atol=1e-12)


def plain_loop(delay: int, lag: int) -> dict[str, Tensor]:
    """Train the tied net in two blocks: `first`, and all other layers.

    A forward of block 0 uses the weights of `delay` updates ago; its gradient of the tied weight is
    added `lag` updates later. What is left at the end of an epoch is one more step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = graph_nets.TiedNet(3).double()
    [inputs], targets = plain_data("tied")
    weight, bias = net.first.weight, net.first.bias
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        late: list[Tensor] = []
        versions: list[tuple[Tensor, Tensor]] = []
        for update, rows in enumerate(torch.from_numpy(epoch_order(50, 3, epoch)).split(5)):
            versions.append((weight.detach().clone(), bias.detach().clone()))
            old = [p.clone().requires_grad_() for p in versions[max(0, update - delay)]]
            h = torch.tanh(nn.functional.linear(inputs[rows].flatten(1), *old))
            output = net.head(torch.tanh(net.last(torch.tanh(net.middle(h)))))
            optimizer.zero_grad()
            cross_entropy(output, targets[rows]).backward()
            gradient, bias.grad = old[0].grad, old[1].grad
            assert gradient is not None
            assert weight.grad is not None
            late.append(gradient)
            if update >= lag:
                weight.grad += late[update - lag]
            optimizer.step()
        optimizer.zero_grad()
        weight.grad = torch.stack(late[-lag:]).sum(0)
        optimizer.step()
    return {**net.state_dict()}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2])
def test_bytes_and_memory_are_those_of_the_plan(schedule: str, stages: int, tmp_path: Path) -> None:
    """Bytes exactly, as the time estimate counts them for one epoch, too; memory within 10 %, since
    timing decides which messages are in flight."""
    (tmp_path / "costs.toml").write_text(COSTS)
    costs = read_cost_file(tmp_path / "costs.toml")
    config = tied_run("tied", schedule, mesh__stages=stages)
    plan = make_plan(config, stages)
    summary = train_in_threads(config, tmp_path / "out", stages=stages)
    table = plan_table(plan, costs)
    messages = [row for row in table["messages"] if row["wire"]]
    tied = [row for row in messages if row["per"] == "update"]
    assert [row["bytes"] for row in tied] == [10 * 10 * 8] * (2 if stages > 1 else 0)
    per_sample = sum(row["bytes"] for row in messages if row["per"] == "micro-batch") // (
        plan.batch_splitter.largest_micro_batch
    )
    sent = summary["samples"] * per_sample + summary["updates"] * sum(r["bytes"] for r in tied)
    assert summary["bytes_intra_node"] == sent
    assert 2 * table["prediction"]["links"]["intra-node"]["bytes"] == sent
    for memory, counted in zip(
        MemoryPlan(plan).rank_memory(), summary["peak_memory_bytes"], strict=True
    ):
        assert memory.peak == pytest.approx(counted, rel=0 if stages == 1 else 0.1)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model.tied-schedule", {"objective__name": "local-head"}),
        ("model.tied-delays", {"schedule__prediction": "velocity"}),
        ("model.tied-delays", {"schedule__compensation": "spike"}),
        ("model.tied-skip", {"numerics": {"non-finite": "skip-update"}}),
        ("model.tied-diverging-sync", {"sync": {"name": "local-sgd"}}),
        ("model.tied-sync", {"sync": {"name": "terngrad"}}),
        ("model.tied-clip", {"optimizer__clip": 1.0}),
    ],
)
def test_what_cannot_keep_copies_equal_is_refused(
    key: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with refuses(ConfigError, key):
        train_in_threads(tied_run("tied", "pipelined", optimizer=SGD, **changes), tmp_path)


def test_a_tied_parameter_that_is_not_trained_sends_nothing() -> None:
    config = tied_run("tied", "pipelined", partition={"cuts": ["middle"], "frozen": [0, 1]})
    plan = make_plan(config, 2)
    assert not list(plan.layout.tied_messages())
