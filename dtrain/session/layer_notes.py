"""Notes on the layers of a run, found at its start by running them on two samples.

Invariant: the notes say where one micro-batch is not four; they never stop a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.block.row_check import ROWS, RowCheck, check_rows
from dtrain.comm.communicator import Comm
from dtrain.data.reading.loader import Loader
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.messages import reads_samples
from dtrain.planning.plan import Plan

SHOWN = 4
"""Names that a note lists."""


def layer_notes(
    plan: Plan, blocks: Mapping[int, Block], loader: Loader, control: Comm
) -> list[str]:
    """Return notes on layers that couple samples or keep state. Collective over all ranks."""
    checks = {index: _check_block(plan, block, loader) for index, block in blocks.items()}
    rows = control.allgather_object(
        [[index, check.coupled, check.stateful, check.random] for index, check in checks.items()]
    )
    found = sorted((row for rank in rows for row in rank), key=lambda row: int(row[0]))
    coupled, stateful, random = (
        list(dict.fromkeys(name for row in found for name in row[position]))
        for position in (1, 2, 3)
    )
    settings = plan.run.settings
    parts = settings.micro_batches > 1 or plan.layout.mesh.replicas > 1
    notes = []
    if coupled and plan.data.train.graph is None:
        notes.append(
            f"layer {_listed(coupled)}: a sample's output depends on the other samples of its "
            "micro-batch (attention over the wrong dimension, or statistics of the batch?); "
            "results then depend on micro-batches and replicas"
        )
    if stateful:
        notes.append(
            f"layer {_listed(stateful)} keeps tensors from call to call: one micro-batch is not "
            "four, and a resumed run may differ where they are no buffers"
        )
    if random and parts:
        notes.append(
            f"layer {_listed(random)} draws random numbers (dropout, say) for every micro-batch "
            "and replica: keep both numbers to compare runs"
        )
    return notes


def _check_block(plan: Plan, block: Block, loader: Loader) -> RowCheck:
    """Run one block on two samples, or on random tensors where it gets those of other blocks."""
    objective, spec = plan.layout.objective, plan.layout.block_specs[block.index]
    if plan.layout.block_layouts[block.index].replacement_layers is not None:
        return RowCheck()
    if plan.data.train.size < ROWS or (block.index and not spec.input_shape):
        return RowCheck()
    samples: Tensor | None = None
    others: tuple[Tensor, ...] = ()
    if block.index == 0 or reads_samples(objective, spec, "train"):
        indices = torch.arange(ROWS).numpy()
        samples = loader.dataset.inputs(indices)
        samples = samples.to(plan.layout.dtype) if samples.is_floating_point() else samples
        others = loader.read_other_inputs(indices)
    generator = torch.Generator().manual_seed(0)
    device = next((t.device for t in block.parameters.values()), torch.device("cpu"))
    x = samples if block.index == 0 else _random(plan, block.index, generator)
    if x is None or tuple(x.shape[1:]) != tuple(spec.input_shape):
        return RowCheck()
    skips = {
        skip.tensor.name: torch.randn(skip.tensor.shape(ROWS), generator=generator).to(
            skip.tensor.dtype
        )
        for skip in spec.skip_inputs
    }
    return check_rows(
        block,
        MicroBatch(
            x=x.to(device),
            skip_inputs=_move(skips, device),
            samples=None if samples is None else samples.to(device),
            other_samples=tuple(other.to(device) for other in others),
        ),
    )


def _random(plan: Plan, index: int, generator: torch.Generator) -> Tensor:
    """Return random outputs of the block before."""
    before: BlockSpec = plan.layout.block_specs[index - 1]
    x = torch.randn(ROWS, *before.output_shape, generator=generator, dtype=torch.float64)
    return x.to(before.dtype)


def _move(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _listed(names: Iterable[str]) -> str:
    names = [f"'{name}'" for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
