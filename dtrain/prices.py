"""What any block of consecutive layers costs, its objective's helper included: analytic counts.

Invariant: pure in the layers' specs and the objective, the same on every machine. What a helper
costs depends on its task alone, so equal ones are counted once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import nn

from dtrain.models import Model, Spec, count
from dtrain.objectives.objective import GRADIENT, Objective
from dtrain.objectives.task import Later, Task


class Prices:
    """Costs of blocks of the layers ``i .. j-1``, for one sample.

    Parameters
    ----------
    specs : tuple of Spec
        The model's layers.
    objective : Objective
        Whose helpers and feedback are counted.
    model : Model
        Whose layers they are.
    about : Task
        What is the same for all blocks: classes, and what is known of the data.
    seed : int
        Of the layers that an objective makes anew.
    """

    def __init__(
        self,
        specs: tuple[Spec, ...],
        objective: Objective,
        model: Model,
        about: Task,
        seed: int = 0,
    ) -> None:
        self.specs, self.objective, self.model, self.about = specs, objective, model, about
        self.seed = seed
        totals = (spec.forward + spec.weight_gradient + spec.input_gradient for spec in specs)
        self._sums = [0, *accumulate(totals)]
        self._elements = [0, *accumulate(spec.parameters for spec in specs)]
        self._counted: dict[Task, Spec | None] = {}
        self._feeds_back = any(r.name == GRADIENT for r in objective.routes(2, "train"))

    def flops(self, i: int, j: int) -> int:
        """Return multiply-adds, forward and backward, of a block that is still being balanced."""
        task = self._guess(j)
        return self.layers(i, j) * self.objective.copies(task) + total(self.helper(task))

    def parameters(self, i: int, j: int) -> int:
        """Return elements of the layers' and the helper's parameters, likewise."""
        helper = self.helper(self._guess(j))
        return self.elements(i, j) + (helper.parameters if helper else 0)

    def layers(self, i: int, j: int) -> int:
        """Return multiply-adds, forward and backward, of the layers alone."""
        asked = self._feeds_back and i > 0
        return self._sums[j] - self._sums[i] - (0 if asked else self._unasked(i, j))

    def elements(self, i: int, j: int) -> int:
        """Return elements of the layers' parameters."""
        return self._elements[j] - self._elements[i]

    def task(self, block: int, blocks: int, i: int, j: int) -> Task:
        """Return the task of a block of the layers ``i .. j-1``; the next block is one layer."""
        first, last = self.specs[i], self.specs[j - 1]
        above = self.specs[j].outputs if j < len(self.specs) else ()
        return replace(
            self.about,
            block=block,
            blocks=blocks,
            inputs=first.inputs,
            outputs=last.outputs,
            dtype=last.dtype,
            above=above,
            features=last.inputs,
            top=self._later(j - 1)[0] if self.objective.ahead else None,
            later=self._later(j) if self.objective.ahead else (),
        )

    def _later(self, j: int) -> tuple[Later, ...]:
        """Return the layers from j on, as an objective may make them anew."""
        layers = enumerate(self.specs[j:], start=j)
        dtype = self.specs[0].dtype
        return tuple(
            Later(
                spec.name,
                spec.outputs,
                spec.parameters,
                partial(self.model.copy, i, self.seed, dtype),
            )
            for i, spec in layers
        )

    def _unasked(self, i: int, j: int) -> int:
        """Return what autograd saves where nobody asks for the gradient of the block's input.

        It starts at the first layer that has parameters, with their gradients alone.
        """
        saved = 0
        for spec in self.specs[i:j]:
            saved += spec.unasked
            if spec.parameters:
                break
        return saved

    def _guess(self, j: int) -> Task:
        """Return a task that ends before layer j, for a helper that cuts are balanced with."""
        return self.task(1 if j == len(self.specs) else 0, 2, 0, j)

    def helper(self, task: Task) -> Spec | None:
        """Return the spec of a block's helper, without memory; None where there is none."""
        if task not in self._counted:
            self._counted[task] = self._count(task)
        return self._counted[task]

    def _count(self, task: Task) -> Spec | None:
        with torch.device("meta"):
            helper: nn.Module | None = self.objective.build(task)
        if helper is None:
            return None
        shape, name = self.objective.helped(task), f"heads.{task.block}"
        if shape is not None:
            return count(helper.to(task.dtype), shape, task.dtype, name)
        elements = sum(each.numel() for each in helper.parameters())
        norms = nn.modules.batchnorm._BatchNorm
        couples = any(isinstance(each, norms) for each in helper.modules())
        return Spec(name, (), (), task.dtype, 0, 0, 0, elements, couples)


def total(spec: Spec | None) -> int:
    """Return a module's multiply-adds, forward and whole backward; 0 where there is none."""
    return 0 if spec is None else spec.forward + spec.weight_gradient + spec.input_gradient
