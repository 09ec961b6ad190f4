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
from dtrain.schedules.stream_replay import StreamReplay

SAFE_BLOCKS = 4
"""Number of blocks that most objectives can train."""


LARGE_HEAD_FRACTION = 0.1
"""Fraction of its block's parameters from which a head counts as large."""


MIN_NORM_SAMPLES = 16
"""Samples below which means and variances of a batch norm are noisy."""


MAX_LISTED_NAMES = 4
"""Names that are listed one by one."""


SUGGESTED_MICRO_BATCHES = 4
"""Micro-batches per further stage that a warning suggests: then a fifth of the time is idle."""


SMALL_SHARE = 0.1
"""Part of an equal share of the cost below which a stage or a block is too small."""


def plan_warnings(plan: Plan) -> list[str]:
    """Return the warnings of a plan, each in one line."""
    layout, rows = plan.layout, plan.batch_splitter.largest_micro_batch
    return [
        *_warn_coupled_samples(layout),
        *_warn_small_batches(plan),
        *_warn_many_blocks(plan),
        *_warn_costly_heads(layout),
        *_warn_large_heads(layout),
        *_warn_replaced_optimizer(plan),
        *_warn_one_micro_batch(plan),
        *_warn_versions(plan),
        *_warn_empty_replicas(plan),
        *_warn_uneven_blocks(plan),
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
    enough = splitter.sufficient_batch(MIN_NORM_SAMPLES * splitter.micro_batches)
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


def _warn_costly_heads(layout: Layout) -> Iterator[str]:
    """Warn of heads over a vocabulary that cost more than the layers of their blocks."""
    blocks = [block for block in layout.block_layouts if _has_costly_head(block)]
    if not blocks:
        return
    worst = max(blocks, key=lambda block: block.head_cost)
    spec, layers = worst.spec, worst.cost - worst.head_cost
    scores, outputs = (
        math.prod(shape) * spec.dtype.itemsize for shape in (spec.scores_shape, spec.output_shape)
    )
    numbers = ", ".join(str(block.spec.index) for block in blocks[:MAX_LISTED_NAMES])
    more = f", ... ({len(blocks)} of them)" if len(blocks) > MAX_LISTED_NAMES else ""
    noun = "block" if len(blocks) == 1 else "blocks"
    yield (
        f"a head over {spec.classes:,} classes at each position costs more than the layers of its "
        f"block ({noun} {numbers}{more}): in block {spec.index} the head has "
        f"{worst.head_parameters:,} parameters and {worst.head_cost:,} multiply-adds per sample, "
        f"the layers {worst.parameters:,} and {layers:,}; its scores are {scores:,} bytes per "
        f"sample, the output of the block {outputs:,}: cut fewer and larger blocks, use "
        '\'local-head\' with head = "decoder", private-layers = 0 and output = "shared", which '
        "trains no matrix of its own, or use 'backprop'"
    )


def _has_costly_head(block: BlockLayout) -> bool:
    """Return whether a head over a vocabulary costs more than the layers of its block."""
    has_vocabulary = block.spec.has_positions and block.spec.task.has_classes
    is_larger = block.head_parameters > block.parameters
    return has_vocabulary and (is_larger or 2 * block.head_cost > block.cost)


def _warn_large_heads(layout: Layout) -> Iterator[str]:
    """Warn of heads that are large compared with their blocks."""
    blocks = [
        block
        for block in layout.block_layouts
        if block.head_parameters > LARGE_HEAD_FRACTION * block.parameters
        and not _has_costly_head(block)
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


def _warn_versions(plan: Plan) -> Iterator[str]:
    """Warn of results that depend on more than the run file."""
    schedule, micro_batches = plan.layout.schedule, plan.batch_splitter.micro_batches
    if schedule.delays_count_micro_batches and micro_batches > 1:
        yield (
            f"'{plan.run.schedule.name}' updates weights between the micro-batches of an update: "
            "results depend on the numbers of micro-batches and replicas; keep both to compare runs"
        )
    if isinstance(schedule, StreamReplay) and plan.layout.mesh.stages > 1:
        yield (
            f"ranks that wait longer than patience-s = {schedule.patience_s:g} train on earlier "
            "inputs: such a run cannot be reproduced"
        )


def _warn_one_micro_batch(plan: Plan) -> Iterator[str]:
    """Warn of stages that wait for each other's gradients with nothing else to compute."""
    layout, splitter = plan.layout, plan.batch_splitter
    stages = layout.mesh.stages
    gets_gradients = bool(input_gradient_blocks(r for r in layout.routes if not r.lag))
    if stages < 2 or splitter.micro_batches > 1 or not gets_gradients:
        return
    if not layout.schedule.flushes:
        return
    largest = max(1, splitter.batch_size // layout.mesh.replicas)
    count = min(SUGGESTED_MICRO_BATCHES * (stages - 1), largest)
    cure = "use fewer stages"
    if count > 1:
        bubble = (stages - 1) / (count + stages - 1)
        cure = f"set micro-batches = {count} (idle then: {percent(bubble, 0)})"
    yield (
        f"one micro-batch on {stages} stages: '{plan.run.objective.name}' waits for gradients, so "
        f"one stage computes at a time, and each rank is idle for "
        f"{percent((stages - 1) / stages, 0)} of the time; {cure}"
    )


def _warn_empty_replicas(plan: Plan) -> Iterator[str]:
    """Warn of replicas that have no samples in some updates."""
    splitter, size, replicas = plan.batch_splitter, plan.data.train.size, plan.layout.mesh.replicas
    updates = plan.training_length.updates_per_epoch
    first, last = (_empty_replicas(plan, update) for update in (0, updates - 1))
    if first:
        yield (
            f"{first} of {replicas} replicas have no samples in any update of "
            f"{min(splitter.batch_size, size)} samples and only cost time: set batch-size = "
            f"{splitter.sufficient_batch(splitter.min_rows)} or more, or start fewer replicas"
        )
    elif last:
        rest = size - (updates - 1) * splitter.batch_size
        yield (
            f"{last} of {replicas} replicas have no samples in the last of {updates} updates of an "
            f"epoch, which has {rest} of {splitter.batch_size} samples: choose a batch-size that "
            f"leaves at least {splitter.sufficient_batch(splitter.min_rows)} of {size:,} samples, "
            "or start fewer replicas"
        )


def _empty_replicas(plan: Plan, update: int) -> int:
    """Return the number of replicas without samples in an update of an epoch."""
    counts = plan.batch_splitter.count_micro_batches(plan.data.train.size, update, update + 1)
    return sum(count == 0 for (count,) in counts)


def _warn_uneven_blocks(plan: Plan) -> Iterator[str]:
    """Warn of a stage, or of a block on one stage, that costs next to nothing beside the others."""
    layout, section = plan.layout, plan.run.partition
    noun, costs = "stages", layout.stage_costs()
    if layout.mesh.stages == 1:
        noun, costs = "blocks", [block.cost for block in layout.block_layouts]
        if input_gradient_blocks(r for r in layout.routes if not r.lag):
            return  # the blocks learn as one
    total = sum(costs)
    if len(costs) < 2 or not total or section.weights is not None:
        return
    shares = [cost / total for cost in costs]
    if min(shares) * len(costs) >= SMALL_SHARE:
        return
    loss = f"ranks are busy for {percent(sum(shares) / (len(shares) * max(shares)), 0)} of the time"
    if noun == "blocks":
        loss = f"block {costs.index(min(costs))} has little to learn with"
    cure = "leave out [partition] cuts, which balances the costs, or move them"
    if section.cuts is None:
        layer = max(layout.layer_specs, key=lambda spec: spec.forward_macs)
        cure = f"use fewer {noun}, or open layer '{layer.name}' to cuts by [model] open"
        if section.balance != "flops":
            cure = 'set [partition] balance = "flops"'
    listed = ", ".join(percent(share, 0) for share in shares[:MAX_LISTED_NAMES])
    more = ", ..." if len(shares) > MAX_LISTED_NAMES else ""
    yield (
        f"{noun} have {listed}{more} of the multiply-adds, the smallest {percent(min(shares))} and "
        f"the largest {percent(max(shares))}: {loss}; {cure}"
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
