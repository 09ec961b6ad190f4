"""Make blocks: their layers, the parameters that are frozen, and the optimizer.

Invariant: training and planning assemble a block in the same way; only the layers differ, which the
plan makes without memory.

::

    layout.block_layouts[index] -- layer_source --> layers to make
                                         |-- make_block: with initial weights --.
                                         `-- MemoryPlan: fake, no memory --------- assemble_block
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dtrain.block.block import Block
from dtrain.config.run import RunConfig
from dtrain.models.layers import LayerStack, cast_module
from dtrain.models.pretrained import PretrainedWeights, load_pretrained
from dtrain.planning.layout import Layout
from dtrain.planning.lazy_modules import materialise
from dtrain.rng import seeded


def make_block(run: RunConfig, layout: Layout, index: int, device: torch.device) -> Block:
    """Return a block; the initial weights depend on the seed and on the names of its layers."""
    seed, spec = run.settings.seed, layout.block_layouts[index].spec
    model, indices = layer_source(layout, index)
    layers = model.build(indices, seed, layout.dtype)
    materialise(layout, index, layers, seed)
    if run.weights_path is not None and model is layout.model:
        load_pretrained(PretrainedWeights(run.weights_path), layers, model.tied_names)
    for layer in layers.values():
        layer.to(device)
    with seeded(seed, f"heads.{index}"):
        head = layout.objective.make_head(spec)
    if head is not None:
        head = cast_module(head, spec.dtype).to(device)
    return assemble_block(run, layout, index, layers, head)


def layer_source(layout: Layout, index: int) -> tuple[LayerStack, Sequence[int]]:
    """Return the stack that has a block's layers, and their indices in it.

    The stack is the model, or the layers with which the objective replaces those of the block.
    """
    block_layout = layout.block_layouts[index]
    replacement = block_layout.replacement_layers
    if replacement is None:
        return layout.model, block_layout.layers
    return replacement, range(len(replacement.names))


def assemble_block(
    run: RunConfig,
    layout: Layout,
    index: int,
    layers: Mapping[str, nn.Module],
    head: nn.Module | None,
) -> Block:
    """Return the block of these layers and this head."""
    objective, recompute = layout.objective, run.partition.recompute
    block_layout = layout.block_layouts[index]
    frozen_modules = (
        layers.values()
        if block_layout.frozen
        else objective.frozen_modules(block_layout.spec, layers)
    )
    for module in frozen_modules:
        module.requires_grad_(False)
    block = Block(
        index,
        layers,
        head,
        run.optimizer_settings(),
        seed=run.settings.seed,
        detach_every=objective.detach_every,
        recompute=recompute if isinstance(recompute, bool) else index in recompute,
        model_ends=(index == 0, index + 1 == len(layout.block_layouts)),
        program=layout.program(index),
    )
    block.may_skip_parameters |= not type(objective).__module__.startswith("dtrain.")
    return block
