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

from dtrain.block import Block
from dtrain.live import Draws, Given, Live
from dtrain.objectives.objective import GRADIENT, Objective
from dtrain.objectives.task import Task
from dtrain.saved import Saved
from dtrain.schedules.action import Action, Point, Route
from dtrain.schedules.messages import passes
from dtrain.weights import Step

Make = Callable[[], Block]
"""Returns the block anew."""

Measure = Callable[[Make, int], tuple[Block, tuple[int, ...]]]
"""Returns the block that is made, and what each forward and the learning of one micro-batch of so
many rows add."""

FEW, MORE = 2, 4
"""Rows of the two real runs through which a line is laid, where fake tensors cannot."""

CREDITS = 2
"""Messages of a route that `comm` lets be under way."""


@final
@dataclass(frozen=True)
class Footprint:
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
    kept: int
    learning: int
    later: tuple[int, ...] = ()


def footprint(
    real: Make,
    fake: Make | None,
    step: Step,
    objective: Objective,
    tasks: Sequence[Task],
    index: int,
    rows: int,
) -> Footprint:
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
    measure = partial(_measured, objective, tasks, index)
    with torch.random.fork_rng(devices=[]):
        found = None if fake is None else _faked(measure, fake, rows)
        block, (*passed, learning) = found or _carried(measure, real, rows)
        return Footprint(
            parameters=_nbytes(block.tensors().values()),
            gradients=_nbytes(block.trained),
            optimizer=_remembered(step, block.trained),
            kept=sum(passed),
            learning=learning,
            later=tuple(passed[1:]),
        )


def _faked(measure: Measure, make: Make, rows: int) -> tuple[Block, tuple[int, ...]] | None:
    """Return what fake tensors tell, None where the block looks at values, which they lack."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return measure(make, rows)
    except Exception:  # of any kind; a true fault shows again for real
        return None


def _carried(measure: Measure, make: Make, rows: int) -> tuple[Block, tuple[int, ...]]:
    """Return what two real runs with few rows tell, carried on to `rows`."""
    (_, few), (block, more) = measure(make, FEW), measure(make, MORE)
    steps = (rows - FEW) / (MORE - FEW)
    return block, tuple(round(a + (b - a) * steps) for a, b in zip(few, more, strict=True))


def _measured(
    objective: Objective, tasks: Sequence[Task], index: int, make: Make, rows: int
) -> tuple[Block, tuple[int, ...]]:
    """Return the block, and the bytes that forwards and learning of one micro-batch add."""
    with torch.enable_grad():
        block = make()
        return block, _passed(block, objective, tasks, index, rows)


def _remembered(step: Step, trained: Iterable[Tensor]) -> int:
    """Return the bytes of an optimizer's state after its first step; equal shapes have equal."""
    shapes = Counter((tensor.shape, tensor.dtype) for tensor in trained)
    try:
        return _stepped(step, shapes, "meta")
    except Exception:  # an optimizer that looks at values
        return _stepped(step, shapes, "cpu")


def _stepped(step: Step, shapes: Counter[tuple[torch.Size, torch.dtype]], device: str) -> int:
    trained = [nn.Parameter(torch.zeros(s, dtype=d, device=device)) for s, d in shapes]
    if not trained:
        return 0
    for each in trained:
        each.grad = torch.zeros_like(each)
    optimizer = step(trained)
    optimizer.step()
    return sum(
        count * _nbytes(torch.as_tensor(v) for v in optimizer.state[each].values() if v is not None)
        for each, count in zip(trained, shapes.values(), strict=True)
    )


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _passed(
    block: Block, objective: Objective, tasks: Sequence[Task], index: int, rows: int
) -> tuple[int, ...]:
    """Return the bytes that each forward of one micro-batch adds, and that learning it adds."""
    task, routes = tasks[index], objective.routes(len(tasks), "train")
    block.tap(objective.taps(block))
    saved = Saved([*block.parameters.values(), *block.buffers.values()])
    asked = any(r.name == GRADIENT and r.source.block == index for r in routes)
    dtype = next((each.dtype for each in block.parameters.values()), task.dtype)
    sample = (
        torch.zeros(rows, *task.sample, dtype=dtype) if objective.reads(task, "train") else None
    )
    image = None if sample is None or not (objective.raw and task.raw) else torch.zeros_like(sample)
    which = targets = torch.zeros(rows, dtype=torch.int64)
    draws = Draws(0, index, 0, rows, 0, rows)
    live: Live | None = None
    peaks = [0]
    for pass_ in range(passes(routes)):
        told = _told(objective, routes, tasks, Point(index, "F", pass_), rows)
        given = Given(targets, told, sample, image, which, draws, pass_, live, learning=True)
        with torch.no_grad():
            x = block.owned(objective.feed(task, block, given), sample).detach()
        x.requires_grad_(asked and x.is_floating_point())
        with saved.saving(index):
            made = block.run(x, (0, 0, 0), objective.traced(task, pass_))
        live = Live(**made, targets=targets, told=told, draws=draws, sample=sample, before=live)
        live.image, live.indices = image, which
        saved.keep(index, live)
        peaks.append(saved.peak_bytes)
    assert live is not None
    live.told = {**live.told, **_told(objective, routes, tasks, Point(index, "B"), rows)}
    if block.recompute:
        _recalled(saved, block, objective, task, live)
    with saved.saving(index):
        objective.pulls(task, block, live)
    return tuple(b - a for a, b in pairwise([*peaks, saved.peak_bytes]))


def _recalled(saved: Saved, block: Block, objective: Objective, task: Task, live: Live) -> None:
    """Compute again what was not kept, as the engine does."""
    saved.drop(live.draws.block)
    with saved.saving(live.draws.block):
        for pass_, each in enumerate(live.passes()):
            if objective.traced(task, pass_):
                block.recall(each)
    for each in live.passes():
        saved.keep(live.draws.block, each)


def _told(
    objective: Objective, routes: Sequence[Route], tasks: Sequence[Task], point: Point, rows: int
) -> dict[str, Tensor]:
    """Return zeros in place of what routes bring to a point."""
    shapes = {r.name: objective.shape(r, tasks, rows) for r in routes if r.target == point}
    return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}


def live_bytes(actions: Iterable[Action], blocks: Mapping[int, Footprint]) -> int:
    """Return the most bytes of live micro-batches while one rank runs a plan."""
    now = most = 0
    for action in actions:
        each = blocks[action.block] if action.kind != "U" else None
        if each is None:
            continue
        match action.kind:
            case "F":
                first, later = each.kept - sum(each.later), each.later
                now += later[action.pass_ - 1] if action.pass_ else first
                most = max(most, now)
            case "W":
                now -= each.kept + each.learning
            case kind:
                most = max(most, now + each.learning)
                now += -each.kept if kind == "B" else each.learning
    return most
