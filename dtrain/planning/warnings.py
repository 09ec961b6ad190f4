"""Cautions: what a user should know before a run starts, as far as a plan shows it.

Invariant: pure in the plan; each is one line that says what was found, with numbers, and what to
do. Nothing is refused here: whoever goes on may know better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dtrain.objectives.base import GRADIENT
from dtrain.planning.layout import BlockLayout, Layout
from dtrain.planning.plan import Plan

SAFE_BLOCKS = 4
"""As many are a friendly case for most objectives."""


LARGE_HEAD_FRACTION = 0.1
"""Of a block's parameters; a larger head may learn in the block's place."""


MIN_NORM_SAMPLES = 16
"""Fewer have noisy means and variances."""


MAX_LISTED_NAMES = 4
"""As many are listed one by one."""


def plan_warnings(plan: Plan) -> list[str]:
    """Return what a user should know before a run starts, each in one line."""
    layout, rows = plan.layout, plan.batch_splitter.largest_micro_batch
    own = layout.objective.warnings(layout.block_specs, rows)
    found = [
        *_warn_coupled_samples(layout),
        *_warn_small_batches(plan),
        *_warn_many_blocks(plan),
        *_warn_large_heads(layout),
    ]
    return [*found, *_warn_replaced_optimizer(plan), *own]


def _warn_coupled_samples(layout: Layout) -> Iterator[str]:
    """Tell of samples that depend on each other."""
    depend = (
        "results depend on the numbers of micro-batches and replicas; keep both to compare runs"
    )
    norms = _batch_norm_names(layout)
    if norms:
        yield f"batch statistics in {_join_names(norms)}: {depend}"
    blocks = [
        str(each.index) for each in layout.block_specs if layout.objective.couples_samples(each)
    ]
    if blocks:
        noun = "block" if len(blocks) == 1 else "blocks"
        yield f"the loss of {noun} {_join_names(blocks)} is over whole micro-batches: {depend}"


def _batch_norm_names(layout: Layout) -> list[str]:
    """Return the layers and heads with batch statistics, as far as these alone couple samples."""
    by_loss = [layout.objective.couples_samples(part.spec) for part in layout.block_layouts]
    pairs = zip(layout.block_layouts, by_loss, strict=True)
    heads = [
        f"heads.{part.spec.index}" for part, loss in pairs if part.couples_samples and not loss
    ]
    return [*(spec.name for spec in layout.layer_specs if spec.couples_samples), *heads]


def _warn_small_batches(plan: Plan) -> Iterator[str]:
    """Tell of batch statistics over few samples."""
    shares, mesh = plan.batch_splitter, plan.layout.mesh
    size = min(shares.batch_size, plan.data.train.size)
    batches = (shares.batch(np.arange(size), 0, replica) for replica in range(mesh.replicas))
    rows = min((len(micro) for batch in batches for micro in batch.micro_batch_indices), default=0)
    if _batch_norm_names(plan.layout) and rows < MIN_NORM_SAMPLES:
        enough = MIN_NORM_SAMPLES * mesh.replicas * shares.micro_batches
        fewer = (
            f", or less than micro-batches = {shares.micro_batches}"
            if shares.micro_batches > 1
            else ""
        )
        yield (
            f"batch statistics of micro-batches of {rows} samples are noisy, as all under "
            f"{MIN_NORM_SAMPLES}: set batch-size = {enough}{fewer}, or take a norm without them "
            '(norm = "group")'
        )


def _warn_many_blocks(plan: Plan) -> Iterator[str]:
    """Tell of more blocks than an objective carries that has no gradient from the next block."""
    layout, name = plan.layout, plan.run.objective.name
    follows = any(route.name == GRADIENT and not route.lag for route in layout.routes)
    if (
        len(layout.block_layouts) > SAFE_BLOCKS
        and not follows
        and not layout.objective.scales_to_many_blocks
    ):
        yield (
            f"{len(layout.block_layouts)} blocks: '{name}' is not known to carry more than {SAFE_BLOCKS}, and "
            f"falls behind backpropagation with each; set [partition] blocks = {SAFE_BLOCKS}, or take "
            "an objective that carries many (docs/objectives.md)"
        )


def _warn_large_heads(layout: Layout) -> Iterator[str]:
    """Tell of heads that are large beside their blocks."""
    large = [
        part
        for part in layout.block_layouts
        if part.head_parameters > LARGE_HEAD_FRACTION * part.parameters
    ]
    if not large:
        return
    told = ", ".join(f"block {part.spec.index} {_head_percent(part)}" for part in large)
    if len(large) > MAX_LISTED_NAMES:
        most = max(large, key=_head_fraction)
        told = (
            f"{len(large)} of {len(layout.block_layouts)} blocks, most in block {most.spec.index}"
        )
        told += f" ({_head_percent(most)})"
    yield (
        f"local heads above 10 % of their blocks' parameters: {told}; such a head may learn in its "
        "block's place: cut fewer and larger blocks, or take a smaller head"
    )


def _warn_replaced_optimizer(plan: Plan) -> Iterator[str]:
    """Tell of an optimizer whose rule is not used."""
    run = plan.run
    if run.sync.instance.replaces_optimizer:
        yield (
            f"the sync '{run.sync.name}' steps by a rule of its own: of [optimizer] "
            f"'{run.optimizer.name}' the learning rate and the weight decay count, nothing else"
        )


def _head_fraction(block: BlockLayout) -> float:
    return block.head_parameters / block.parameters if block.parameters else math.inf


def _head_percent(block: BlockLayout) -> str:
    return f"{_head_fraction(block):.0%}".replace("%", " %") if block.parameters else "of none"


def _join_names(names: Sequence[str]) -> str:
    if len(names) <= MAX_LISTED_NAMES:
        return ", ".join(names)
    return f"{names[0]} ... {names[-1]} ({len(names)} of them)"
