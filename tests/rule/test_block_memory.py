"""Measured memory of a block against the memory of real blocks, and of plans counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.block.optimizer import OptimizerSettings
from dtrain.block.saved_tensors import SavedTensors
from dtrain.models.image_layers import Convolution, PooledLinear
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.planning.block_memory import BlockMemory, measure_block_memory, peak_live_bytes
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.schedules.actions import Action
from dtrain.schedules.gpipe_1f1b import FillDrain, OneFOneB
from dtrain.schedules.message_memory import peak_message_bytes
from dtrain.schedules.stream import Stream
from dtrain.schedules.verify import verify_schedule
from tests import tiny

ROWS = 8
SPEC = BlockSpec(0, 1, (3, 8, 8), (5,), torch.float32, 5, (3, 8, 8))
STATE_TENSORS = {
    "sgd": 0,
    "adam": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "adadelta": 2,
    "adamax": 2,
}
"""Tensors of a parameter's shape that an optimizer keeps."""


class ReadsValue(nn.Module):
    """Reads a value, which fake tensors do not have."""

    def forward(self, input: Tensor) -> Tensor:
        return input * 2 if input.sum().item() >= 0 else input.exp()


class ReadsWeight(nn.Linear):
    """Reads a value when it is made, so it cannot be made without memory."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.total = self.weight.sum().item()


def layer_factories(kind: type[nn.Linear]) -> list[tuple[str, Callable[[], nn.Module]]]:
    """Return a model for the tiny data; without its middle layer the others would still fit."""
    linear = [("first", partial(nn.Linear, 10, 8)), ("middle", partial(kind, 8, 8))]
    return [("flat", nn.Flatten), *linear, ("relu", nn.ReLU), ("last", partial(nn.Linear, 8, 3))]


def plain() -> object:
    """Return a model whose layers can be made without memory."""
    return layer_factories(nn.Linear)


def reading() -> object:
    """Return the same model, with a layer that cannot."""
    return layer_factories(ReadsWeight)


def make_layers(*more: nn.Module) -> dict[str, nn.Module]:
    """Return a small network for images."""
    layers = [Convolution(3, 6, "batch", 1, True), *more, PooledLinear(6, 5)]
    return {f"l{number}": layer for number, layer in enumerate(layers)}


def measure(
    rows: int,
    *more: type[nn.Module],
    optimizer: str = "adam",
    recompute: bool = False,
    fakes: bool = True,
    is_small: bool = False,
    spec: BlockSpec = SPEC,
) -> tuple[BlockMemory, list[bool]]:
    """Return the memory of a block, and for each block that was made whether it was real."""
    make = OptimizerSettings(optimizer, {"lr": 0.1})
    are_real: list[bool] = []

    def make_block(real: bool) -> Block:
        are_real.append(real)
        return Block(0, make_layers(*(kind() for kind in more)), None, make, recompute=recompute)

    objective: Objective = OBJECTIVES["backprop"]()
    fake = partial(make_block, False) if fakes else None
    memory = measure_block_memory(
        partial(make_block, True), fake, make, objective, [spec], 0, rows, is_small
    )
    return memory, are_real


def count_activations(rows: int, *more: nn.Module) -> int:
    """Return the bytes that one micro-batch of a real block keeps."""
    block = Block(0, make_layers(*more), None, OptimizerSettings("sgd", {"lr": 0.1}))
    saved_tensors = SavedTensors([*block.parameters.values(), *block.buffers.values()])
    x, y = torch.randn(rows, 3, 8, 8), torch.zeros(rows, dtype=torch.int64)
    micro_batch = MicroBatch(x=x, targets=y, rng_key=(0, 0, 0))
    with saved_tensors.record(micro_batch):
        block.run_forward(micro_batch)
    saved_tensors.add_micro_batch(micro_batch)
    return saved_tensors.peak_bytes


@pytest.mark.parametrize("more", [(), (nn.Dropout,), (nn.GELU, nn.Tanh)])
def test_fake_tensors_keep_what_real_ones_keep(more: tuple[type[nn.Module], ...]) -> None:
    memory, are_real = measure(ROWS, *more)
    assert are_real == [False]
    assert memory.activations == count_activations(ROWS, *(kind() for kind in more))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("more", [(), (nn.Dropout,), (nn.GELU, nn.Tanh)])
def test_a_small_block_is_run_for_real_with_all_rows(
    more: tuple[type[nn.Module], ...], recompute: bool
) -> None:
    memory, are_real = measure(ROWS, *more, recompute=recompute, is_small=True)
    assert are_real == [True]
    assert memory == measure(ROWS, *more, recompute=recompute)[0]


def test_further_inputs_of_a_sample_are_part_of_a_micro_batch() -> None:
    alone, _ = measure(ROWS)
    more, _ = measure(ROWS, spec=replace(SPEC, other_inputs=(((7,), torch.int64),)))
    assert more.activations - alone.activations == ROWS * 7 * 8


def test_a_block_that_reads_values_is_run_with_few_rows_and_extrapolated() -> None:
    memory, are_real = measure(64, ReadsValue)
    assert are_real == [False, True, True]
    assert memory.activations == count_activations(64, ReadsValue())


def test_a_block_that_cannot_be_fake_is_run_for_real_at_once() -> None:
    memory, are_real = measure(64, fakes=False)
    assert are_real == [True, True]
    assert memory == measure(64)[0]


def test_a_layer_that_needs_memory_is_planned_as_one_that_does_not() -> None:
    lacking, memories = [], []
    for model in ("plain", "reading"):
        run = tiny.run(model={"name": f"tests.rule.test_block_memory:{model}"}, mesh__stages=1)
        plan = make_plan(run, 1)
        lacking.append(None in plan.layout.model.meta_layers(plan.layout.dtype))
        memories.append(MemoryPlan(plan).rank_memory())
    assert lacking == [False, True]
    assert memories[0] == memories[1]


@pytest.mark.parametrize("name", STATE_TENSORS)
def test_the_state_of_any_optimizer_is_what_it_really_keeps(name: str) -> None:
    memory, _ = measure(ROWS, optimizer=name)
    block = Block(0, make_layers(), None, OptimizerSettings(name, {"lr": 0.1}))
    block.fill_gradients()
    assert block.optimizer is not None
    block.optimizer.step()
    assert memory.optimizer == sum(tensor.nbytes for tensor in block.optimizer_state().values())
    assert memory.gradients == sum(tensor.nbytes for tensor in block.trainable_parameters)
    assert memory.optimizer >= STATE_TENSORS[name] * memory.gradients
    assert memory.parameters == sum(tensor.nbytes for tensor in block.tensors().values())


def test_recomputation_keeps_input_and_output() -> None:
    """And the buffers before the forward: two times six statistics and a count."""
    without_recomputation, _ = measure(ROWS)
    recomputed, _ = measure(ROWS, recompute=True)
    ends = ROWS * (3 * 8 * 8 + 5) * 4
    assert recomputed.activations == ends + 2 * 6 * 4 + 8
    assert (
        recomputed.activations + recomputed.backward
        >= without_recomputation.activations + without_recomputation.backward
    )


def test_live_micro_batches_add_up_in_the_order_of_the_plan() -> None:
    blocks = {0: BlockMemory(0, 0, 0, 10, 3), 1: BlockMemory(0, 0, 0, 100, 30)}

    def peak(text: str) -> int:
        actions = [Action(name[0], int(name[1]), 0, int(name[3])) for name in text.split()]
        return peak_live_bytes(actions, blocks)

    assert peak("F0.0 B0.0 F0.1 B0.1") == 13
    assert peak("F0.0 F0.1 F0.2 B0.0 B0.1 B0.2") == 33
    assert peak("F0.0 F1.0 B1.0 B0.0") == 140
    assert peak("F0.0 F0.1 I0.0 I0.1 W0.0 W0.1") == 26, "results of `I` are kept until `W`"


def test_a_later_forward_adds_its_own_part_when_it_comes() -> None:
    """7 of 10 bytes are those of a second forward: a first one may leave no graph."""
    blocks = {0: BlockMemory(0, 0, 0, 10, 5, (7,))}
    first = [Action("F", 0, 0, 0), Action("F", 0, 0, 0, 1), Action("B", 0, 0, 0)]
    second = [action._replace(micro=1) for action in first]
    assert peak_live_bytes([*first, *second], blocks) == 15
    assert peak_live_bytes([first[0], second[0], *first[1:], *second[1:]], blocks) == 3 + 15
    mixed = [first[0], second[0], first[1], second[1], first[2], second[2]]
    assert peak_live_bytes(mixed, blocks) == 25


def test_messages_are_bounded_by_the_messages_that_a_rank_can_know() -> None:
    """One receive is posted per route; two sends may wait, and fewer where gradients came back."""
    place, sizes = (0, 1, 2), [[4, 4, 4]]
    routes = OBJECTIVES["mono-forward"]().routes(3, "train")
    report = verify_schedule(Stream(), place, sizes, routes)
    assert peak_message_bytes(report.timeline, place, routes, [10, 1]) == [20, 10 + 2, 1]
    routes = OBJECTIVES["backprop"]().routes(3, "train")
    route_bytes = [10, 10, 1, 1]  # activations 0 -> 1 -> 2, gradients 1 -> 0 and 2 -> 1
    report = verify_schedule(FillDrain(), place, sizes, routes)
    assert peak_message_bytes(report.timeline, place, routes, route_bytes)[0] == 1 + 20
    report = verify_schedule(OneFOneB(), place, [[1]], routes)
    peaks = peak_message_bytes(report.timeline, place, routes, route_bytes)
    assert peaks == [1 + 10, 10 + 1 + 10, 10 + 1]
