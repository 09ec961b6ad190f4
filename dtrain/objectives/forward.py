"""The steps of one micro-batch in one block: the same in training, evaluation and memory planning.

::

    F   forward_micro_batch     make_input -> x -- layers --> y
    B   backward_pairs          (the forwards once more -->) objective.backward_pairs

A block that rebuilds its input does so before the forwards are computed once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.block.saved_tensors import SavedTensors
from dtrain.models.graph import has_gradient
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.messages import RETURNED, SKIP, skip_pairs


def forward_micro_batch(
    objective: Objective,
    spec: BlockSpec,
    block: Block,
    micro_batch: MicroBatch,
    needs_input_gradient: bool = False,
    saved_tensors: SavedTensors | None = None,
) -> None:
    """Make the block's input and run its layers; sets `x` and `y` of the micro-batch.

    Parameters
    ----------
    needs_input_gradient : bool
        Whether the gradient of `x` leaves the block; it is computed where `x` is no integer.
    saved_tensors : SavedTensors, optional
        Counts the memory that the micro-batch keeps for its backward.
    """
    with torch.no_grad():
        x = objective.make_input(spec, block, micro_batch).detach()
        if block.inplace_layers and micro_batch.samples is not None:
            x = x.clone()  # a layer may write to its input, and others read the samples
        if block.program is not None:
            micro_batch.skip_inputs = _skip_inputs(block, micro_batch)
    if needs_input_gradient:
        for tensor in (x, *micro_batch.skip_inputs.values()):
            if has_gradient(tensor.dtype):
                tensor.requires_grad_()
    micro_batch.x = x
    if saved_tensors is None:
        block.run_forward(micro_batch, needs_graph=False)
        return
    with saved_tensors.record(micro_batch):
        block.run_forward(micro_batch, objective.needs_graph(spec, micro_batch.pass_))
    saved_tensors.add_micro_batch(micro_batch)


def backward_pairs(
    objective: Objective,
    spec: BlockSpec,
    block: Block,
    micro_batch: MicroBatch,
    saved_tensors: SavedTensors,
) -> list[BackwardPair]:
    """Return the objective's pairs (tensor, cotangent); recompute the forwards if configured."""
    if block.rebuilds_input:
        _rebuild_input(spec, block, micro_batch)
    if block.recompute:
        _recompute_forwards(objective, spec, block, micro_batch, saved_tensors)
    with saved_tensors.record(micro_batch), block.head_rng(micro_batch):
        pairs = list(objective.backward_pairs(spec, block, micro_batch))
    return pairs + skip_pairs(micro_batch) if micro_batch.skip_outputs else pairs


def _skip_inputs(block: Block, micro_batch: MicroBatch) -> dict[str, Tensor]:
    """Take the received skips out of the messages of a micro-batch; return them by name."""
    names = [name for name in micro_batch.received if name.startswith(SKIP)]
    skips = {name.removeprefix(SKIP): micro_batch.received.pop(name).detach() for name in names}
    if block.inplace_layers:  # a leaf must not be written to
        skips = {name: tensor.clone() for name, tensor in skips.items()}
    return skips


def _rebuild_input(spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> None:
    """Set the input of a micro-batch from the output that the next block has returned."""
    output = micro_batch.received.pop(RETURNED)
    micro_batch.x = block.rebuild_input(output, micro_batch.rng_key)
    micro_batch.x.requires_grad_(spec.index > 0)  # the samples have no gradient


def _recompute_forwards(
    objective: Objective,
    spec: BlockSpec,
    block: Block,
    micro_batch: MicroBatch,
    saved_tensors: SavedTensors,
) -> None:
    """Compute all passes of a micro-batch again whose graphs were not kept."""
    passes = micro_batch.passes()
    saved_tensors.drop(micro_batch)
    with saved_tensors.record(micro_batch):
        for forward_pass in passes:
            if objective.needs_graph(spec, forward_pass.pass_):
                block.recompute_forward(forward_pass)
    for forward_pass in passes:
        saved_tensors.add_micro_batch(forward_pass)
