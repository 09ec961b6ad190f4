"""Warnings of a plan: facts that a user should know before a run starts.

Invariant: warnings depend on the plan alone. Each is one line with the numbers and a remedy, and
none stops a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dtrain.objectives.base import input_gradient_blocks
from dtrain.planning.formatting import percent
from dtrain.planning.layout import BlockLayout, Layout
from dtrain.planning.plan import Plan

SAFE_BLOCKS = 4
"""Number of blocks that most objectives can train."""


LARGE_HEAD_FRACTION = 0.1
"""Fraction of its block's parameters from which a head counts as large."""


MIN_NORM_SAMPLES = 16
"""Samples below which means and variances of a batch norm are noisy."""


MAX_LISTED_NAMES = 4
"""Names that are listed one by one."""


def plan_warnings(plan: Plan) -> list[str]:
    """Return the warnings of a plan, each in one line."""
    layout, rows = plan.layout, plan.batch_splitter.largest_micro_batch
    return [
        *_warn_coupled_samples(layout),
        *_warn_small_batches(plan),
        *_warn_many_blocks(plan),
        *_warn_large_heads(layout),
        *_warn_replaced_optimizer(plan),
        *layout.objective.warnings(layout.block_specs, rows),
    ]


def _warn_coupled_samples(layout: Layout) -> Iterator[str]:
    """Warn of samples that depend on each other."""
    effect = (
        "results depend on the numbers of micro-batches and replicas; keep both to compare runs"
    )
    norms = _batch_norm_names(layout)
    if norms:
        yield f"batch statistics in {_join_names(norms)}: {effect}"
    blocks = [
        str(spec.index) for spec in layout.block_specs if layout.objective.couples_samples(spec)
    ]
    if blocks:
        noun = "block" if len(blocks) == 1 else "blocks"
        yield f"the loss of {noun} {_join_names(blocks)} is over whole micro-batches: {effect}"


def _batch_norm_names(layout: Layout) -> list[str]:
    """Return the layers and heads with batch statistics.

    A head is left out where the loss of its block couples samples anyway.
    """
    layers = [spec.name for spec in layout.layer_specs if spec.couples_samples]
    heads = [
        f"heads.{block.spec.index}"
        for block in layout.block_layouts
        if block.couples_samples and not layout.objective.couples_samples(block.spec)
    ]
    return layers + heads


def _warn_small_batches(plan: Plan) -> Iterator[str]:
    """Warn of batch statistics over few samples."""
    splitter, replicas = plan.batch_splitter, plan.layout.mesh.replicas
    order = np.arange(min(splitter.batch_size, plan.data.train.size))
    batches = (splitter.batch(order, 0, replica) for replica in range(replicas))
    rows = min((len(micro) for batch in batches for micro in batch.micro_batch_indices), default=0)
    if not _batch_norm_names(plan.layout) or rows >= MIN_NORM_SAMPLES:
        return
    enough = MIN_NORM_SAMPLES * replicas * splitter.micro_batches
    fewer = ""
    if splitter.micro_batches > 1:
        fewer = f", or fewer than micro-batches = {splitter.micro_batches}"
    yield (
        f"batch statistics over micro-batches of {rows} samples are noisy (under "
        f"{MIN_NORM_SAMPLES}): set batch-size = {enough}{fewer}, or use a norm without them "
        '(norm = "group")'
    )


def _warn_many_blocks(plan: Plan) -> Iterator[str]:
    """Warn of more blocks than the objective is known to train without a gradient from above."""
    layout = plan.layout
    blocks, objective = len(layout.block_layouts), layout.objective
    gets_gradients = bool(input_gradient_blocks(r for r in layout.routes if not r.lag))
    if blocks > SAFE_BLOCKS and not gets_gradients and not objective.scales_to_many_blocks:
        yield (
            f"{blocks} blocks: '{plan.run.objective.name}' is not known to train more than "
            f"{SAFE_BLOCKS}, and accuracy falls behind backpropagation with each; set [partition] "
            f"blocks = {SAFE_BLOCKS}, or use an objective for many blocks (docs/objectives.md)"
        )


def _warn_large_heads(layout: Layout) -> Iterator[str]:
    """Warn of heads that are large compared with their blocks."""
    blocks = [
        block
        for block in layout.block_layouts
        if block.head_parameters > LARGE_HEAD_FRACTION * block.parameters
    ]
    if not blocks:
        return
    listed = ", ".join(map(_head_text, blocks))
    if len(blocks) > MAX_LISTED_NAMES:
        largest = max(blocks, key=_head_fraction)
        listed = (
            f"{len(blocks)} of {len(layout.block_layouts)} blocks, most in {_head_text(largest)}"
        )
    yield (
        f"local heads above 10 % of their blocks' parameters: {listed}; such a head may do most of "
        "the learning, so that its block's features stay poor: cut fewer and larger blocks, or use "
        "a smaller head"
    )


def _warn_replaced_optimizer(plan: Plan) -> Iterator[str]:
    """Warn of an optimizer whose update rule the sync replaces."""
    run = plan.run
    if run.sync.instance.traits().replaces_optimizer:
        yield (
            f"the sync '{run.sync.name}' has its own update rule: [optimizer] "
            f"'{run.optimizer.name}' only sets the learning rate and the weight decay"
        )


def _head_fraction(block: BlockLayout) -> float:
    return block.head_parameters / block.parameters if block.parameters else math.inf


def _head_text(block: BlockLayout) -> str:
    size = percent(_head_fraction(block), 0) if block.parameters else "no parameters"
    return f"block {block.spec.index} ({size})"


def _join_names(names: Sequence[str]) -> str:
    if len(names) <= MAX_LISTED_NAMES:
        return ", ".join(names)
    return f"{names[0]} ... {names[-1]} ({len(names)} of them)"
