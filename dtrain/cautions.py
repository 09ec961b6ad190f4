"""Cautions: what a user should know before a run starts, as far as a plan shows it.

Invariant: pure in the plan; each is one line that says what was found, with numbers, and what to
do. Nothing is refused here: whoever goes on may know better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dtrain.job import Plan
from dtrain.layout import Layout, Part
from dtrain.objectives.objective import GRADIENT

BLOCKS = 4
"""As many are a friendly case for most objectives."""

SHARE = 0.1
"""Of a block's parameters; a larger head may learn in the block's place."""

SAMPLES = 16
"""Fewer have noisy means and variances."""

NAMES = 4
"""As many are listed one by one."""


def cautions(plan: Plan) -> list[str]:
    """Return what a user should know before a run starts, each in one line."""
    layout, rows = plan.layout, plan.shares.largest
    own = layout.objective.cautions(layout.tasks, rows)
    found = [*_coupled(layout), *_few(plan), *_many(plan), *_heads(layout)]
    return [*found, *_ruled(plan), *own]


def _coupled(layout: Layout) -> Iterator[str]:
    """Tell of samples that depend on each other."""
    depend = (
        "results depend on the numbers of micro-batches and replicas; keep both to compare runs"
    )
    norms = _norms(layout)
    if norms:
        yield f"batch statistics in {_listed(norms)}: {depend}"
    blocks = [str(each.block) for each in layout.tasks if layout.objective.couples(each)]
    if blocks:
        noun = "block" if len(blocks) == 1 else "blocks"
        yield f"the loss of {noun} {_listed(blocks)} is over whole micro-batches: {depend}"


def _norms(layout: Layout) -> list[str]:
    """Return the layers and heads with batch statistics, as far as these alone couple samples."""
    by_loss = [layout.objective.couples(part.task) for part in layout.parts]
    pairs = zip(layout.parts, by_loss, strict=True)
    heads = [f"heads.{part.task.block}" for part, loss in pairs if part.couples and not loss]
    return [*(spec.name for spec in layout.specs if spec.couples), *heads]


def _few(plan: Plan) -> Iterator[str]:
    """Tell of batch statistics over few samples."""
    shares, mesh = plan.shares, plan.layout.mesh
    size = min(shares.size, plan.data.train.size)
    batches = (shares.batch(np.arange(size), 0, replica) for replica in range(mesh.replicas))
    rows = min((len(micro) for batch in batches for micro in batch.micros), default=0)
    if _norms(plan.layout) and rows < SAMPLES:
        enough = SAMPLES * mesh.replicas * shares.micros
        fewer = f", or less than micro-batches = {shares.micros}" if shares.micros > 1 else ""
        yield (
            f"batch statistics of micro-batches of {rows} samples are noisy, as all under "
            f"{SAMPLES}: set batch-size = {enough}{fewer}, or take a norm without them "
            '(norm = "group")'
        )


def _many(plan: Plan) -> Iterator[str]:
    """Tell of more blocks than an objective carries that has no gradient from the next block."""
    layout, name = plan.layout, plan.run.objective.name
    follows = any(route.name == GRADIENT and not route.lag for route in layout.routes)
    if len(layout.parts) > BLOCKS and not follows and not layout.objective.carries:
        yield (
            f"{len(layout.parts)} blocks: '{name}' is not known to carry more than {BLOCKS}, and "
            f"falls behind backpropagation with each; set [partition] blocks = {BLOCKS}, or take "
            "an objective that carries many (docs/objectives.md)"
        )


def _heads(layout: Layout) -> Iterator[str]:
    """Tell of heads that are large beside their blocks."""
    large = [part for part in layout.parts if part.head_parameters > SHARE * part.parameters]
    if not large:
        return
    told = ", ".join(f"block {part.task.block} {_percent(part)}" for part in large)
    if len(large) > NAMES:
        most = max(large, key=_share)
        told = f"{len(large)} of {len(layout.parts)} blocks, most in block {most.task.block}"
        told += f" ({_percent(most)})"
    yield (
        f"local heads above 10 % of their blocks' parameters: {told}; such a head may learn in its "
        "block's place: cut fewer and larger blocks, or take a smaller head"
    )


def _ruled(plan: Plan) -> Iterator[str]:
    """Tell of an optimizer whose rule is not used."""
    run = plan.run
    if run.make_sync().ruled:
        yield (
            f"the sync '{run.sync.name}' steps by a rule of its own: of [optimizer] "
            f"'{run.optimizer.name}' the learning rate and the weight decay count, nothing else"
        )


def _share(part: Part) -> float:
    return part.head_parameters / part.parameters if part.parameters else math.inf


def _percent(part: Part) -> str:
    return f"{_share(part):.0%}".replace("%", " %") if part.parameters else "of none"


def _listed(names: Sequence[str]) -> str:
    if len(names) <= NAMES:
        return ", ".join(names)
    return f"{names[0]} ... {names[-1]} ({len(names)} of them)"
