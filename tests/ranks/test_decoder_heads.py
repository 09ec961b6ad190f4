"""Local heads of sequences over whole runs: decoder heads, and the objectives on positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dtrain.config.run import RunConfig
from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError
from dtrain.objectives.common.decoder_head import DecoderHead
from dtrain.objectives.local_head import LocalHead
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.planning.warnings import plan_warnings
from dtrain.rng import seeded
from tests import tiny
from tests.graph_nets import LENGTH, VOCABULARY, tokens
from tests.harness import assert_close_model, assert_same_model, train_in_threads
from tests.outcome import model
from tests.refusals import refuses
from tests.rule.warning_numbers import numbers_in

WIDTH = 8
DECODER = {"name": "local-head", "head": "decoder"}
SHARED = DECODER | {"output": "shared", "refresh": 2, "private-layers": 1}


def run_of(objective: dict[str, Any], **changes: Any) -> RunConfig:
    """Return a run of a causal transformer: three blocks, four updates an epoch."""
    return tiny.run(
        objective=objective,
        **{
            "data": {"name": "tests.graph_nets:tokens"},
            "task": {"classes-last": True},
            "model": {"name": "tests.sequence_nets:transformer"},
            "partition": {"cuts": [2, 4]},
            **changes,
        },
    )


def test_a_shared_head_trains_what_a_plain_loop_trains(tmp_path: Path) -> None:
    """Block after block, each by its own loss; the copies are the model's head of updates 0 and 2
    of a segment, 2 updates later in block 1 and 3 in block 0."""
    run = run_of(SHARED, optimizer={"name": "sgd", "lr": 0.1})
    train_in_threads(run, tmp_path, 3)
    plan = make_plan(run, 1)
    inputs, targets = (torch.from_numpy(part).long() for part in tokens()[:2])
    layers = plan.layout.model.build(range(6), run.settings.seed, torch.float64)
    parts = [["embedding", "layer1"], ["layer2", "layer3"], ["layer4", "head"]]
    blocks = [nn.Sequential(*(layers[name] for name in names)) for names in parts]
    heads: list[nn.Module] = []
    for spec in plan.layout.block_specs[:2]:
        with seeded(run.settings.seed, f"heads.{spec.index}"):
            heads.append(run.objective.instance.build_head(spec).to(torch.float64))
    optimizers = [
        torch.optim.SGD([*block.parameters(), *(heads[b].parameters() if b < 2 else ())], lr=0.1)
        for b, block in enumerate(blocks)
    ]
    for epoch in range(2):
        sent: dict[int, dict[str, torch.Tensor]] = {}
        for update, start in enumerate(range(0, 50, 16)):
            batch = epoch_order(50, 3, epoch)[start : start + 16]
            x, y = (part[batch] for part in (inputs, targets))
            for b, block in enumerate(blocks):
                x = block(x.detach())
                scores = heads[b](x) if b < 2 else x
                optimizers[b].zero_grad()
                cross_entropy(scores.movedim(-1, 1), y).backward()
                optimizers[b].step()
            if update % 2 == 0:
                head = layers["head"].state_dict()
                sent[update] = {name: tensor.clone() for name, tensor in head.items()}
            for b, lag in ((1, 2), (0, 3)):
                if update - lag in sent:
                    head_module = heads[b]
                    assert isinstance(head_module, DecoderHead)
                    head_module.output.load_state_dict(sent[update - lag])
    modules = {**layers, "heads": nn.ModuleList(heads)}
    for name, tensor in model(tmp_path).items():
        layer, _, parameter = name.partition(".")
        expected = dict(modules[layer].named_parameters())[parameter].detach()
        torch.testing.assert_close(tensor, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("schedule", "lag", "messages"), [("stream", 2, 2), ("1f1b", 1, 3), ("drained", 0, 4)]
)
def test_any_number_of_ranks_trains_the_same_bits(
    schedule: str, lag: int, messages: int, tmp_path: Path
) -> None:
    """Law 1; the bytes sent are those of activations and of the head's messages in an epoch.

    It has 4 updates, of which 0 and 2 send, to block 1 with the lag and to block 0 with one more.
    """
    run = run_of(SHARED | {"lag": lag}, schedule={"name": schedule})
    one = train_in_threads(run, tmp_path / "1", 1)
    two = train_in_threads(run, tmp_path / "2", 2)
    three = train_in_threads(run, tmp_path / "3", 3)
    assert len({summary["digest"] for summary in (one, two, three)}) == 1
    head = 2 * WIDTH + (WIDTH + 1) * VOCABULARY
    activations = 2 * 2 * 50 * LENGTH * WIDTH  # of two epochs, at two borders
    assert three["bytes_intra_node"] == 8 * (activations + 2 * messages * head)


def test_replicas_and_micro_batches_train_the_same_model(tmp_path: Path) -> None:
    one, four = (
        run_of(SHARED, optimizer={"name": "sgd", "lr": 0.1}, micro_batches=micros, mesh__stages=2)
        for micros in (1, 4)
    )
    train_in_threads(one, tmp_path / "one", 2)
    train_in_threads(four, tmp_path / "four", 2, 2)
    assert_close_model(tmp_path / "one", tmp_path / "four")


@pytest.mark.parametrize("shared", [False, True])
def test_the_planned_memory_is_the_counted_memory(shared: bool, tmp_path: Path) -> None:
    objective = SHARED if shared else DECODER
    net = {"name": "tests.sequence_nets:transformer", "width": 24}
    run = run_of(objective, model=net, micro_batches=1, epochs=1)
    counted = train_in_threads(run, tmp_path, 3)["peak_memory_bytes"]
    planned = [memory.peak for memory in MemoryPlan(make_plan(run, 3)).rank_memory()]
    assert planned == pytest.approx(counted, rel=0.1)


def test_a_resumed_run_has_the_heads_of_the_whole_one(tmp_path: Path) -> None:
    train_in_threads(run_of(SHARED), tmp_path / "whole", 2)
    train_in_threads(run_of(SHARED, epochs=1), tmp_path / "parts", 3)
    train_in_threads(run_of(SHARED), tmp_path / "parts", 2)
    assert_same_model(tmp_path / "whole", tmp_path / "parts")


POSITIONS: dict[str, dict[str, Any]] = {
    "linear": {"name": "local-head"},
    "mlp": {"name": "local-head", "head": "dgl", "norm": "none"},
    "own": DECODER | {"private-layers": 2},
    "mono-forward": {"name": "mono-forward"},
    "infopro": {"name": "infopro", "norm": "none"},
    "dfa": {"name": "dfa", "per-position": True},
}


@pytest.mark.parametrize("name", POSITIONS)
def test_objectives_learn_tokens_whatever_the_ranks(name: str, tmp_path: Path) -> None:
    """The same bits on 1 and 3 ranks, also where some targets are ignored; the loss falls."""
    run = run_of(
        POSITIONS[name],
        task={"classes-last": True, "ignore-index": 3},
        schedule={"name": "drained" if name == "dfa" else "stream"},
        epochs=3,
        optimizer={"name": "adam", "lr": 0.02},
    )
    one = train_in_threads(run, tmp_path / "1", 1)
    three = train_in_threads(run, tmp_path / "3", 3)
    assert one["digest"] == three["digest"]
    assert three["test_loss"] < 2.2  # log 11 = 2.40


# Heads


def head_of(block: int, cuts: tuple[int, ...] = (2, 4), **fields: Any) -> DecoderHead:
    """Return the head of an earlier block of the tiny transformer."""
    splits = fields.pop("splits_head", False)
    net = {"name": "tests.sequence_nets:transformer", "splits-head": splits}
    run = run_of(DECODER | fields, model=net, partition={"cuts": [*cuts]})
    head = run.objective.instance.build_head(make_plan(run, 1).layout.block_specs[block])
    assert isinstance(head, DecoderHead)
    return head


@pytest.mark.parametrize(("block", "count"), [(0, 0), (0, 2), (1, 3)])
def test_private_layers_are_like_those_that_follow(block: int, count: int) -> None:
    """In their order and over again, each with weights of its own; a norm before the head, too."""
    head = head_of(block, **{"private-layers": count})
    plain = [type(layer).__name__ for layer in (*head.layers, head.output)]
    assert plain == [*["Layer"] * count, "Output"]
    split = head_of(block, **{"private-layers": count}, splits_head=True)
    names = [type(layer).__name__ for layer in (*split.layers, split.output)]
    assert names == [*["Layer"] * count, "LayerNorm", "Linear"]
    weights = [layer.down.weight for layer in head.layers]
    assert len({float(weight[0, 0].detach()) for weight in weights}) == count


def test_a_shared_output_starts_as_the_models_own_and_is_frozen() -> None:
    shared, own = (head_of(0, output=output) for output in ("shared", "own"))
    run = run_of(DECODER)
    head = make_plan(run, 1).layout.model.build([5], run.settings.seed, torch.float64)["head"]
    for ours, theirs in zip(shared.output.parameters(), head.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert not torch.equal(next(own.output[1].parameters()), head[1].weight)  # type: ignore[index]


def test_a_head_that_cannot_work_is_refused() -> None:
    with refuses(ConfigError, "objective.private-layers-negative"):
        LocalHead("decoder", private_layers=-1)
    with refuses(ConfigError, "objective.refresh-too-small"):
        LocalHead("decoder", output="shared", refresh=0)
    with refuses(ConfigError, "objective.shared-output-needs-decoder"):
        LocalHead(output="shared")
    with refuses(ConfigError, "schedule.route-unsupported"):
        make_plan(run_of(SHARED | {"lag": 1}, schedule={"name": "stream"}), 3)
    assert LocalHead("decoder", output="shared", lag=1).default_schedule == "drained"
    with refuses(ConfigError, "objective.decoder-without-layers"):
        make_plan(run_of(DECODER, partition={"cuts": [1]}, model={**NARROW, "layers": 0}), 1)
    with refuses(ConfigError, "objective.decoder-shape"):
        make_plan(tiny.run(objective=DECODER, partition={"cuts": [1, 2]}), 1)


NARROW: dict[str, Any] = {"name": "tests.sequence_nets:transformer"}


def test_a_head_over_a_vocabulary_that_costs_more_than_its_block_is_warned_of() -> None:
    """Only where it does; with the parameters, multiply-adds and bytes of both."""
    net = {"name": "tests.sequence_nets:transformer", "vocabulary": 300}
    run = run_of(
        {"name": "mono-forward"}, model=net, data={"name": "tests.sequence_nets:many_tokens"}
    )
    layout = make_plan(run, 1).layout
    block = layout.block_layouts[1]
    macs = 3 * LENGTH * WIDTH * 300  # forward, weights and output of the block
    assert (block.head_parameters, block.head_cost) == (WIDTH * 300, macs)
    [warning] = [line for line in plan_warnings(make_plan(run, 1)) if "classes at each" in line]
    expected = {f"{n:,}" for n in (WIDTH * 300, macs, LENGTH * 300 * 8, LENGTH * WIDTH * 8)}
    assert expected <= numbers_in(warning)
    wide = {"name": "tests.sequence_nets:transformer", "width": 24}
    lines = plan_warnings(make_plan(run_of({"name": "mono-forward"}, model=wide), 1))
    assert not [line for line in lines if "classes at each" in line]
