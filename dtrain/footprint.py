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
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dtrain.block import Block, Step
from dtrain.live import Draws, Given, Live
from dtrain.objectives.objective import GRADIENT, Objective
from dtrain.objectives.task import Task
from dtrain.saved import Saved
from dtrain.schedules.action import Action, Point, Route
from dtrain.schedules.messages import passes

Make = Callable[[bool], Block]
"""Returns the block anew: for real, or of fake tensors (called in their mode)."""

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
    """

    parameters: int
    gradients: int
    optimizer: int
    kept: int
    learning: int


def footprint(
    make: Make, step: Step, objective: Objective, tasks: Sequence[Task], index: int, rows: int
) -> Footprint:
    """Return what block `index` holds with micro-batches of `rows` samples.

    Parameters
    ----------
    make, step : callable
        Make the block and its optimizer.
    tasks : sequence of Task
        One per block of the run.

    Whatever the block's layers or the objective raise on zeros is raised.
    """
    measure = partial(_measured, make, objective, tasks, index)
    with torch.random.fork_rng(devices=[]):
        try:
            block, kept, learning = measure(rows, real=False)
        except Exception:  # whatever looks at values; a true fault shows again for real
            few, (block, *more) = measure(FEW, real=True), measure(MORE, real=True)
            steps = (rows - FEW) / (MORE - FEW)
            kept, learning = (
                round(a + (b - a) * steps) for a, b in zip(few[1:], more, strict=True)
            )
        return Footprint(
            parameters=_nbytes(block.tensors().values()),
            gradients=_nbytes(block.trained),
            optimizer=_remembered(step, block.trained),
            kept=kept,
            learning=learning,
        )


def _measured(
    make: Make, objective: Objective, tasks: Sequence[Task], index: int, rows: int, *, real: bool
) -> tuple[Block, int, int]:
    """Return the block, and the bytes that one micro-batch keeps and that learning it adds."""
    mode = nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)
    with torch.enable_grad(), mode:
        block = make(real)
        return block, *_passed(block, objective, tasks, index, rows)


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
) -> tuple[int, int]:
    """Return the bytes that one micro-batch keeps, and that learning it adds."""
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
    for pass_ in range(passes(routes)):
        told = _told(objective, routes, tasks, Point(index, "F", pass_), rows)
        given = Given(targets, told, sample, image, which, draws, pass_, live, learning=True)
        with torch.no_grad():
            x = objective.feed(task, block, given).detach()
        x.requires_grad_(asked and x.is_floating_point())
        with saved.saving(index):
            made = block.run(x, (0, 0, 0), objective.traced(pass_))
        live = Live(**made, targets=targets, told=told, draws=draws, sample=sample, before=live)
        live.image, live.indices = image, which
        saved.keep(index, live)
    assert live is not None
    kept, live.told = saved.peak_bytes, _told(objective, routes, tasks, Point(index, "B"), rows)
    if block.recompute:
        _recalled(saved, block, objective, live)
    with saved.saving(index):
        objective.pulls(task, block, live)
    return kept, saved.peak_bytes - kept


def _recalled(saved: Saved, block: Block, objective: Objective, live: Live) -> None:
    """Compute again what was not kept, as the engine does."""
    saved.drop(live.draws.block)
    with saved.saving(live.draws.block):
        for pass_, each in enumerate(live.passes()):
            if objective.traced(pass_):
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
                now += 0 if action.pass_ else each.kept
                most = max(most, now)
            case "W":
                now -= each.kept + each.learning
            case kind:
                most = max(most, now + each.learning)
                now += -each.kept if kind == "B" else each.learning
    return most
