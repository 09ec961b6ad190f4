"""BlockMemory: the bytes that a block will need, measured on fake tensors.

Fake tensors have shapes, strides and storages but no memory, and operations on them behave as on a
CPU. (Plain meta tensors behave as on a CUDA device: other strides, other copies.)

Invariant: the forward and the backward pairs are those of training, counted by the same
`SavedTensors`. A block that reads values is run for real on zeros with few rows, and the bytes are
extrapolated.

::

    parameters | gradients | optimizer       all the time
    F   + activations                        of one micro-batch: x, y, what autograd saves
          - released                         what is computed again, under `petra`
    B         + backward                     the head; with recomputation the interior once more
    B ends:   - all
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
from dtrain.block.optimizer import NamedParameter, OptimizerFactory, OptimizerSettings
from dtrain.block.saved_tensors import SavedTensors
from dtrain.eager_torch import defer_dynamo
from dtrain.errors import ConfigError
from dtrain.models.compiled import without_compiling
from dtrain.objectives.base import Objective, input_gradient_blocks
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.forward import backward_pairs, forward_micro_batch
from dtrain.objectives.messages import all_routes, message_spec, reads_samples
from dtrain.planning.structure_cache import StructureCache
from dtrain.schedules.actions import Action, Point, Route
from dtrain.schedules.messages import count_forward_passes

BlockFactory = Callable[[], Block]
"""Makes the block."""


Measure = Callable[[BlockFactory, int], tuple[Block, tuple[int, ...]]]
"""Returns a new block, and the bytes that each forward and the backward of one micro-batch of so
many rows add, and those that are freed in between."""


_OPTIMIZER_BYTES: StructureCache[int] = StructureCache()
"""Bytes of optimizer states by optimizer and shapes of the parameters."""


FEW_ROWS, MORE_ROWS = 2, 4
"""Rows of the two real runs from which bytes are extrapolated, where fake tensors fail."""


MAX_CPU_ELEMENTS = 1 << 20
"""Parameter elements of a block up to which its optimizer is measured on the CPU."""


defer_dynamo(FakeTensorMode.__torch_dispatch__)


@final
@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block.

    Attributes
    ----------
    parameters : int
        Parameters and buffers, with those of the head.
    gradients, optimizer : int
        Gradients of the trained parameters, and the optimizer's state after its first step.
    activations : int
        Of one micro-batch, from its first forward to the end of its backward.
    backward : int
        Added by the backward of a micro-batch until its end.
    later_passes : tuple of int
        The part of `activations` that each forward after the first one adds.
    released : int
        The part of `activations` that is freed after the forward, and needed again in the backward.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    backward: int
    later_passes: tuple[int, ...] = ()
    released: int = 0


def measure_block_memory(
    make_real: BlockFactory,
    make_fake: BlockFactory | None,
    make_optimizer: OptimizerFactory,
    objective: Objective,
    block_specs: Sequence[BlockSpec],
    index: int,
    rows: int,
    is_small: bool = False,
) -> BlockMemory:
    """Return the bytes of block `index` with micro-batches of `rows` samples.

    Parameters
    ----------
    make_real, make_fake : callable
        Make the block of real tensors, and of fake ones (called in `FakeTensorMode`); None where
        the block cannot be made of fake tensors.
    make_optimizer : callable
        Makes the block's optimizer.
    block_specs : sequence of BlockSpec
        One per block of the run.
    is_small : bool
        Whether the block is run on real tensors with all rows, which is faster than to import what
        fake tensors need.

    Raises
    ------
    Exception
        Any exception of the block's layers or of the objective on zeros.
    """
    measure = partial(_measure_block, objective, block_specs, index)
    with torch.random.fork_rng(devices=[]):
        if is_small:
            measured = measure(make_real, rows)
        else:
            fake = None if make_fake is None else _measure_fake(measure, make_fake, rows)
            measured = fake or _extrapolate(measure, make_real, rows)
        block, (*passes, backward, released) = measured
        return BlockMemory(
            parameters=_nbytes(block.tensors().values()),
            gradients=_nbytes(block.trainable_parameters),
            optimizer=optimizer_bytes(make_optimizer, block.named_parameters()),
            activations=sum(passes),
            backward=backward,
            later_passes=tuple(passes[1:]),
            released=released,
        )


def _measure_fake(
    measure: Measure, make: BlockFactory, rows: int
) -> tuple[Block, tuple[int, ...]] | None:
    """Return the measure on fake tensors, None where the block reads values: they have none."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return measure(make, rows)
    except Exception:  # of any kind; a real fault is raised again on real tensors
        return None


def _extrapolate(measure: Measure, make: BlockFactory, rows: int) -> tuple[Block, tuple[int, ...]]:
    """Return the measures of two real runs with few rows, extrapolated to `rows`."""
    (_, few_bytes), (block, more_bytes) = measure(make, FEW_ROWS), measure(make, MORE_ROWS)
    ratio = (rows - FEW_ROWS) / (MORE_ROWS - FEW_ROWS)
    return block, tuple(
        round(a + (b - a) * ratio) for a, b in zip(few_bytes, more_bytes, strict=True)
    )


def _measure_block(
    objective: Objective,
    block_specs: Sequence[BlockSpec],
    index: int,
    make: BlockFactory,
    rows: int,
) -> tuple[Block, tuple[int, ...]]:
    """Return a new block, and the bytes that forwards and backward of one micro-batch add, and
    those that are freed in between."""
    with torch.enable_grad():
        block = make()
        with without_compiling(block.roots.values()):
            return block, _measure_passes(block, objective, block_specs, index, rows)


def optimizer_bytes(make_optimizer: OptimizerFactory, parameters: Iterable[NamedParameter]) -> int:
    """Return the bytes of an optimizer's state after its first step, measured once per shape."""
    kinds = Counter((p.module_class, p.parameter.shape, p.parameter.dtype) for p in parameters)
    key = repr(make_optimizer), frozenset(kinds.items())
    elements = sum(shape.numel() for _, shape, _ in kinds)

    def measure() -> int:
        try:
            is_small = elements <= MAX_CPU_ELEMENTS
            return _state_bytes(make_optimizer, kinds, "cpu" if is_small else "meta")
        except ConfigError:
            raise
        except Exception:  # an optimizer that reads values
            return _state_bytes(make_optimizer, kinds, "cpu")

    return _OPTIMIZER_BYTES.get(
        key if isinstance(make_optimizer, OptimizerSettings) else None, measure
    )


def _state_bytes(
    make_optimizer: OptimizerFactory,
    kinds: Counter[tuple[str, torch.Size, torch.dtype]],
    device: str,
) -> int:
    parameters = [
        NamedParameter(
            str(number), nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)), module_class
        )
        for number, (module_class, shape, dtype) in enumerate(kinds)
    ]
    if not parameters:
        return 0
    for named in parameters:
        named.parameter.grad = torch.zeros_like(named.parameter)
    optimizer = make_optimizer(parameters)
    optimizer.step()
    total = 0
    for (_, parameter, _), count in zip(parameters, kinds.values(), strict=True):
        entries = [entry for entry in optimizer.state[parameter].values() if entry is not None]
        total += count * _nbytes(map(torch.as_tensor, entries))
    return total


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _measure_passes(
    block: Block, objective: Objective, block_specs: Sequence[BlockSpec], index: int, rows: int
) -> tuple[int, ...]:
    """Return the bytes that each forward and the backward of one micro-batch add, and those that
    are freed in between."""
    spec, routes = block_specs[index], all_routes(objective, block_specs, "train")
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
    if not block.keeps_forward:
        saved.release_forward(micro_batch, keep_input=not block.rebuilds_input)
    released = peaks[-1] - saved.live_bytes if not block.keeps_forward else 0
    received = _received_zeros(objective, routes, block_specs, Point(index, "B"), rows)
    micro_batch.received = {**micro_batch.received, **received}
    backward_pairs(objective, spec, block, micro_batch, saved)
    return (*(b - a for a, b in pairwise([*peaks, saved.peak_bytes])), released)


def _zero_micro_batch(block: Block, objective: Objective, spec: BlockSpec, rows: int) -> MicroBatch:
    """Return a micro-batch of zeros, with the data where the objective needs them."""
    dtypes = [*(parameter.dtype for parameter in block.parameters.values()), spec.dtype]
    dtype = next((dtype for dtype in dtypes if not dtype.is_complex), dtypes[0].to_real())
    dtype = spec.sample_dtype(dtype)
    samples = raw_samples = None
    others: tuple[Tensor, ...] = ()
    if reads_samples(objective, spec, "train"):
        samples = torch.zeros(rows, *spec.sample_shape, dtype=dtype)
        others = tuple(torch.zeros(rows, *shape, dtype=kind) for shape, kind in spec.other_inputs)
        if objective.needs_raw_samples and spec.has_raw_samples:
            raw_samples = torch.zeros_like(samples)
    return MicroBatch(
        targets=spec.task.zero_targets(rows),
        weights=torch.ones(rows).double() if spec.task.target_spec.weighted else None,
        task=spec.task,
        samples=samples,
        other_samples=others,
        raw_samples=raw_samples,
        indices=torch.zeros(rows, dtype=torch.int64),
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
    """Return messages of zeros for all routes to a point."""
    messages = {}
    for route in routes:
        if route.target == point:
            shape, dtype = message_spec(objective, route, block_specs, rows)
            messages[route.name] = torch.zeros(shape, dtype=dtype)
    return messages


def peak_live_bytes(actions: Iterable[Action], blocks: Mapping[int, BlockMemory]) -> int:
    """Return the peak bytes of live micro-batches while one rank runs a plan."""
    live = peak = 0
    for action in actions:
        if action.kind == "U":
            continue
        memory = blocks[action.block]
        match action.kind:
            case "F" if action.pass_:
                live += memory.later_passes[action.pass_ - 1]
                peak = max(peak, live)
            case "F":
                live += memory.activations - sum(memory.later_passes)
                peak = max(peak, live)
                live -= memory.released
            case "B":
                peak = max(peak, live + memory.released + memory.backward)
                live -= memory.activations - memory.released
            case "I":
                live += memory.backward
                peak = max(peak, live)
            case "W":
                live -= memory.activations + memory.backward
    return peak
