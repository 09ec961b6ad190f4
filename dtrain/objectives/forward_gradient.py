"""Forward gradients: a block learns from directional derivatives, without a backward through it.

Baydin et al. 2022, "Gradients without Backpropagation", arXiv 2202.08587; Ren et al. 2023, "Scaling
Forward Gradient With Local Losses", arXiv 2210.03310. Noise v of mean 0 and variance 1 is added as
a tangent to the activations, and one forward carries it to the loss l of the block's own head
(forward-mode differentiation)::

    s = <grad l, v>    g = s v    E g = grad l    E |g|^2 = (n + 2) |grad l|^2    v normal (n,)
                                                  E |g|^2 =  n      |grad l|^2    v of signs

`perturb` = "activations" (Ren et al.): v belongs to the outputs of the modules of the block, one
per sample, as in `common/perturbed_heads`; n counts the activations of one sample. "parameters"
(Baydin et al.): v belongs to the weights, one for the whole update, and a weight learns s v with
the mean loss. Then n counts the weights of the block, which makes the variance too large for all
but tiny blocks. The last block does the same with the model's loss, so one block is not ordinary
backpropagation: its estimate is, in the mean.

Invariant: the loss of a block moves no weight of another one, and no module's gradient is passed on
to another module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtrain import eager_torch
from dtrain.block.block import BackwardPair, Block
from dtrain.block.leaf_calls import parameter_tangents
from dtrain.block.micro_batch import MicroBatch
from dtrain.block.parameters import is_head_name
from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.perturbed_heads import (
    PerturbedForward,
    PerturbedHead,
    draw_noise,
    kept_buffers,
    record_estimate,
)


@final
@dataclass(frozen=True)
class ForwardGradient(PerturbedHead):
    """Forward gradients of a head's loss. The last block predicts; the vote is the sum of the
    scores.

    Parameters
    ----------
    perturb : str
        The noise is added to "activations" (of modules with parameters) or to "parameters".
    """

    perturb: Literal["activations", "parameters"] = "activations"

    @property
    def cure(self) -> str:
        """The end of an error message on a module whose output cannot be perturbed."""
        return 'set [objective] perturb = "parameters", or choose another objective'

    @property
    def extra_forwards(self) -> int:
        """Return 2 for each perturbation: values and tangents."""
        return 2 * self.perturbations

    def loss_changes(
        self, forward: PerturbedForward, noise: Mapping[str, Tensor], micro_batch: MicroBatch
    ) -> Tensor:
        """Return the derivative (rows,) of each sample's own loss along its noise."""

        def add_tangent(name: str, z: Tensor) -> Tensor:
            v = noise.get(name)
            if v is None:
                return z
            primal, tangent = eager_torch.unpack_dual(z)
            return eager_torch.make_dual(primal, v if tangent is None else tangent + v)

        with eager_torch.dual_level():
            return derivatives(_with_tangents(forward, add_tangent), micro_batch)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return activations or weights with the estimates of their gradients, and the loss of the
        head."""
        if self.perturb == "activations":
            return super().backward_pairs(spec, block, micro_batch)
        with kept_buffers(block.head):
            pairs = self._parameter_pairs(spec, block, micro_batch)
        return pairs + self.head_pairs(spec, block, micro_batch, micro_batch.y)

    def _parameter_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the weights of the layers with their estimates; record the variance."""
        parameters = {
            name: parameter
            for name, parameter in block.parameters.items()
            if parameter.requires_grad and not is_head_name(name)
        }
        if not parameters:
            return []
        forward = PerturbedForward(self, spec, block, micro_batch, {})
        noises, changes = [], []
        for number in range(self.perturbations):
            noise = {
                name: self._draw_shared(micro_batch, number, name, parameter)
                for name, parameter in parameters.items()
            }
            tangents = {id(parameters[name]): v for name, v in noise.items()}
            with eager_torch.dual_level(), parameter_tangents(block, tangents):
                output = _with_tangents(forward, lambda _name, z: z)
                changes.append(derivatives(output, micro_batch))
            noises.append(noise)
        per_sample = torch.stack(changes)  # (perturbations, rows)
        self._record(micro_batch, per_sample, noises)
        sums = micro_batch.sample_scale / self.perturbations * per_sample.sum(1)
        return [
            (parameter, sum_of(noises, name, sums).to(parameter))
            for name, parameter in parameters.items()
        ]

    def _draw_shared(
        self, micro_batch: MicroBatch, number: int, name: str, parameter: Tensor
    ) -> Tensor:
        """Return the noise of one perturbation for a weight, the same for the whole update."""
        numbers = micro_batch.row_random.generate_shared(
            f"perturbation {number} {name}",
            lambda generator: draw_noise(
                self.distribution, tuple(parameter.shape), parameter.dtype, generator
            ),
        )
        return numbers.to(parameter.device)

    def _record(
        self, micro_batch: MicroBatch, changes: Tensor, noises: list[dict[str, Tensor]]
    ) -> None:
        """Record variance and squared norm of the estimates s v, with the same v for all rows."""
        flat = torch.stack([torch.cat([v.flatten() for v in noise.values()]) for noise in noises])
        products = flat @ flat.T
        squares = (changes.square() * products.diagonal()[:, None]).sum(0)
        mean_square = torch.einsum("kr,kl,lr->r", changes, products, changes) / len(noises) ** 2
        record_estimate(micro_batch, squares, mean_square, len(noises))


def sum_of(noises: list[dict[str, Tensor]], name: str, factors: Tensor) -> Tensor:
    """Return the sum of one weight's noises, each times its factor, of `factors` (noises,)."""
    return torch.stack([f * noise[name] for f, noise in zip(factors, noises, strict=True)]).sum(0)


def derivatives(output: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Return the derivative (rows,) of each sample's own loss, given a prediction (rows, ...) with
    its tangent."""
    primal, tangent = eager_torch.unpack_dual(output)
    if tangent is None:
        return primal.new_zeros(len(primal))
    gradient = micro_batch.task.output_gradient(
        primal.detach(), micro_batch.targets, micro_batch.weights
    )
    return (tangent * gradient).view(len(primal), -1).sum(1)


def _with_tangents(forward: PerturbedForward, replace: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Run a forward that carries tangents; refuse an operation that cannot.

    Attention and recurrent layers run kernels that can: fused ones have no forward mode.
    """
    with sdpa_kernel(SDPBackend.MATH):
        try:
            return forward(replace)
        except NotImplementedError:
            eager_torch.load_forward_formulas()
        try:
            with eager_torch.without_onednn():
                return forward(replace)
        except NotImplementedError as error:
            raise ConfigError(
                "objective.no-forward-mode",
                f"block {forward.spec.index} has an operation without forward-mode "
                f"differentiation ({str(error).partition('.')[0]}): set objective.name = "
                '"ulr", which needs none',
            ) from error
