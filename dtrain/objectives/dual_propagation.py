"""Dual propagation: differences of nudged activations take the place of derivatives.

Høier, Staudt and Zach 2023, "Dual Propagation: Accelerating Contrastive Hebbian Learning with
Dyadic Neurons", arXiv 2302.01228. Every activation has two states, which are nudged apart by what
the later layers need; the output is nudged by beta times the gradient of the sample's loss l::

    s_k^+- = phi(a_k +- W_{k+1}^T (s_{k+1}^+ - s_{k+1}^-) / 2)     a_k = W_k s_{k-1} + b_k
    s_K^+- = a_K -+ beta dl/da_K                                   the output
    dW_k  ~ -(s_k^+ - s_k^-) s_{k-1}^T / (2 beta)

One sweep from the output to the input sets all states: here the backward of a micro-batch. With
e_k = -W_{k+1}^T (s_{k+1}^+ - s_{k+1}^-) / (2 beta), the message from layer to layer, it reads::

    -(s_k^+ - s_k^-) / (2 beta) = (phi(a_k + beta e_k) - phi(a_k - beta e_k)) / (2 beta)

The right-hand side is phi'(a_k) e_k + O(beta^2), so the method is backpropagation in which every
activation has a symmetric difference in place of its derivative. phi needs no derivative. The mean
of both states, which later sweeps and the outer product of the paper use, differs from phi(a_k) by
O(beta^2); here it is phi(a_k).

In float32 a small beta loses digits of the difference: 0.1 keeps about four.

Invariant: messages are those of backpropagation; cuts change nothing that is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn
from torch.autograd import Function

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.models.mlp import Dense
from dtrain.objectives.common.repeated_forward import RepeatedForward

ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh),
)
"""Modules that apply one function to every element: their derivatives become differences."""


LINEAR_MODULES = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Dense),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Sequential, nn.Flatten, nn.Identity, nn.Dropout),
)
"""Modules that are linear in their input, or apply their parts in turn."""


@final
@dataclass(frozen=True)
class DualPropagation(RepeatedForward):
    """Backpropagation by differences. The last block predicts; the others have no scores.

    Parameters
    ----------
    beta : float
        Size of the nudge, in gradients of a sample's loss. The error of the gradient grows with its
        square.

    Raises
    ------
    ConfigError
        `beta` is not a finite number above 0.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(
                "objective.beta-not-positive",
                f"[objective] beta = {self.beta} must be above 0, as 0.1",
            )

    def takes_sample_weights(self) -> bool:
        """No: a weight would change the nudge, and with it the error of the difference."""
        return False

    def check_layers(self, layers: Mapping[str, nn.Module], is_chain: bool) -> None:
        """Refuse modules that are neither linear nor functions of single elements, and forwards
        outside modules."""
        advice = 'set objective.name = "backprop"'
        if not is_chain:
            raise ConfigError(
                "objective.needs-chain-of-modules",
                "'dual-propagation' must know every function of the model, so its layers must be a "
                f"chain of modules: return an nn.Sequential, or {advice}",
            )
        for root, layer in layers.items():
            for name, module in layer.named_modules(prefix=root):
                if type(module) not in (*ACTIVATIONS, *LINEAR_MODULES):
                    raise ConfigError(
                        "objective.module-without-difference",
                        f"'dual-propagation' has no rule for module '{name}' "
                        f"({type(module).__name__}): it takes linear layers, convolutions, mean "
                        f"pooling, dropout and activations; change the model, or {advice}",
                    )

    @contextmanager
    def other_derivatives(self, block: Block, micro_batch: MicroBatch) -> Iterator[None]:
        """Give every activation a symmetric difference in place of its derivative."""
        # Gradients are scaled by the micro-batch; nudges are those of each sample's own loss.
        reach = self.beta / (micro_batch.sample_scale or 1.0)
        modules = [module for layer in block.layers.values() for module in layer.modules()]
        dense = [(m, m.activation) for m in modules if isinstance(m, Dense) and m.activation]
        others = [module for module in modules if isinstance(module, ACTIVATIONS)]
        try:
            for module, activation in dense:
                module.activation = _with_difference(activation, reach)
            for other in others:
                vars(other)["forward"] = _with_difference(other.forward, reach)
            yield
        finally:
            for module, activation in dense:
                module.activation = activation
            for other in others:
                del vars(other)["forward"]


def _with_difference(phi: Callable[[Tensor], Tensor], reach: float) -> Callable[[Tensor], Tensor]:
    def call(a: Tensor) -> Tensor:
        output: Tensor = SymmetricDifference.apply(a, phi, reach)  # type: ignore[no-untyped-call]
        return output

    return call


class SymmetricDifference(Function):
    """phi(a), with (phi(a + r e) - phi(a - r e)) / (2 r) as the product of its derivative and e."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, phi: Callable[[Tensor], Tensor], reach: float) -> Tensor:
        """Return phi(a); phi may work in place."""
        ctx.save_for_backward(a)
        ctx.phi, ctx.reach = phi, reach
        return phi(a.clone())

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """Return the difference in the direction of the cotangent."""
        (a,), (e,) = ctx.saved_tensors, cotangents
        step = ctx.reach * e
        return (ctx.phi(a + step) - ctx.phi(a - step)) / (2 * ctx.reach), None, None
