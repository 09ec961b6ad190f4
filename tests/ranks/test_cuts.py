"""Cuts that a function chooses, cuts of equal memory or time, and the list of layers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtrain.checkpoint.same_run import check_same_run
from dtrain.comm.backends.threads import run_ranks
from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError, DataError, DtrainError
from dtrain.planning.layer_list import LayerList, LayerSpec, list_layers
from dtrain.planning.layout import make_block_costs
from dtrain.planning.memory_costs import MemoryCosts
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import load_run, make_plan
from dtrain.session.measured_cuts import settle_cuts
from tests import tiny
from tests.graph_nets import SkipNet
from tests.ranks.test_memory import make_run
from tests.refusals import refuses
from tests.single import one_thread  # noqa: F401

HERE = "tests.ranks.test_cuts"


def cut(function: Callable[..., Any] | str, blocks: int | None = 3) -> RunConfig:
    """Return the tiny run of five layers with a cut function."""
    run = tiny.run(partition={} if blocks is None else {"blocks": blocks})
    return replace(run, partition=replace(run.partition, cuts=function))


# ---- a function


def at_the_end(layers: list[LayerSpec], blocks: int) -> list[str]:
    """Return cuts before the last layers."""
    return [layer.name for layer in layers[len(layers) - blocks + 1 :]]


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_function_chooses_the_cuts(blocks: int) -> None:
    """By name, by number, as an array, and named in the run file: the same resolved run."""
    functions: list[Callable[..., Any] | str] = [
        at_the_end,
        lambda layers, blocks: list(range(len(layers) - blocks + 1, len(layers))),
        lambda layers, blocks: tuple(range(len(layers) - blocks + 1, len(layers))),
        lambda layers, blocks: np.arange(len(layers) - blocks + 1, len(layers)),
        f"{HERE}:at_the_end",
    ]
    plans = [make_plan(cut(function, blocks), 1) for function in functions]
    named = tiny.run(partition={"blocks": blocks, "cuts": f"{HERE}:at_the_end"})
    plans.append(make_plan(named, 1))
    names = ("fc2", "fc3", "fc4", "head")
    for plan in plans:
        assert plan.layout.cuts == tuple(range(6 - blocks, 5))
        table = plan.run.to_table()["partition"]
        assert table["cuts"] == names[len(names) - blocks + 1 :]
        assert not {"blocks", "balance"} & table.keys()
    assert cut(at_the_end).to_table()["partition"]["cuts"] == f"{HERE}:at_the_end"


def test_the_number_of_stages_is_the_number_of_blocks_unless_the_run_or_places_say_it() -> None:
    assert len(make_plan(cut(at_the_end, None), 2).layout.block_layouts) == 2
    run = cut(at_the_end, None)
    run = replace(run, partition=replace(run.partition, places=(0, 1, 1, 0)))
    assert make_plan(run, 2).layout.cuts == (2, 3, 4)


def test_a_function_gets_sizes_and_costs_of_the_layers() -> None:
    given: list[LayerSpec] = []

    def by_parameters(layers: list[LayerSpec], blocks: int) -> list[int]:
        given.extend(layers)
        assert blocks == 3
        sums = list(itertools.accumulate(layer.parameters for layer in layers))
        return [
            1 + next(i for i, total in enumerate(sums) if total * blocks >= sums[-1] * block)
            for block in range(1, blocks)
        ]

    plan = make_plan(cut(by_parameters), 1)
    assert [layer.name for layer in given] == [spec.name for spec in plan.layout.layer_specs]
    assert given[0].input_shape == (2, 5)
    assert [layer.output_shape for layer in given] == [(13,), (11,), (7,), (6,), (3,)]
    assert [layer.parameters for layer in given] == [143, 154, 84, 48, 21]
    assert given[1].flops == 2 * 3 * 13 * 11
    assert given[0].activation_bytes == 13 * 8
    assert (given[1].cut_bytes, given[1].cut_tensors, given[1].skips) == (13 * 8, 1, ())
    assert LayerSpec("a", (1,), (2,), 3, 4, 5).can_cut


@pytest.mark.parametrize(
    ("result", "key"),
    [
        (None, "partition.function-result"),
        ("fc2", "partition.function-result"),
        ([1.5, 2], "partition.function-result"),
        ([True, 2], "partition.function-result"),
        (["fc2"], "partition.function-count"),
        (["fc2", "fc3", "fc4"], "partition.function-count"),
        (["fc2", "fc9"], "partition.unknown-layer"),
        ([0, 2], "partition.cut-out-of-range"),
        ([2, 5], "partition.cut-out-of-range"),
        (["fc3", "fc2"], "partition.cuts-not-ascending"),
        ([2, 2], "partition.cuts-not-ascending"),
    ],
)
def test_a_result_that_is_no_list_of_cuts_is_refused(result: object, key: str) -> None:
    with refuses(ConfigError, key):
        make_plan(cut(lambda layers, blocks: result), 1)


@pytest.mark.parametrize(
    ("partition", "key"),
    [
        ({"blocks": 3, "cuts": "fc2"}, "partition.cuts-text"),
        ({"blocks": 3, "cuts": f"{HERE}:nothing"}, "user-code.no-function"),
        ({"blocks": 3, "cuts": f"{HERE}:at_the_end", "weights": [1, 1, 1]}, None),
        ({"cuts": f"{HERE}:at_the_end", "balance": "flops"}, "partition.cuts-exclude-balance"),
        ({"cuts": 3}, "run-file.wrong-type"),
    ],
)
def test_a_cut_function_in_a_run_file_is_checked(
    partition: dict[str, Any], key: str | None
) -> None:
    with refuses(ConfigError, key or "partition.function-excludes-weights"):
        make_plan(tiny.run(partition=partition), 1)


def test_a_function_may_raise_what_it_likes() -> None:
    def fails(layers: list[LayerSpec], blocks: int) -> list[int]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_plan(cut(fails), 1)


def test_a_run_is_resumed_with_the_cuts_that_the_function_returned() -> None:
    saved = make_plan(cut(at_the_end), 1).run.to_table()
    check_same_run(Path("out"), saved, make_plan(cut(at_the_end), 1).run)
    check_same_run(Path("out"), saved, make_plan(cut(at_the_end, None), 3).run)
    with refuses(ConfigError, "resume.settings-changed"):
        check_same_run(Path("out"), saved, make_plan(cut(lambda layers, blocks: [1, 2]), 1).run)
    # Without `blocks` and on other ranks: as many as the checkpoint has.
    run = cut(at_the_end, None).with_checkpoint_blocks(saved)
    check_same_run(Path("out"), saved, make_plan(run, 1).run)


# ---- memory


NETS = [("mlp", "backprop"), ("mlp", "local-head"), ("drop", "mono-forward"), ("resnet", "dni")]


def block_bytes(run: RunConfig) -> list[int]:
    """Return the bytes of every block that `block_memory` measures."""
    rows = -(-run.settings.batch_size // run.settings.micro_batches)
    memory = MemoryPlan(make_plan(run, 1)).block_memory(rows)
    return [m.parameters + m.gradients + m.optimizer + m.activations + m.backward for m in memory]


def memory_run(net: str, objective: str, **partition: Any) -> RunConfig:
    """Return a run whose blocks have parameters and activations of similar size."""
    return make_run(net, objective, "drained", mesh__stages=1, partition=partition)


@pytest.mark.parametrize(("net", "objective"), NETS)
def test_bytes_of_blocks_are_close_to_those_of_the_memory_plan(net: str, objective: str) -> None:
    run = memory_run(net, objective, blocks=3, balance="memory")
    _, model, data_spec = load_run(run)
    costs = MemoryCosts(run, make_block_costs(run, model, data_spec))
    layout = make_plan(run, 1).layout
    for block, measured in zip(layout.block_layouts, block_bytes(run), strict=True):
        assert 0.8 < costs(block.layers.start, block.layers.stop) / measured < 1.3


@pytest.mark.parametrize(
    ("net", "objective", "blocks"),
    [("mlp", "backprop", 3), ("mlp", "local-head", 2), ("drop", "mono-forward", 2)],
)
def test_memory_balances_the_largest_block(net: str, objective: str, blocks: int) -> None:
    """It is as small as for the best of all cuts, up to the approximation."""
    chosen = max(block_bytes(memory_run(net, objective, blocks=blocks, balance="memory")))
    layers = len(make_plan(memory_run(net, objective, blocks=1), 1).layout.layer_specs)
    choices = itertools.combinations(range(1, layers - 1), blocks - 1)
    all_cuts = [memory_run(net, objective, cuts=list(cuts)) for cuts in choices]
    best = min(max(block_bytes(run)) for run in all_cuts)
    assert best <= chosen <= 1.05 * best


def test_memory_cuts_do_not_depend_on_the_ranks() -> None:
    run = tiny.run(partition={"blocks": 3, "balance": "memory"}, mesh__stages=1)
    assert len({make_plan(run, ranks).layout.cuts for ranks in (1, 2, 4)}) == 1


# ---- time


class Slow(nn.Linear):
    """A layer with few multiply-adds that takes long."""

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_meta:
            time.sleep(0.02)
        return super().forward(input)


def slow_net() -> nn.Sequential:
    """Return a net whose first two layers take almost all the time, and the others the flops."""
    wide = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)]
    return nn.Sequential(nn.Flatten(), Slow(10, 4), Slow(4, 64), *wide, nn.Linear(64, 3))


def slow_run(**partition: Any) -> RunConfig:
    return tiny.run(
        model={"name": f"{HERE}:slow_net"},
        objective__name="backprop",
        partition={"balance": "time", **partition},
    )


def test_time_is_measured_by_rank_0_and_written_as_cuts() -> None:
    """The slow layers are apart, on all ranks, and the resolved run has explicit cuts."""
    runs = run_ranks(3, lambda comm: settle_cuts(slow_run(blocks=2), comm))
    assert {run.partition.explicit_cuts for run in runs} == {("2",)}
    plan = make_plan(runs[0], 2)
    assert plan.layout.cuts == (2,)
    assert make_plan(slow_run(blocks=2, balance="flops"), 2).layout.cuts == (4,)
    table = plan.run.to_table()["partition"]
    assert not {"balance", "blocks"} & table.keys()
    assert len(make_plan(settled(slow_run(), 3), 3).layout.block_layouts) == 3


def settled(run: RunConfig, ranks: int, table: dict[str, Any] | None = None) -> RunConfig:
    """Return a run with measured cuts, as one process plans it for `ranks`."""
    run = run.with_checkpoint_blocks(table)
    return run_ranks(1, lambda comm: settle_cuts(run, comm, ranks))[0]


def test_a_resumed_run_keeps_the_cuts_that_were_measured() -> None:
    saved = make_plan(slow_run().with_cuts(["4"]), 2).run.to_table()
    for blocks in ({}, {"blocks": 2}):
        resumed = settled(slow_run(**blocks), 2, saved)
        check_same_run(Path("out"), saved, make_plan(resumed, 2).run)
    with refuses(ConfigError, "resume.settings-changed"):
        check_same_run(Path("out"), saved, make_plan(settled(slow_run(blocks=3), 2, saved), 1).run)


def test_time_needs_a_measurement() -> None:
    with refuses(ConfigError, "partition.time-not-measured"):
        make_plan(slow_run(blocks=2), 2)
    for partition in ({"blocks": 2}, {"cuts": [2]}):
        run = tiny.run(partition=partition)
        assert settled(run, 2) is run


@pytest.mark.parametrize("net", ["skips", "recurrent", "lazy", "language_model"])
def test_time_is_measured_for_any_model(net: str) -> None:
    from tests.ranks.test_graph_models import run as graph_run

    run = graph_run(net, partition={"blocks": 2, "balance": "time"})
    [name] = settled(run, 1).partition.explicit_cuts or ()
    assert name in [spec.name for spec in make_plan(settled(run, 1), 1).layout.layer_specs]


def test_an_error_of_the_measurement_is_raised_on_all_ranks() -> None:
    def work(comm: Any) -> str:
        with pytest.raises(DtrainError) as error:
            settle_cuts(slow_run(blocks=20), comm)
        return error.value.key

    assert run_ranks(2, work) == ["partition.blocks-out-of-range"] * 2


# ---- the list of layers


def make_net(width: int = 12) -> nn.Sequential:
    """Return a small net with an inner container."""
    inner = nn.Sequential(nn.Linear(width, width), nn.Tanh())
    return nn.Sequential(nn.Flatten(), nn.Linear(10, width), inner, nn.Linear(width, 3))


PAIRS = [("a", partial(nn.Linear, 10, 12)), ("b", partial(nn.Linear, 12, 3))]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (make_net, "0 1 2 3"),
        (make_net(), "0 1 2 3"),
        (f"{HERE}:make_net", "0 1 2 3"),
        (PAIRS, "a b"),
        (lambda shape, classes: make_net(), "0 1 2 3"),
        (partial(make_net, 12), "0 1 2 3"),
    ],
)
def test_layers_of_every_form_of_a_model(model: Any, names: str) -> None:
    for example in (torch.zeros(1, 10), np.zeros((2, 10)), [[0.0] * 10]):
        layers = list_layers(model, example)
        assert [layer.name for layer in layers] == names.split()
        assert (layers[0].can_cut, layers[0].cut_bytes) == (False, 0)
        assert (layers[-1].cut_bytes, layers[-1].cut_tensors) == (12 * 4, 1)
    assert isinstance(layers, LayerList)
    text = str(layers).splitlines()
    assert len(text) == len(layers) + 2
    assert [line.split()[1] for line in text[1:-1]] == names.split()


def test_containers_are_opened_on_request() -> None:
    names = [layer.name for layer in list_layers(make_net, torch.zeros(1, 10), open=["2"], width=4)]
    assert names == ["0", "1", "2.0", "2.1", "3"]


def test_a_module_is_not_changed_by_looking_at_it() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    list_layers(module, torch.ones(2, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_skips_travel_across_a_cut() -> None:
    layers = {layer.name: layer for layer in list_layers(SkipNet(3), torch.zeros(2, 2, 5))}
    sample = 2 * 6 * 4
    assert (layers["mid"].cut_bytes, layers["mid"].cut_tensors) == (sample, 1)
    assert (layers["deep"].cut_bytes, layers["deep"].skips) == (2 * sample, ("down",))
    assert (layers["up"].cut_tensors, len(layers["up"].skips)) == (2, 1)
    assert "down" in str(list_layers(SkipNet(3), torch.zeros(2, 2, 5)))


def test_several_inputs_and_integers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(5, 4), nn.Linear(6, 2)

        def forward(self, tokens: Tensor, numbers: Tensor) -> Tensor:
            return self.out(torch.cat([self.embedding(tokens).mean(1), numbers], 1))

    example = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2)
    assert [layer.name for layer in list_layers(Two, example)] == ["embedding", "out"]


class Rounding(nn.Module):
    """Returns integers, behind which no block can end."""

    def forward(self, input: Tensor) -> Tensor:
        return input.round().long()


def test_a_cut_behind_integers_is_impossible() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Rounding(), nn.Embedding(5, 2))
    assert [layer.can_cut for layer in list_layers(net, torch.zeros(1, 4))] == [False, True, False]


@pytest.mark.parametrize("example", [torch.zeros(0, 4), torch.tensor(1.0)])
def test_an_example_needs_rows(example: Tensor) -> None:
    with refuses(DataError, "layers.example-empty"):
        list_layers(make_net, example)


def test_activation_bytes_are_what_autograd_keeps() -> None:
    """Input of the block and the sum over its layers: what one block of all layers keeps."""
    modules: Sequence[nn.Module] = (nn.Linear(10, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))
    module, kept = nn.Sequential(*modules), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.randn(8, 10))
    measured = sum(size for key, size in kept.items() if key not in weights)
    layers = list_layers(module, torch.zeros(2, 10))
    assert 8 * (10 * 4 + sum(layer.activation_bytes for layer in layers)) == pytest.approx(
        measured, rel=0.1
    )
