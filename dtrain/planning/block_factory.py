"""Blocks put together: which layers a block has, what of them is trained, and by what step.

Invariant: a rank that trains and a plan that counts put a block together alike; whether its tensors
have memory is the business of who made the layers.

::

    layout.parts[index] -- origin --> layers to make
                                         |-- drawn: under the seed ----------.
                                         `-- budget: fake, without memory --- assembled --> Block
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from dtrain.block import optimizer as optimizers
from dtrain.block.block import Block
from dtrain.block.parameters import OptimizerFactory
from dtrain.config.run import RunConfig
from dtrain.models.layers import LayerStack
from dtrain.planning.layout import Layout
from dtrain.rng import seeded


def make_block(run: RunConfig, layout: Layout, index: int, device: torch.device) -> Block:
    """Return one block: layers and helper drawn under the seed and their own names."""
    seed, task = run.settings.seed, layout.block_layouts[index].spec
    model, indices = layer_source(layout, index)
    layers = model.build(indices, seed, layout.dtype)
    for layer in layers.values():
        layer.to(device)
    with seeded(seed, f"heads.{index}"):
        helper = layout.objective.make_head(task)
    if helper is not None:
        helper = helper.to(device, task.dtype)
    return assemble_block(run, layout, index, layers, helper)


def layer_source(layout: Layout, index: int) -> tuple[LayerStack, Sequence[int]]:
    """Return the model that a block's layers are of, the objective's own or the run's, and their
    indices in it."""
    part = layout.block_layouts[index]
    if part.replacement_layers is None:
        return layout.model, part.layers
    return part.replacement_layers, range(len(part.replacement_layers.names))


def assemble_block(
    run: RunConfig,
    layout: Layout,
    index: int,
    layers: Mapping[str, nn.Module],
    head: nn.Module | None,
) -> Block:
    """Return the block of given layers and helper."""
    objective, chosen = layout.objective, run.partition.recompute
    part = layout.block_layouts[index]
    for kept in layers.values() if part.frozen else objective.frozen_modules(part.spec, layers):
        kept.requires_grad_(False)
    again = chosen if isinstance(chosen, bool) else index in chosen
    ends = index == 0, index + 1 == len(layout.block_layouts)
    made = layers, head, optimizer_factory(run), run.settings.seed
    return Block(index, *made, objective.detach_every, again, ends)


def optimizer_factory(run: RunConfig) -> OptimizerFactory:
    """Return what makes a block's optimizer."""
    return partial(optimizers.make_optimizer, run.optimizer.name, run.optimizer_fields())
