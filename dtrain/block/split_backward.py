"""The backward in two halves: `I`, whom others wait for, and `W`, which only this block needs.

`I` is one `autograd.grad` to the block's input, to the outputs of its leaf modules (linear,
convolution, embedding) and to the small parameters (norms); `W` visits each leaf's own node.
A leaf that is called more than once in a forward is learnt in `I`.

Invariant: after `I` and `W` of a micro-batch the gradients are, bit for bit, those of one whole
backward.

::

    x ---- conv ---- norm ---- linear ---- loss
    x.grad <----- g <-- (norm) --- g <----- pull          I
            conv.weight           linear.weight           W

Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from dtrain.block.micro_batch import MicroBatch

LEAF_MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


LeafCall = tuple[nn.Module, Tensor]


@final
class SplitBackward:
    """Halves the backward of the modules that it watches.

    Parameters
    ----------
    roots : iterable of nn.Module
        The block's layers and helper; hooks note every call of their leaves.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        self.leaf_calls: list[LeafCall] = []
        self.roots = list(roots)
        for root in self.roots:
            for module in root.modules():
                if isinstance(module, LEAF_MODULES):
                    module.register_forward_hook(self._record_call)

    def _record_call(self, module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            self.leaf_calls.append((module, output))

    def pop_leaf_calls(self) -> list[LeafCall]:
        """Return the calls since the last time, and forget them."""
        calls, self.leaf_calls = self.leaf_calls, []
        return calls

    def backward_input(
        self, backward_pairs: Iterable[tuple[Tensor, Tensor]], micro_batch: MicroBatch
    ) -> None:
        """`I`: leave ``x.grad`` and the small gradients, and what is owed in ``live.owed``."""
        reached = [(tensor, force) for tensor, force in backward_pairs if tensor.requires_grad]
        if not reached:
            return
        calls = [
            *micro_batch.leaf_calls,
            *self.pop_leaf_calls(),
        ]  # those of the layers, those of the helper
        number = Counter(id(module) for module, _ in calls)
        leaves = [(m, out) for m, out in calls if number[id(m)] == 1 and _trainable_parameters(m)]
        later = {id(weight) for module, _ in leaves for weight in _trainable_parameters(module)}
        own = [p for root in self.roots for p in root.parameters() if p.requires_grad]
        small: list[Tensor] = [p for p in own if id(p) not in later]
        asked = [micro_batch.x] if micro_batch.x.requires_grad else []
        tensors, forces = zip(*reached, strict=True)
        wanted = [*asked, *small, *(out for _, out in leaves)]
        found = torch.autograd.grad(tensors, wanted, forces, retain_graph=True, allow_unused=True)
        for tensor, gradient in zip(asked + small, found, strict=False):
            if gradient is not None:
                tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
        outs = found[len(asked) + len(small) :]
        micro_batch.pending_weight_gradients = [
            (out, _trainable_parameters(module), gradient)
            for (module, out), gradient in zip(leaves, outs, strict=True)
            if gradient is not None
        ]

    @staticmethod
    def backward_weight(micro_batch: MicroBatch) -> None:
        """`W`: add the gradients that are owed."""
        for out, parameters, gradient in reversed(micro_batch.pending_weight_gradients):
            torch.autograd.backward(out, gradient, inputs=parameters)
        micro_batch.pending_weight_gradients = []


def _trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse=False) if p.requires_grad]
