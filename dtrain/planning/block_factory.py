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
from dtrain.models.layers import LayerStack, cast_module, merge_layers
from dtrain.models.pretrained import load_pretrained
from dtrain.planning.initial_weights import open_weights
from dtrain.planning.layout import Layout
from dtrain.planning.lazy_modules import materialise
from dtrain.rng import seeded


def make_blocks(
    run: RunConfig, layout: Layout, indices: Sequence[int], device: torch.device
) -> dict[int, Block]:
    """Return blocks by index, each as `make_block` makes it.

    A user's function that makes a whole model is called once for all of them, unless layers share
    tensors: then every block needs its own.
    """
    model, dtype = layout.model, layout.dtype
    own = [index for index in indices if layer_source(layout, index)[0] is model]
    built: dict[int, dict[str, nn.Module]] = {}
    if model.builds_all_layers and not model.tied_names and len(own) > 1:
        positions = [i for index in own for i in layout.block_layouts[index].layers]
        each = dict(
            zip(positions, model.build_each(positions, run.settings.seed, dtype), strict=True)
        )
        modules = [id(m) for layer in each.values() for m in layer.values()]
        if len(set(modules)) == len(modules):
            built = {
                index: merge_layers(each[i] for i in layout.block_layouts[index].layers)
                for index in own
            }
    return {index: make_block(run, layout, index, device, built.get(index)) for index in indices}


def make_block(
    run: RunConfig,
    layout: Layout,
    index: int,
    device: torch.device,
    layers: dict[str, nn.Module] | None = None,
) -> Block:
    """Return a block; the initial weights depend on the seed and on the names of its layers.

    Parameters
    ----------
    layers : dict of str to nn.Module, optional
        Its layers, if they are made already.
    """
    seed, spec = run.settings.seed, layout.block_layouts[index].spec
    model, indices = layer_source(layout, index)
    if layers is None:
        layers = model.build(indices, seed, layout.dtype)
    materialise(layout, index, layers, seed)
    if run.weights_path is not None and model is layout.model:
        load_pretrained(open_weights(run.weights_path), layers, model.tied_names)
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
    objective = layout.objective
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
        recompute=block_layout.recompute,
        model_ends=(index == 0, index + 1 == len(layout.block_layouts)),
        program=layout.program(index),
        first_copies={
            copy.name: (tie.copies[0].name, tie.copies[0].module_class)
            for tie in layout.ties
            for copy in tie.copies[1:]
            if copy.block == index
        },
        keeps_forward=block_layout.keeps_forward,
        rebuilds_input=block_layout.spec.rebuilds_input,
    )
    block.may_skip_parameters |= not type(objective).__module__.startswith("dtrain.")
    return block
