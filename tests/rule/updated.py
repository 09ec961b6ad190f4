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
from dtrain.block.micro_batch import Given, MicroBatch, RowRandom
from dtrain.build import RankJob, build_rank
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.data import epoch_order
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

    def draws(self, block: int = 0) -> RowRandom:
        """Return the row-wise random numbers of the update in a block."""
        return RowRandom(self.job.plan.run.settings.seed, block, 0, ROWS, 0, ROWS)

    def given(self, **told: Any) -> Given:
        return Given(self.y, samples=self.x, row_random=self.draws(), **told)

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


def predictions(done: Updated, x: Tensor, y: Tensor) -> list[Tensor | None]:
    """Return the scores of each block; messages are passed along the routes."""
    objective, tasks = done.job.engine.objective, done.job.engine.block_specs
    routes, told = objective.routes(len(tasks), "predict"), {}
    scores: list[Tensor | None] = []
    with torch.no_grad():
        for task in tasks:
            block = done.blocks[task.index]
            block.train(False)
            given = Given(y, told, x if task.index == 0 else None)
            fed = objective.make_input(task, block, given)
            live = MicroBatch(**block.run_forward(fed, (), False), targets=y)
            scores.append(objective.predict(task, block, live))
            leaving = [r for r in routes if r.source.block == task.index and r.name != "votes"]
            told = {r.name: objective.make_message(r, block, live) for r in leaving}
            for route in leaving:
                found = told[route.name]
                assert (found.shape, found.dtype) == objective.message_spec(route, tasks, len(y))
    return scores
