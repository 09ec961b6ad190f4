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

from dtrain import optimizers
from dtrain.block import Block
from dtrain.config import Run
from dtrain.layout import Layout
from dtrain.models import Model
from dtrain.seeds import seeded
from dtrain.weights import Step


def drawn(run: Run, layout: Layout, index: int, device: torch.device) -> Block:
    """Return one block: layers and helper drawn under the seed and their own names."""
    seed, task = run.top.seed, layout.parts[index].task
    model, indices = origin(layout, index)
    layers = model.build(indices, seed, layout.dtype)
    for layer in layers.values():
        layer.to(device)
    with seeded(seed, f"heads.{index}"):
        helper = layout.objective.build(task)
    if helper is not None:
        helper = helper.to(device, task.dtype)
    return assembled(run, layout, index, layers, helper)


def origin(layout: Layout, index: int) -> tuple[Model, Sequence[int]]:
    """Return the model that a block's layers are of, the objective's own or the run's, and their
    indices in it."""
    part = layout.parts[index]
    if part.own is None:
        return layout.model, part.layers
    return part.own, range(len(part.own.names))


def assembled(
    run: Run, layout: Layout, index: int, layers: Mapping[str, nn.Module], helper: nn.Module | None
) -> Block:
    """Return the block of given layers and helper."""
    objective, chosen = layout.objective, run.partition.recompute
    part = layout.parts[index]
    for kept in layers.values() if part.frozen else objective.freezes(part.task, layers):
        kept.requires_grad_(False)
    again = chosen if isinstance(chosen, bool) else index in chosen
    ends = index == 0, index + 1 == len(layout.parts)
    made = layers, helper, stepper(run), run.top.seed
    return Block(index, *made, objective.grain, again, ends)


def stepper(run: Run) -> Step:
    """Return what makes a block's optimizer."""
    return partial(optimizers.make, run.optimizer.name, run.step_fields())
