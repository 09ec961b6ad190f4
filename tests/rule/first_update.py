"""One update of a run through the engine of one rank, without the optimizer step.

run ---- plan, build ---> job ---- one update ---> gradients by global name
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrain.block.block import Block, OptimizerStep
from dtrain.block.micro_batch import MicroBatch, RowRandom
from dtrain.build import RankJob, build_rank
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.data.sampler import epoch_order
from dtrain.objectives.forward import forward_micro_batch
from dtrain.planning.plan import make_plan
from tests import tiny

ROWS = 16


class Updated(NamedTuple):
    """A job, the samples and labels of its first update, and the gradients of that update."""

    job: RankJob
    x: Tensor
    y: Tensor
    gradients: dict[str, Tensor]

    @property
    def blocks(self) -> dict[int, Block]:
        return self.job.engine.blocks

    def row_random(self) -> RowRandom:
        """Return the row-wise random numbers of the update in block 0."""
        return RowRandom(self.job.plan.run.settings.seed, 0, 0, ROWS, 0, ROWS)

    def micro_batch(self) -> MicroBatch:
        """Return the micro-batch in block 0 before its forward."""
        return MicroBatch(targets=self.y, samples=self.x, row_random=self.row_random())

    def layer_outputs(self, x: Tensor, detached: bool = True) -> list[list[Tensor]]:
        """Return the outputs of all layers, block by block, normalised between blocks by hand."""
        outputs: list[list[Tensor]] = []
        for block in self.blocks.values():
            layer_outputs = []
            if outputs:
                h = outputs[-1][-1]
                h = h.detach() if detached else h
                flat = h.flatten(1)
                x = (flat / (flat.square().mean(1, keepdim=True).sqrt() + 1e-8)).view_as(h)
            for layer in block.layers.values():
                x = layer(x)
                layer_outputs.append(x)
            outputs.append(layer_outputs)
        return outputs


def first_update(before: Callable[[RankJob], None] = lambda job: None, **changes: Any) -> Updated:
    """Return the first update of the tiny run with `changes`, by default in one micro-batch;
    `before` may change the job."""
    defaults = {"epochs": None, "updates": 1, "micro_batches": 1, "mesh__stages": 1}
    run = tiny.run(**defaults | changes)
    job = build_rank(make_plan(run, 1), Comm(SingleBackend()))
    before(job)
    gradients: dict[str, Tensor] = {}
    for block in job.engine.blocks.values():
        block.update = partial(_take, block, gradients)  # type: ignore[method-assign]
    plan = job.plan
    sequence = epoch_order(plan.data.train.size, run.settings.seed, 0, run.data.shuffle)
    batch = plan.batch_splitter.batch(sequence, 0, 0)
    assert list(job.engine.run(job.train_loader, [batch], 0, 0)) == [0]
    indices = sequence[:ROWS]
    samples = plan.data.train
    return Updated(job, samples.inputs(indices).double(), samples.targets(indices), gradients)


def _take(block: Block, gradients: dict[str, Tensor], step: OptimizerStep | None = None) -> None:
    """Move the gradients of a block to `gradients`, in place of its update."""
    for name, parameter in block.parameters.items():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
            parameter.grad = None


def autograd(update: Updated, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss by autograd; zeros for parameters that it does not use."""
    named = {n: p for block in update.blocks.values() for n, p in block.parameters.items()}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), gradients, strict=True)
    return {n: torch.zeros_like(p) if grad is None else grad for (n, p), grad in pairs}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-12) -> None:
    """Assert equal gradients, none of which is zero."""
    assert ours.keys() == theirs.keys()
    assert all(tensor.abs().sum() > 0 for tensor in ours.values())
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=1e-16)


def predictions(update: Updated, x: Tensor, y: Tensor) -> list[Tensor | None]:
    """Return the scores of each block; messages are passed along the routes."""
    objective, specs = update.job.engine.objective, update.job.engine.block_specs
    routes = objective.routes(len(specs), "predict")
    messages: dict[str, Tensor] = {}
    scores: list[Tensor | None] = []
    with torch.no_grad():
        for spec in specs:
            block = update.blocks[spec.index]
            block.train(False)
            samples = x if spec.index == 0 else None
            micro_batch = MicroBatch(targets=y, received=messages, samples=samples)
            forward_micro_batch(objective, spec, block, micro_batch)
            scores.append(objective.predict(spec, block, micro_batch))
            outgoing = [r for r in routes if r.source.block == spec.index and r.name != "votes"]
            messages = {r.name: objective.make_message(r, block, micro_batch) for r in outgoing}
            for route in outgoing:
                message = messages[route.name]
                expected = objective.message_spec(route, specs, len(y))
                assert (message.shape, message.dtype) == expected
    return scores
