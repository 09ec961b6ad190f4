"""Perturbed heads: a block learns from estimates of gradients that need no backward through it.

::

    clean        x --- linear --z1-- ReLU --- linear --z2-- y --- heads.b --- l
    perturbed    x --- linear --z1 + noise-- ReLU --- linear --z2 + noise-- y' --- heads.b --- l'

    s            how much the loss of a sample changes along its noise v, one number per sample
    g = s v      estimate of the loss's gradient at z1 and z2
    W1 learns    the outer product of g and the input of its own linear layer

The perturbed tensors are the outputs of all modules with trained parameters (for `mlp`: the
pre-activations). A module learns from the estimate at its own output and from its own input, so no
gradient passes from module to module; that of a module around others passes to the next perturbed
output. The head, and the last module of the model where the
prediction is its output, learn from their exact gradients: those are local.

Invariant: noise is drawn for the whole update under (seed, block, update, perturbation, module) and
sliced by row, so micro-batches and replicas do not change it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Generator, Tensor, nn

from dtrain.block.block import BackwardPair, Block
from dtrain.block.leaf_calls import leaf_modules, replaced_outputs
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import loss_pair, output_error
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.aux_heads import NetworkHead

VARIANCE, SQUARE = "estimate_variance", "estimate_square"
"""Recorded per block: the variance of a sample's estimate, summed over its elements, and its
squared norm."""


Distribution = Literal["normal", "signs"]


class CleanForward(NamedTuple):
    """A forward without noise.

    Attributes
    ----------
    outputs : dict of str to Tensor
        Output of each module with trained parameters, with the graph of that module alone.
    y : Tensor
        Output of the block.
    exact : str or None
        The module whose output is the model's prediction.
    """

    outputs: dict[str, Tensor]
    y: Tensor
    exact: str | None


@dataclass(frozen=True)
class PerturbedHead(NetworkHead):
    """A network per earlier block, whose loss is measured with noise in the block. The last block
    predicts, and measures the loss of the model; the vote is the sum of the scores.

    Parameters
    ----------
    perturbations : int
        Estimates of which an update learns the mean. Each takes forwards of the block, and the
        variance falls with their number.
    distribution : str
        Of the noise: "normal", or "signs" (quantised: 1 or -1), whose variance is smaller by two
        squared norms of the gradient.

    Raises
    ------
    ConfigError
        `perturbations` is less than 1, or a key of the head is out of range.
    """

    recomputes: ClassVar[bool] = True

    perturbations: int = 1
    distribution: Distribution = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perturbations < 1:
            raise ConfigError(
                "objective.perturbations-too-few",
                f"[objective] perturbations = {self.perturbations} must be at least 1",
            )

    @property
    def cure(self) -> str:
        """The end of an error message on a module whose output cannot be perturbed."""
        return "choose another objective"

    @property
    def extra_forwards(self) -> int:
        """Forwards of all perturbations; one with tangents counts as two."""
        return self.perturbations

    def forward_passes(self, spec: BlockSpec) -> int:
        """Return forwards, repeated forwards and outer products in units of a forward and a
        backward, rounded up."""
        return 1 + -(-self.extra_forwards // 3)

    @abstractmethod
    def loss_changes(
        self, forward: PerturbedForward, noise: Mapping[str, Tensor], micro_batch: MicroBatch
    ) -> Tensor:
        """Return the change (rows,) of each sample's own loss per unit of its noise; `noise` holds
        that of each module's output, (rows, ...)."""

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the outputs of the modules with the estimates of their gradients, and the loss of
        the head."""
        modules = leaf_modules(block.layers)
        if not modules:
            return self.head_pairs(spec, block, micro_batch, micro_batch.y)
        clean = self.clean_forward(spec, block, micro_batch, modules)
        outputs = {name: z for name, z in clean.outputs.items() if name != clean.exact}
        with kept_buffers(block.head):
            estimates = self.estimate(spec, block, micro_batch, modules, outputs)
        scale = micro_batch.sample_scale
        pairs = [(outputs[name], scale * estimate) for name, estimate in estimates.items()]
        if clean.exact is not None:
            micro_batch.loss = micro_batch.mean_loss(clean.y).detach()
            pairs.append((clean.outputs[clean.exact], scale * output_error(micro_batch)))
        return pairs + self.head_pairs(spec, block, micro_batch, clean.y)

    def head_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch, y: Tensor
    ) -> list[BackwardPair]:
        """Return the loss of the head for the detached output y; in the last block only record
        the model's loss."""
        if block.head is None:
            micro_batch.loss = micro_batch.mean_loss(y).detach()
            return []
        return [loss_pair(micro_batch, block.head(y.detach()))]

    def clean_forward(
        self,
        spec: BlockSpec,
        block: Block,
        micro_batch: MicroBatch,
        modules: Mapping[str, nn.Module],
    ) -> CleanForward:
        """Run the layers without noise; every module has a graph of its own.

        Raises
        ------
        ConfigError
            A module has no output that can be perturbed.
        """
        outputs: dict[str, Tensor] = {}
        last: list[Tensor] = []

        def record(name: str, z: Tensor) -> Tensor:
            if len(z) != len(micro_batch.targets):
                raise self._no_output(name, f"returned {tuple(z.shape)}, without samples first")
            outputs[name] = z
            last[:] = [z.detach().clone() if block.inplace_layers else z.detach()]
            return last[0]

        with torch.enable_grad(), replaced_outputs(modules, record):
            y = block.repeat_forward(micro_batch).y
        for name in modules:
            if name not in outputs:
                raise self._no_output(name, "returned no tensor, or was not called")
        exact = [*outputs][-1] if spec.is_last and y is last[0] else None
        return CleanForward(outputs, y.detach(), exact)

    def _no_output(self, name: str, reason: str) -> ConfigError:
        return ConfigError(
            "objective.output-not-perturbable",
            f"module '{name}' {reason}, so its output cannot be perturbed: {self.cure}",
        )

    def estimate(
        self,
        spec: BlockSpec,
        block: Block,
        micro_batch: MicroBatch,
        modules: Mapping[str, nn.Module],
        outputs: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the estimated gradient (rows, ...) of each sample's own loss at each output;
        record its variance and its squared norm."""
        means = {name: torch.zeros_like(z) for name, z in outputs.items()}
        if not means:
            return means
        forward = PerturbedForward(self, spec, block, micro_batch, modules)
        squares: Tensor | float = 0.0
        for number in range(self.perturbations):
            noise = {name: self.draw(micro_batch, number, name, z) for name, z in outputs.items()}
            changes = self.loss_changes(forward, noise, micro_batch)
            for name, v in noise.items():
                means[name] += v * per_row(changes / self.perturbations, v)
            squares = squares + changes**2 * squared_norms(noise)
        record_estimate(micro_batch, squares, squared_norms(means), self.perturbations)
        return means

    def draw(self, micro_batch: MicroBatch, number: int, name: str, z: Tensor) -> Tensor:
        """Return the noise (rows, ...) of one perturbation for an output z."""
        shape = z.shape[1:]
        numbers = micro_batch.row_random.generate(
            f"perturbation {number} {name}",
            lambda rows, generator: draw_noise(
                self.distribution, (rows, *shape), z.dtype, generator
            ),
        )
        return numbers.to(z.device)


@final
class PerturbedForward:
    """Runs block and head of a micro-batch, with the outputs of modules replaced.

    Parameters
    ----------
    modules : mapping of str to nn.Module
        The modules with trained parameters.
    """

    def __init__(
        self,
        objective: PerturbedHead,
        spec: BlockSpec,
        block: Block,
        micro_batch: MicroBatch,
        modules: Mapping[str, nn.Module],
    ) -> None:
        self.objective, self.spec, self.block = objective, spec, block
        self.micro_batch, self.modules = micro_batch, modules

    @torch.no_grad()
    def __call__(self, replace: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Return the prediction (rows, ...)."""
        with replaced_outputs(self.modules, replace):
            again = self.block.repeat_forward(self.micro_batch)
        return self.objective.predict(self.spec, self.block, again)

    @torch.no_grad()
    def clean_prediction(self) -> Tensor:
        """Return the prediction (rows, ...) without noise."""
        return self.objective.predict(self.spec, self.block, self.micro_batch)


def draw_noise(
    distribution: Distribution, shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> Tensor:
    """Return noise of mean 0 and variance 1, with independent elements."""
    if distribution == "signs":
        return torch.randint(0, 2, shape, generator=generator).to(dtype) * 2 - 1
    return torch.randn(shape, dtype=dtype, generator=generator)


def per_row(numbers: Tensor, like: Tensor) -> Tensor:
    """Return numbers (rows,) with as many dimensions as `like` (rows, ...)."""
    return numbers.view(-1, *[1] * (like.dim() - 1))


def squared_norms(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the squared norm (rows,) of each sample over all tensors (rows, ...)."""
    norms = [tensor.flatten(1).square().sum(1) for tensor in tensors.values()]
    return torch.stack(norms).sum(0)


def record_estimate(
    micro_batch: MicroBatch, squares: Tensor | float, mean_square: Tensor, perturbations: int
) -> None:
    """Record the variance of the mean of several estimates, and its squared norm.

    With one estimate its squared norm stands for the variance, from which it differs by the squared
    norm of the gradient: a part 1 / (n + 2) with n normal numbers.

    Parameters
    ----------
    squares : Tensor
        Sum of the squared norms of the estimates, (rows,).
    mean_square : Tensor
        Squared norm of their mean, (rows,).
    """
    variance = mean_square
    if perturbations > 1:
        variance = (squares / perturbations - mean_square) / (perturbations - 1)
    micro_batch.metrics[VARIANCE] = variance.mean()
    micro_batch.metrics[SQUARE] = mean_square.mean()


@contextmanager
def kept_buffers(head: nn.Module | None) -> Iterator[None]:
    """Restore the buffers of a head, such as batch statistics, when the body has run."""
    buffers = [] if head is None else list(head.buffers())
    values = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
