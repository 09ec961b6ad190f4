"""The backward in two halves: `I` computes the input gradient, `W` the weight gradients.

`I` is one `autograd.grad` for the block's input, the outputs of its leaf modules (linear,
convolution, embedding) and the small parameters (norms). `W` then visits the node of each leaf. A
leaf that is called more than once in a forward gets its gradients in `I`.

Invariant: after `I` and `W` of a micro-batch the gradients are, bit for bit, those of one backward.

::

    x ---- conv ---- norm ---- linear ---- loss
    x.grad <----- g <-- (norm) --- g <----- cotangent     I
            conv.weight           linear.weight           W

Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, final

from torch import Tensor, nn

from dtrain import eager_torch
from dtrain.block.micro_batch import MicroBatch

LEAF_MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
"""Modules whose weight gradients `W` computes."""


LeafCall = tuple[nn.Module, Tensor]
"""A leaf module and its output."""


@final
class SplitBackward:
    """Splits the backward of the modules of one block.

    Parameters
    ----------
    roots : iterable of nn.Module
        The block's layers and head; hooks record every call of their leaf modules.
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
        """Return the recorded calls, and start a new record."""
        calls, self.leaf_calls = self.leaf_calls, []
        return calls

    def backward_input(
        self, backward_pairs: Iterable[tuple[Tensor, Tensor]], micro_batch: MicroBatch
    ) -> None:
        """Compute `I`: gradients of the input, of the leaves' outputs and of small parameters.

        Sets `pending_weight_gradients` of the micro-batch for `backward_weight`.
        """
        pairs = [pair for pair in backward_pairs if pair[0].requires_grad]
        if not pairs:
            return
        calls = [*micro_batch.leaf_calls, *self.pop_leaf_calls()]  # of the layers, of the head
        call_counts = Counter(id(module) for module, _ in calls)
        leaves = [
            (module, output)
            for module, output in calls
            if call_counts[id(module)] == 1 and _trainable_parameters(module)
        ]
        leaf_parameters = {id(p) for module, _ in leaves for p in _trainable_parameters(module)}
        inputs = [micro_batch.x, *micro_batch.skip_inputs.values()]
        accumulated = [tensor for tensor in inputs if tensor.requires_grad]
        accumulated += [
            parameter
            for root in self.roots
            for parameter in root.parameters()
            if parameter.requires_grad and id(parameter) not in leaf_parameters
        ]
        tensors, cotangents = zip(*pairs, strict=True)
        outputs = [output for _, output in leaves]
        gradients = eager_torch.gradients(tensors, [*accumulated, *outputs], cotangents)
        for tensor, gradient in zip(accumulated, gradients, strict=False):
            if gradient is not None:
                tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
        micro_batch.pending_weight_gradients = [
            (output, _trainable_parameters(module), gradient)
            for (module, output), gradient in zip(
                leaves, gradients[len(accumulated) :], strict=True
            )
            if gradient is not None
        ]

    @staticmethod
    def backward_weight(micro_batch: MicroBatch) -> None:
        """Compute `W`: add the pending weight gradients."""
        for output, parameters, gradient in reversed(micro_batch.pending_weight_gradients):
            eager_torch.backward([output], [gradient], parameters)
        micro_batch.pending_weight_gradients = []


def _trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse=False) if p.requires_grad]
