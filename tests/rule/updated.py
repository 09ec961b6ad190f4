"""One update of a run through the engine of one rank: the gradients that every block has found.

run ---- plan, build ---> job ---- one update, its step left out ---> gradients by global name
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
from dtrain.data.sampler import epoch_order
from dtrain.planning.plan import make_plan
from tests import tiny

ROWS = 16


class Updated(NamedTuple):
    """A job, the samples and labels of its first update, and the gradients of that."""

    job: RankJob
    x: Tensor
    y: Tensor
    gradients: dict[str, Tensor]

    @property
    def blocks(self) -> dict[int, Block]:
        return self.job.engine.blocks

    def draws(self, block: int = 0) -> RowRandom:
        """Return the random numbers of the update in a block."""
        return RowRandom(self.job.plan.run.settings.seed, block, 0, ROWS, 0, ROWS)

    def given(self, **told: Any) -> Given:
        return Given(self.y, samples=self.x, row_random=self.draws(), **told)

    def passed(self, x: Tensor, detached: bool = True) -> list[list[Tensor]]:
        """Return what each layer of each block makes of x, normed between blocks by hand."""
        made: list[list[Tensor]] = []
        for block in self.blocks.values():
            outs = []
            if made:
                h = made[-1][-1]
                h = h.detach() if detached else h
                flat = h.flatten(1)
                x = (flat / (flat.square().mean(1, keepdim=True).sqrt() + 1e-8)).view_as(h)
            for layer in block.layers.values():
                x = layer(x)
                outs.append(x)
            made.append(outs)
        return made


def updated(begin: Callable[[RankJob], None] = lambda job: None, **told: Any) -> Updated:
    """Return the first update of the tiny run with `told`, in one micro-batch unless told; `begin`
    may change a job before."""
    run = tiny.run(**{"epochs": None, "updates": 1, "micro_batches": 1, "mesh__stages": 1} | told)
    job = build_rank(make_plan(run, 1), Comm(SingleBackend()))
    begin(job)
    found: dict[str, Tensor] = {}
    for block in job.engine.blocks.values():
        block.update = partial(_kept, block, found)  # type: ignore[method-assign]
    agreed = job.plan
    sequence = epoch_order(agreed.data.train.size, run.settings.seed, 0, run.data.shuffle)
    batch = agreed.batch_splitter.batch(sequence, 0, 0)
    assert list(job.engine.run(job.train_loader, [batch], 0, 0)) == [0]
    chosen = sequence[:ROWS]
    samples = agreed.data.train
    return Updated(job, samples.inputs(chosen).double(), samples.targets(chosen), found)


def _kept(block: Block, found: dict[str, Tensor], rule: OptimizerStep | None = None) -> None:
    for name, parameter in block.parameters.items():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
            parameter.grad = None


def autograd(done: Updated, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss that was written out, zeros where it does not reach."""
    named = {n: p for block in done.blocks.values() for n, p in block.parameters.items()}
    told = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), told, strict=True)
    return {n: torch.zeros_like(p) if grad is None else grad for (n, p), grad in pairs}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-12) -> None:
    """Assert equal gradients, and that they are not all zero."""
    assert ours.keys() == theirs.keys()
    assert all(tensor.abs().sum() > 0 for tensor in ours.values())
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=1e-16)


def predicted(done: Updated, x: Tensor, y: Tensor) -> list[Tensor | None]:
    """Return each block's scores, what travels handed over as the routes say."""
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
