"""Footprints against what the same block really keeps, and against plans counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dtrain.block import optimizer as optimizers
from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.block.saved_tensors import SavedTensors
from dtrain.models.image_layers import Convolution, PooledLinear
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.planning.block_memory import BlockMemory, measure_block_memory, peak_live_bytes
from dtrain.planning.memory import MemoryPlan
from dtrain.planning.plan import make_plan as planned
from dtrain.schedules.actions import Action
from dtrain.schedules.gpipe_1f1b import FillDrain, OneFOneB
from dtrain.schedules.message_memory import peak_message_bytes
from dtrain.schedules.stream import Stream
from dtrain.schedules.verify import verify_schedule
from tests import tiny

ROWS = 8
TASK = BlockSpec(0, 1, (3, 8, 8), (5,), torch.float32, 5, (3, 8, 8))
STEPS = {
    "sgd": 0,
    "adam": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "adadelta": 2,
    "adamax": 2,
}
"""Tensors of a parameter's shape that an optimizer keeps."""


class Peeking(nn.Module):
    """Looks at a value, which fake tensors do not have."""

    def forward(self, input: Tensor) -> Tensor:
        return input * 2 if input.sum().item() >= 0 else input.exp()


class Summed(nn.Linear):
    """Looks at a value where it is made, so that it cannot be made without memory."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.total = self.weight.sum().item()


def net(kind: type[nn.Linear]) -> list[tuple[str, Callable[[], nn.Module]]]:
    """Return a model for the tiny data; without its middle layer the others would still fit."""
    linear = [("first", partial(nn.Linear, 10, 8)), ("middle", partial(kind, 8, 8))]
    return [("flat", nn.Flatten), *linear, ("bend", nn.ReLU), ("last", partial(nn.Linear, 8, 3))]


def plain() -> object:
    """Return the model of layers that need no memory."""
    return net(nn.Linear)


def summed() -> object:
    """Return the same model, a layer of which does."""
    return net(Summed)


def layers(*more: nn.Module) -> dict[str, nn.Module]:
    """Return a small network for images."""
    made = [Convolution(3, 6, "batch", 1, True), *more, PooledLinear(6, 5)]
    return {f"l{number}": each for number, each in enumerate(made)}


def measured(
    rows: int,
    *more: type[nn.Module],
    step: str = "adam",
    recompute: bool = False,
    fakes: bool = True,
) -> tuple[BlockMemory, list[bool]]:
    """Return a footprint, and how often the block was made for real."""
    make = partial(optimizers.make_optimizer, step, {"lr": 0.1})
    asked: list[bool] = []

    def block(real: bool) -> Block:
        asked.append(real)
        return Block(0, layers(*(kind() for kind in more)), None, make, recompute=recompute)

    objective: Objective = OBJECTIVES["backprop"]()
    real, fake = partial(block, True), partial(block, False) if fakes else None
    return measure_block_memory(real, fake, make, objective, [TASK], 0, rows), asked


def counted(rows: int, *more: nn.Module) -> int:
    """Return what one micro-batch of a real block keeps."""
    block = Block(0, layers(*more), None, partial(optimizers.make_optimizer, "sgd", {"lr": 0.1}))
    saved = SavedTensors([*block.parameters.values(), *block.buffers.values()])
    x, y = torch.randn(rows, 3, 8, 8), torch.zeros(rows, dtype=torch.int64)
    micro_batch = MicroBatch(x=x, targets=y, rng_key=(0, 0, 0))
    with saved.record(micro_batch):
        block.run_forward(micro_batch)
    saved.add_micro_batch(micro_batch)
    return saved.peak_bytes


@pytest.mark.parametrize("more", [(), (nn.Dropout,), (nn.GELU, nn.Tanh)])
def test_fake_tensors_keep_what_real_ones_keep(more: tuple[type[nn.Module], ...]) -> None:
    found, asked = measured(ROWS, *more)
    assert asked == [False]
    assert found.activations == counted(ROWS, *(kind() for kind in more))


def test_what_looks_at_values_is_run_with_few_rows_and_carried_on() -> None:
    found, asked = measured(64, Peeking)
    assert asked == [False, True, True]
    assert found.activations == counted(64, Peeking())


def test_what_cannot_be_fake_is_run_for_real_at_once() -> None:
    found, asked = measured(64, fakes=False)
    assert asked == [True, True]
    assert found == measured(64)[0]


def test_a_layer_without_skeleton_is_planned_as_one_with_it() -> None:
    found = []
    for model in ("plain", "summed"):
        run = tiny.run(model={"name": f"tests.rule.test_footprint:{model}"}, mesh__stages=1)
        made = planned(run, 1)
        found.append(
            (
                None in made.layout.model.meta_layers(made.layout.dtype),
                MemoryPlan(made).rank_memory(),
            )
        )
    assert [lacking for lacking, _ in found] == [False, True]
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("name", STEPS)
def test_the_state_of_any_optimizer_is_what_it_really_keeps(name: str) -> None:
    found, _ = measured(ROWS, step=name)
    block = Block(0, layers(), None, partial(optimizers.make_optimizer, name, {"lr": 0.1}))
    block.gradients()
    assert block.optimizer is not None
    block.optimizer.step()
    assert found.optimizer == sum(tensor.nbytes for tensor in block.optimizer_state().values())
    assert found.gradients == sum(tensor.nbytes for tensor in block.trainable_parameters)
    assert found.optimizer >= STEPS[name] * found.gradients
    assert found.parameters == sum(tensor.nbytes for tensor in block.tensors().values())


def test_recomputation_keeps_what_enters_and_leaves() -> None:
    """And the buffers of that moment: two times six statistics and a count."""
    plain, _ = measured(ROWS)
    again, _ = measured(ROWS, recompute=True)
    ends = ROWS * (3 * 8 * 8 + 5) * 4
    assert again.activations == ends + 2 * 6 * 4 + 8
    assert again.activations + again.backward >= plain.activations + plain.backward


def test_live_micro_batches_add_up_in_the_order_of_the_plan() -> None:
    blocks = {0: BlockMemory(0, 0, 0, 10, 3), 1: BlockMemory(0, 0, 0, 100, 30)}

    def plan(words: str) -> list[Action]:
        return [Action(word[0], int(word[1]), 0, int(word[3])) for word in words.split()]

    assert peak_live_bytes(plan("F0.0 B0.0 F0.1 B0.1"), blocks) == 13
    assert peak_live_bytes(plan("F0.0 F0.1 F0.2 B0.0 B0.1 B0.2"), blocks) == 33
    assert peak_live_bytes(plan("F0.0 F1.0 B1.0 B0.0"), blocks) == 140
    # What `I` has computed is there until `W`.
    assert peak_live_bytes(plan("F0.0 F0.1 I0.0 I0.1 W0.0 W0.1"), blocks) == 26


def test_a_later_forward_adds_its_own_part_when_it_comes() -> None:
    """Of 10 bytes 7 are those of a second forward: a first one may leave no graph."""
    blocks = {0: BlockMemory(0, 0, 0, 10, 5, (7,))}
    first, again, learn = (Action(kind, 0, 0, 0, p) for kind, p in (("F", 0), ("F", 1), ("B", 0)))
    other = [first._replace(micro=1), again._replace(micro=1), learn._replace(micro=1)]
    assert peak_live_bytes([first, again, learn, *other], blocks) == 15
    assert peak_live_bytes([first, other[0], again, learn, *other[1:]], blocks) == 3 + 15
    assert peak_live_bytes([first, other[0], again, other[1], learn, other[2]], blocks) == 25


def test_messages_are_bounded_by_what_a_rank_may_know() -> None:
    """One receive is posted per route; two sends may wait, and fewer where gradients came back."""
    local, back = OBJECTIVES["mono-forward"](), OBJECTIVES["backprop"]()
    place, sizes = (0, 1, 2), [[4, 4, 4]]
    rows = local.routes(3, "train")
    seen = verify_schedule(Stream(), place, sizes, rows)
    assert peak_message_bytes(seen.timeline, place, rows, [10, 1]) == [20, 10 + 2, 1]
    rows = back.routes(3, "train")
    ways = [10, 10, 1, 1]  # activations 0 -> 1 -> 2, gradients 1 -> 0 and 2 -> 1
    drained = peak_message_bytes(
        verify_schedule(FillDrain(), place, sizes, rows).timeline, place, rows, ways
    )
    assert drained[0] == 1 + 20
    turns = peak_message_bytes(
        verify_schedule(OneFOneB(), place, [[1]], rows).timeline, place, rows, ways
    )
    assert turns == [1 + 10, 10 + 1 + 10, 10 + 1]
