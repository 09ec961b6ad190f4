"""What a block will hold in memory, found without holding it: its layers run on fake tensors.

Fake tensors have shapes, strides and storages, but no memory, and every operation takes the way
that it takes on a CPU. (Plain meta tensors take a CUDA device's: other strides, other copies.)

Invariant: the same forward and the same pulls as in a run, watched by the same `Saved`; what looks
at values is run for real on zeros, with few rows, and carried on to many.

::

    parameters | gradients | optimizer       there all the time
    F   + kept                               of one micro-batch: x, y, what autograd saves
    B         + learning                     the head; with recomputation the interior once more
    B ends:   - both
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch, RowRandom
from dtrain.block.parameters import OptimizerFactory
from dtrain.block.saved_tensors import SavedTensors
from dtrain.objectives.base import Objective, input_gradient_blocks
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.forward import backward_pairs, forward_micro_batch
from dtrain.schedules.actions import Action, Point, Route
from dtrain.schedules.messages import count_forward_passes

BlockFactory = Callable[[], Block]
"""Returns the block anew."""


Measure = Callable[[BlockFactory, int], tuple[Block, tuple[int, ...]]]
"""Returns the block that is made, and what each forward and the learning of one micro-batch of so
many rows add."""


FEW_ROWS, MORE_ROWS = 2, 4
"""Rows of the two real runs through which a line is laid, where fake tensors cannot."""


@final
@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block.

    Attributes
    ----------
    parameters : int
        Parameters and buffers, the helper's included.
    gradients, optimizer : int
        Of what is trained; the optimizer's state after its first step.
    kept : int
        Of one micro-batch from its first forward until it is learnt.
    learning : int
        What learning it adds until it ends.
    later : tuple of int
        Of `kept`, what each forward after the first one adds.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    backward: int
    later_passes: tuple[int, ...] = ()


def measure_block_memory(
    make_real: BlockFactory,
    make_fake: BlockFactory | None,
    make_optimizer: OptimizerFactory,
    objective: Objective,
    block_specs: Sequence[BlockSpec],
    index: int,
    rows: int,
) -> BlockMemory:
    """Return what block `index` holds with micro-batches of `rows` samples.

    Parameters
    ----------
    real, fake : callable
        Make the block: for real; of fake tensors (called in their mode), None where it cannot be.
    step : callable
        Makes the block's optimizer.
    tasks : sequence of Task
        One per block of the run.

    Whatever the block's layers or the objective raise on zeros is raised.
    """
    measure = partial(_measure_block, objective, block_specs, index)
    with torch.random.fork_rng(devices=[]):
        found = None if make_fake is None else _measure_fake(measure, make_fake, rows)
        block, (*passed, learning) = found or _extrapolate(measure, make_real, rows)
        return BlockMemory(
            parameters=_nbytes(block.tensors().values()),
            gradients=_nbytes(block.trainable_parameters),
            optimizer=_optimizer_bytes(make_optimizer, block.trainable_parameters),
            activations=sum(passed),
            backward=learning,
            later_passes=tuple(passed[1:]),
        )


def _measure_fake(
    measure: Measure, make: BlockFactory, rows: int
) -> tuple[Block, tuple[int, ...]] | None:
    """Return what fake tensors tell, None where the block looks at values, which they lack."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return measure(make, rows)
    except Exception:  # of any kind; a true fault shows again for real
        return None


def _extrapolate(measure: Measure, make: BlockFactory, rows: int) -> tuple[Block, tuple[int, ...]]:
    """Return what two real runs with few rows tell, carried on to `rows`."""
    (_, few), (block, more) = measure(make, FEW_ROWS), measure(make, MORE_ROWS)
    steps = (rows - FEW_ROWS) / (MORE_ROWS - FEW_ROWS)
    return block, tuple(round(a + (b - a) * steps) for a, b in zip(few, more, strict=True))


def _measure_block(
    objective: Objective,
    block_specs: Sequence[BlockSpec],
    index: int,
    make: BlockFactory,
    rows: int,
) -> tuple[Block, tuple[int, ...]]:
    """Return the block, and the bytes that forwards and learning of one micro-batch add."""
    with torch.enable_grad():
        block = make()
        return block, _measure_passes(block, objective, block_specs, index, rows)


def _optimizer_bytes(make_optimizer: OptimizerFactory, parameters: Iterable[Tensor]) -> int:
    """Return the bytes of an optimizer's state after its first step; equal shapes have equal."""
    shapes = Counter((tensor.shape, tensor.dtype) for tensor in parameters)
    try:
        return _state_bytes(make_optimizer, shapes, "meta")
    except Exception:  # an optimizer that looks at values
        return _state_bytes(make_optimizer, shapes, "cpu")


def _state_bytes(
    make_optimizer: OptimizerFactory, shapes: Counter[tuple[torch.Size, torch.dtype]], device: str
) -> int:
    trained = [nn.Parameter(torch.zeros(s, dtype=d, device=device)) for s, d in shapes]
    if not trained:
        return 0
    for each in trained:
        each.grad = torch.zeros_like(each)
    optimizer = make_optimizer(trained)
    optimizer.step()
    return sum(
        count * _nbytes(torch.as_tensor(v) for v in optimizer.state[each].values() if v is not None)
        for each, count in zip(trained, shapes.values(), strict=True)
    )


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _measure_passes(
    block: Block, objective: Objective, block_specs: Sequence[BlockSpec], index: int, rows: int
) -> tuple[int, ...]:
    """Return the bytes that each forward of one micro-batch adds, and that learning it adds."""
    spec, routes = block_specs[index], objective.routes(len(block_specs), "train")
    block.register_taps(objective.taps(block))
    saved = SavedTensors([*block.parameters.values(), *block.buffers.values()])
    sends_gradient = index in input_gradient_blocks(routes)
    micro_batch = _zero_micro_batch(block, objective, spec, rows)
    peaks = [0]
    for pass_ in range(count_forward_passes(routes)):
        received = _received_zeros(objective, routes, block_specs, Point(index, "F", pass_), rows)
        if pass_:
            micro_batch = micro_batch.next_pass(received)
        else:
            micro_batch.received = received
        forward_micro_batch(objective, spec, block, micro_batch, sends_gradient, saved)
        peaks.append(saved.peak_bytes)
    received = _received_zeros(objective, routes, block_specs, Point(index, "B"), rows)
    micro_batch.received = {**micro_batch.received, **received}
    backward_pairs(objective, spec, block, micro_batch, saved)
    return tuple(b - a for a, b in pairwise([*peaks, saved.peak_bytes]))


def _zero_micro_batch(block: Block, objective: Objective, spec: BlockSpec, rows: int) -> MicroBatch:
    """Return a micro-batch of zeros, with the data where the objective needs them."""
    dtype = next((parameter.dtype for parameter in block.parameters.values()), spec.dtype)
    samples = raw_samples = None
    if objective.needs_samples(spec, "train"):
        samples = torch.zeros(rows, *spec.sample_shape, dtype=dtype)
        if objective.needs_raw_samples and spec.has_raw_samples:
            raw_samples = torch.zeros_like(samples)
    labels = torch.zeros(rows, dtype=torch.int64)
    return MicroBatch(
        targets=labels,
        samples=samples,
        raw_samples=raw_samples,
        indices=labels,
        row_random=RowRandom(0, spec.index, 0, rows, 0, rows),
        training=True,
        rng_key=(0, 0, 0),
    )


def _received_zeros(
    objective: Objective,
    routes: Sequence[Route],
    block_specs: Sequence[BlockSpec],
    point: Point,
    rows: int,
) -> dict[str, Tensor]:
    """Return zeros in place of what routes bring to a point."""
    shapes = {
        r.name: objective.message_spec(r, block_specs, rows) for r in routes if r.target == point
    }
    return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}


def peak_live_bytes(actions: Iterable[Action], blocks: Mapping[int, BlockMemory]) -> int:
    """Return the most bytes of live micro-batches while one rank runs a plan."""
    now = most = 0
    for action in actions:
        each = blocks[action.block] if action.kind != "U" else None
        if each is None:
            continue
        match action.kind:
            case "F":
                first, later = each.activations - sum(each.later_passes), each.later_passes
                now += later[action.pass_ - 1] if action.pass_ else first
                most = max(most, now)
            case "W":
                now -= each.activations + each.backward
            case kind:
                most = max(most, now + each.backward)
                now += -each.activations if kind == "B" else each.backward
    return most
