"""NoProp: every block removes noise from a label, at its own level, and learns alone.

Li, Teh and Pascanu 2025, arXiv 2503.24322. Blocks t = 1 ... T, u_y the code of label y, e normal
noise. Discrete time, with signal levels a_0 = 0 < ... < a_T (the paper's alpha-bar) and
SNR_t = a_t / (1 - a_t)::

    q(z_t | y) = N(sqrt(a_t) u_y, 1 - a_t)          u^_t = sum_c softmax(block_t(x, z_{t-1}))_c u_c

    loss_t = T/2 eta (SNR_t - SNR_{t-1}) |u^_t - u_y|^2                   z_{t-1} from q
    loss_T + cross-entropy of classifier(z_T)                             z_T from q

    predict    z_0 = e        z_t = a u^_t + b z_{t-1} + sqrt(c) e        classifier(z_T)

The term KL(q(z_0 | y) || N(0, 1)) of the paper is zero, since a_0 = 0. Form "flow" (flow matching):
block t learns the velocity at times s of its interval of 0 ... 1::

    z_s = (1 - s) z_0 + s u_y               loss_t = |v_t(x, z_s, s) - (u_y - z_0)|^2
    loss_T + cross-entropy of classifier(z_s + (1 - s) v_T)               its input detached

    predict    z_0 = e        z <- z + ds v_t(x, z, s), `steps` per block          classifier(z_1)

Deviations: codes are fixed, not learned, since learned ones would be sent; blocks are those of the
user's model behind an inlet (see `common.denoising`); the paper's signal levels are not known to
us, ours are final * sin^2(pi t / 2T).

Invariant: a block reads samples, labels and its own noise; nothing is sent in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import head_networks
from dtrain.objectives.common.denoising import (
    DenoiserHead,
    Denoising,
    chain_noise,
    outlet_of,
)
from dtrain.objectives.common.field_checks import check_scale, check_steps
from dtrain.tasks.task import Task


class ChainStep(NamedTuple):
    """One step of the chain: z_t = code u + state z_{t-1} + sqrt(variance) e.

    Attributes
    ----------
    code, state, variance : float
        a, b and c of the paper.
    gain : float
        SNR_t - SNR_{t-1}, which is code^2 / variance.
    """

    code: float
    state: float
    variance: float
    gain: float

    @staticmethod
    def between(before: float, after: float) -> ChainStep:
        """Return the step between two signal levels, 0 <= before < after < 1."""
        gap, noise = after - before, 1 - before  # gap: after (1 - alpha), alpha = before / after
        return ChainStep(
            code=gap / (math.sqrt(after) * noise),
            state=math.sqrt(before / after) * (1 - after) / noise,
            variance=(1 - after) * gap / (after * noise),
            gain=gap / ((1 - after) * noise),
        )


def signal_levels(blocks: int, final_level: float) -> list[float]:
    """Return a_0 ... a_T of T blocks: 0, then along a squared sine to `final_level`."""
    angles = [math.pi * t / (2 * blocks) for t in range(blocks)]
    return [*(final_level * math.sin(angle) ** 2 for angle in angles), final_level]


@final
@dataclass(frozen=True)
class Noprop(Denoising):
    """Blocks that denoise a label alone. The last block predicts, by a classifier of z_T.

    Parameters
    ----------
    form : str
        "discrete" or "flow".
    eta : float
        Factor of the denoising loss of "discrete".
    final_level : float
        a_T of "discrete", between 0 and 1: how clean the last state is.
    steps : int
        Of "flow": Euler steps of each block in prediction.

    Raises
    ------
    ConfigError
        `eta`, `final_level` or `steps` is out of range.
    """

    form: Literal["discrete", "flow"] = "discrete"
    eta: float = 0.1
    final_level: float = 0.99
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.eta, default=0.1, key="eta")
        check_steps(self.steps)
        if not 0 < self.final_level < 1:
            raise ConfigError(
                "objective.final-level-out-of-range",
                f"[objective] final-level = {self.final_level} must be between 0 and 1, both "
                "excluded (default 0.99)",
            )
        if self.form == "discrete" and self.steps != 1:
            raise ConfigError(
                "objective.steps-without-flow",
                f'[objective] steps = {self.steps} belongs to form = "flow": a block of '
                '"discrete" has one step',
            )

    @property
    def has_levels(self) -> bool:
        """Whether a block learns at several times: with "flow"."""
        return self.form == "flow"

    @property
    def prediction_steps(self) -> int:
        """Return the Euler steps of a block; one with "discrete"."""
        return self.steps

    def serves(self, task: Task) -> str | None:
        """Return None where a target is a class, with "flow" one per sample."""
        reason = super().serves(task)
        if reason is None and self.form == "flow" and task.has_positions:
            return 'needs one class label per sample with form = "flow"'
        return reason

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the outlet, to class scores or with "flow" to velocities, and in the last block
        the classifier."""
        width, classifier = self.code_width(block), None
        if block.is_last:  # it starts with the codes, so that it is right about clean states
            classifier = nn.Linear(width, block.classes)
            with torch.no_grad():
                classifier.weight.copy_(self.codes(block))
                classifier.bias.zero_()
        if self.form == "flow":
            return DenoiserHead(head_networks.greedy(block.output_shape, width), classifier)
        return DenoiserHead(None if block.is_last else self.class_outlet(block), classifier)

    def has_head(self, spec: BlockSpec) -> bool:
        """True: the last block has the classifier."""
        return True

    # ---- training

    def chain_step(self, spec: BlockSpec) -> ChainStep:
        """Return the step of a block."""
        levels = signal_levels(spec.blocks, self.final_level)
        return ChainStep.between(*levels[spec.index : spec.index + 2])

    def training_input(self, spec: BlockSpec, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return z_{t-1} of q(. | y), or with "flow" z_s at a time s of the block's interval."""
        clean = self.clean_codes(spec, micro_batch)
        noise = self.draw_noise(spec, micro_batch, "noise")
        if self.form == "flow":
            times = self._times(spec, micro_batch)
            factor = self.expand(spec, times)
            return (1 - factor) * noise + factor * clean, times
        level = signal_levels(spec.blocks, self.final_level)[spec.index]
        return math.sqrt(level) * clean + math.sqrt(1 - level) * noise, clean.new_zeros(len(clean))

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the denoising loss, and in the last block that of the classifier, too."""
        output = outlet_of(block, micro_batch.y)
        clean = self.clean_codes(spec, micro_batch)
        if self.form == "flow":
            noise = self.draw_noise(spec, micro_batch, "noise")
            loss = squared_error(output.to(clean.dtype), clean - noise)
        else:
            weight = spec.blocks / 2 * self.eta * self.chain_step(spec).gain
            loss = weight * squared_error(self.expected_code(spec, output), clean)
        micro_batch.metrics["denoising"] = loss.detach()
        if spec.is_last:
            state = self._final_state(spec, micro_batch, output, clean)
            scores = self._classify(spec, block, state)
            cross_entropy = micro_batch.mean_loss(scores)
            micro_batch.metrics["classifier"] = cross_entropy.detach()
            loss = loss + cross_entropy
        return [scaled_loss_pair(micro_batch, loss)]

    def _final_state(
        self, spec: BlockSpec, micro_batch: MicroBatch, output: Tensor, clean: Tensor
    ) -> Tensor:
        """Return z_T of q(. | y), or with "flow" the end to which the velocity leads, detached."""
        if self.form == "flow":
            state, times = self.training_input(spec, micro_batch)
            return state + (1 - self.expand(spec, times)) * output.detach().to(clean.dtype)
        noise = self.draw_noise(spec, micro_batch, "end")
        return math.sqrt(self.final_level) * clean + math.sqrt(1 - self.final_level) * noise

    def _times(self, spec: BlockSpec, micro_batch: MicroBatch) -> Tensor:
        """Return times (rows,) in the interval of the block."""
        return (spec.index + self.draw_uniform(micro_batch, "time")) / spec.blocks

    def _classify(self, spec: BlockSpec, block: Block, state: Tensor) -> Tensor:
        """Return the class scores of a state (rows, *P, d)."""
        assert isinstance(block.head, DenoiserHead)
        assert block.head.classifier is not None
        scores: Tensor = block.head.classifier(state.to(block.head.classifier.weight.dtype))
        return self.as_scores(spec, scores)

    # ---- prediction

    def start(self, noise: Tensor) -> Tensor:
        """Return the noise itself."""
        return noise

    def prediction_input(
        self, spec: BlockSpec, state: Tensor, step: int
    ) -> tuple[Tensor, Tensor | float]:
        """Return the state itself, and its time."""
        return state, (spec.index + step / self.steps) / spec.blocks

    def advance(
        self,
        spec: BlockSpec,
        block: Block,
        micro_batch: MicroBatch,
        state: Tensor,
        step: int,
        chain: int,
    ) -> tuple[Tensor, Tensor]:
        """Return z_t, or with "flow" the state after an Euler step, and class scores.

        Those of the last block are the classifier's. An earlier block has its own, or with "flow"
        the products of the codes and the end to which its velocity leads.
        """
        output = outlet_of(block, micro_batch.y)
        if self.form == "flow":
            time = self.prediction_input(spec, state, step)[1]
            velocity = output.to(state.dtype)
            scores = (state + (1 - time) * velocity) @ self.codes(spec).to(state.device).T
            state = state + velocity / (spec.blocks * self.steps)
        else:
            place, scores = self.chain_step(spec), output
            noise = self.draw_noise(spec, micro_batch, chain_noise("step", chain))
            mean = place.code * self.expected_code(spec, output) + place.state * state
            state = mean + math.sqrt(place.variance) * noise
        return state, self._classify(spec, block, state) if spec.is_last else scores


def squared_error(estimate: Tensor, target: Tensor) -> Tensor:
    """Return |estimate - target|^2 (), summed over the last dimension, a mean over all others."""
    return (estimate - target).square().sum(-1).mean()
