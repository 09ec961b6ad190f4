"""What any block of consecutive layers costs, its objective's helper included: analytic counts.

Invariant: pure in the layers' specs and the objective, the same on every machine. What a helper
costs depends on where its block ends alone, so each is counted once.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import nn

from dtrain.models import Spec, count
from dtrain.objectives.objective import GRADIENT, Objective, Task


class Prices:
    """Costs of blocks of the layers ``i .. j-1``, for one sample.

    Parameters
    ----------
    specs : tuple of Spec
        The model's layers.
    objective : Objective
        Whose helpers and feedback are counted.
    classes : int
        Number of labels.
    """

    def __init__(self, specs: tuple[Spec, ...], objective: Objective, classes: int) -> None:
        self.specs, self.objective, self.classes = specs, objective, classes
        totals = (spec.forward + spec.weight_gradient + spec.input_gradient for spec in specs)
        self._sums = [0, *accumulate(totals)]
        self._elements = [0, *accumulate(spec.parameters for spec in specs)]
        self._counted: dict[Task, Spec | None] = {}
        self._helpers = [self._helper(j) for j in range(1, len(specs) + 1)]
        self._feeds_back = any(r.name == GRADIENT for r in objective.routes(2, "train"))

    def flops(self, i: int, j: int) -> int:
        """Return multiply-adds, forward and backward."""
        asked = self._feeds_back and i > 0
        cost = self._sums[j] - self._sums[i] - (0 if asked else self._unasked(i, j))
        helper = self._helpers[j - 1]
        if helper is not None:
            cost += helper.forward + helper.weight_gradient + helper.input_gradient
        return cost

    def parameters(self, i: int, j: int) -> int:
        """Return elements of the layers' and the helper's parameters."""
        return self._elements[j] - self._elements[i] + self.helper_parameters(j)

    def helper_parameters(self, j: int) -> int:
        """Return elements of the helper of a block that ends before layer j."""
        helper = self._helpers[j - 1]
        return 0 if helper is None else helper.parameters

    def task(self, block: int, blocks: int, i: int, j: int) -> Task:
        """Return the task of a block of the layers ``i .. j-1``; the next block is one layer."""
        first, last = self.specs[i], self.specs[j - 1]
        above = self.specs[j].outputs if j < len(self.specs) else ()
        sample = self.specs[0].inputs
        shapes = first.inputs, last.outputs
        return Task(block, blocks, *shapes, last.dtype, self.classes, sample, above)

    def couples(self, j: int) -> bool:
        """Say whether the helper of a block that ends before layer j has batch statistics."""
        helper = self._helpers[j - 1]
        return helper is not None and helper.couples

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

    def _helper(self, j: int) -> Spec | None:
        """Return the spec of the helper of a block that ends before layer j, without memory."""
        last = j == len(self.specs)
        task = self.task(1 if last else 0, 2, 0, j)
        if task not in self._counted:
            self._counted[task] = self._count(task)
        return self._counted[task]

    def _count(self, task: Task) -> Spec | None:
        with torch.device("meta"):
            helper: nn.Module | None = self.objective.build(task)
        if helper is None:
            return None
        shape = self.objective.helped(task)
        if shape is None:
            elements = sum(each.numel() for each in helper.parameters())
            return Spec("", (), (), task.dtype, 0, 0, 0, elements)
        return count(helper.to(task.dtype), shape, task.dtype)
