"""Messages between blocks: those of the objective, and the skips of a model that is no chain.

Invariant: a skip goes straight from the block that makes it to each block that reads it. Its
gradient goes straight back where the objective sends gradients back; elsewhere skips are detached.

::

    block 0  --activation-->  block 1  --activation-->  block 2
       `------------------------skip------------------------^      F
       ^--------------------skip-gradient-------------------'      B, with `sends_gradients_back`

    block 0  <--returned-activation--  block 1      B, where block 0 rebuilds its input
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtrain.block.block import BackwardPair
from dtrain.block.micro_batch import MicroBatch
from dtrain.models.graph import has_gradient
from dtrain.objectives.base import ExecutionMode, MessageSpec, Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules.actions import SKIP_PREFIX, Point, Route

SKIP, SKIP_GRADIENT = f"{SKIP_PREFIX}:", f"{SKIP_PREFIX}-gradient:"
"""Prefixes of route names; the name of the tensor follows."""

RETURNED = "returned-activation"
"""Name of the routes on which a block returns its input to a block that rebuilds its own."""


def all_routes(
    objective: Objective, specs: Sequence[BlockSpec], mode: ExecutionMode
) -> tuple[Route, ...]:
    """Return the routes of the objective, those of the skips and those of returned activations, in
    this order."""
    routes = objective.routes(len(specs), mode)
    skips = [(skip, spec.index) for spec in specs for skip in spec.skip_inputs]
    passes = sorted({0, *(r.target.pass_ for r in routes if r.target.kind == "F")})
    forward = [
        Route(Point(skip.source, "F", pass_), Point(block, "F", pass_), SKIP + skip.tensor.name)
        for pass_ in passes
        for skip, block in skips
    ]
    back = [
        Route(Point(block, "B"), Point(skip.source, "B"), _gradient_name(skip.tensor.name, block))
        for skip, block in skips
        if mode == "train" and objective.sends_gradients_back and has_gradient(skip.tensor.dtype)
    ]
    returned = [
        Route(Point(spec.index + 1, "B"), Point(spec.index, "B"), RETURNED)
        for spec in specs
        if mode == "train" and spec.rebuilds_input
    ]
    return (*routes, *forward, *back, *returned)


def is_of_layers(route: Route) -> bool:
    """Return whether the message of a route is a tensor of the layers, whatever the objective."""
    return route.name == RETURNED or route.name.startswith(SKIP_PREFIX)


def layer_message(route: Route, micro_batch: MicroBatch | None) -> Tensor:
    """Return the tensor to send on a route of the layers: a skip, its gradient, or the input."""
    assert micro_batch is not None
    if route.name == RETURNED:
        return micro_batch.x.detach()
    if route.name.startswith(SKIP):
        return micro_batch.skip_outputs[route.name.removeprefix(SKIP)].detach()
    skip = micro_batch.skip_inputs[_tensor_name(route)]
    # A block whose loss ignores a skip sends zeros, since the receiver waits for a message.
    return torch.zeros_like(skip) if skip.grad is None else skip.grad


def message_spec(
    objective: Objective, route: Route, specs: Sequence[BlockSpec], rows: int
) -> MessageSpec:
    """Return shape and dtype of the message on a route for a micro-batch of `rows` samples."""
    for prefix, reader in ((SKIP, route.target), (SKIP_GRADIENT, route.source)):
        if route.name.startswith(prefix):
            name = route.name.removeprefix(SKIP) if prefix == SKIP else _tensor_name(route)
            skips = specs[reader.block].skip_inputs
            tensor = next(skip.tensor for skip in skips if skip.tensor.name == name)
            rows = objective.message_rows(specs[reader.block], rows)
            return tensor.shape(rows), tensor.dtype
    if route.name == RETURNED:
        spec = specs[route.target.block]
        return (rows, *spec.output_shape), spec.dtype
    return objective.message_spec(route, specs, rows)


def reads_samples(objective: Objective, spec: BlockSpec, mode: ExecutionMode) -> bool:
    """Return whether a block reads the samples themselves: for the objective or for its layers."""
    return bool(spec.data_inputs) or objective.needs_samples(spec, mode)


def skip_pairs(micro_batch: MicroBatch) -> list[BackwardPair]:
    """Return the skip outputs of a block, each with a gradient that it received."""
    pairs = []
    for name, gradient in micro_batch.received.items():
        if name.startswith(SKIP_GRADIENT):
            tensor = name.removeprefix(SKIP_GRADIENT).rpartition("@")[0]
            pairs.append((micro_batch.skip_outputs[tensor], gradient))
    return pairs


def _gradient_name(tensor: str, block: int) -> str:
    return f"{SKIP_GRADIENT}{tensor}@{block}"


def _tensor_name(route: Route) -> str:
    return route.name.removeprefix(SKIP_GRADIENT).rpartition("@")[0]
