"""DiffusionBlocks: every block denoises the code of a label in its own band of noise levels.

Shing, Koyama and Akiba 2025, arXiv 2506.14202; preconditioning of Karras et al. 2022 (EDM), arXiv
2206.00364. The noise level s is log-normal; B blocks have bands of equal probability mass::

    edge_i = exp(P_mean + P_std Phi^-1(c_min + i/B (c_max - c_min)))         i = 0 ... B

with c_min and c_max the masses below `sigma-min` and `sigma-max`. Block b, the noisiest first, has
the band edge_{B-1-b} ... edge_{B-b}. With u_y the code of label y, s drawn from the band, e noise::

    z = u_y + s e              F = block_b(c_in z, x, c_noise)

    "cross-entropy"      loss = cross-entropy(F, y)                 D = sum_c softmax(F)_c u_c
    "squared-error"      loss = lambda |D - u_y|^2 / d              D = c_skip z + c_out F

    c_skip = v / (s^2 + v)      c_in = 1 / sqrt(s^2 + v)            v = sigma-data^2
    c_out = s sqrt(v) / sqrt(s^2 + v)     c_noise = ln(s) / 4       lambda = 1 / c_out^2

    predict    z = sigma-max e     z <- z - (s - s') / s (z - D)    from each level s to a lower s'

The equations 3 and 4 of the paper print a plus before the last term, which would raise the noise.

Deviations: codes are fixed and not learned, of root mean square `sigma-data`; the loss
"cross-entropy" has no weight lambda; the state is a code and not a hidden vector, so blocks need
not have equal input and output widths: see `common.denoising`.

Invariant: a block reads samples, labels and its own noise; nothing is sent in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import loss_pair, scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import head_networks
from dtrain.objectives.common.denoising import DenoiserHead, Denoising, outlet_of
from dtrain.objectives.common.field_checks import check_scale, check_steps
from dtrain.tasks.task import Task


class Scales(NamedTuple):
    """The factors of EDM at some noise levels: c_skip, c_out, c_in, c_noise and lambda."""

    skip: Tensor
    output: Tensor
    input: Tensor
    noise: Tensor
    weight: Tensor


@final
@dataclass(frozen=True)
class DiffusionBlocks(Denoising):
    """Blocks that denoise in bands of equal mass. The last block predicts.

    Parameters
    ----------
    loss : str
        "cross-entropy" or "squared-error".
    p_mean, p_std : float
        Mean and standard deviation of the logarithm of the noise level.
    sigma_min, sigma_max : float
        The smallest and the largest noise level.
    sigma_data : float
        Root mean square of the numbers of a code.
    steps : int
        Euler steps of each block in prediction.

    Raises
    ------
    ConfigError
        A scale is not above 0, or `sigma_max` not above `sigma_min`.
    """

    loss: Literal["cross-entropy", "squared-error"] = "cross-entropy"
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.p_std, default=1.2, key="p-std")
        check_scale(self.sigma_min, default=0.002, key="sigma-min")
        check_scale(self.sigma_data, default=0.5, key="sigma-data")
        check_steps(self.steps)
        if not self.sigma_min < self.sigma_max < math.inf or not math.isfinite(self.p_mean):
            raise ConfigError(
                "objective.sigma-max-too-small",
                f"[objective] sigma-max = {self.sigma_max} must be finite and above sigma-min = "
                f"{self.sigma_min}, and p-mean = {self.p_mean} finite",
            )
        if not self._mass(self.sigma_min) < self._mass(self.sigma_max):
            raise ConfigError(
                "objective.band-without-mass",
                f"[objective] no noise level between sigma-min = {self.sigma_min} and sigma-max = "
                f"{self.sigma_max} is ever drawn with p-mean = {self.p_mean} and p-std = "
                f"{self.p_std}: move exp(p-mean) = {math.exp(self.p_mean):.3g} between them",
            )

    # ---- properties

    @property
    def has_levels(self) -> bool:
        """True: a block learns at all levels of its band."""
        return True

    @property
    def prediction_steps(self) -> int:
        """Return `steps`."""
        return self.steps

    def serves(self, task: Task) -> str | None:
        """Return None where a target is a class; with "squared-error" one per sample, all alike."""
        if self.loss == "cross-entropy":
            return None if task.kind == "classes" else "needs class labels"
        reason = super().serves(task)
        if reason is None and task.has_positions:
            return 'needs one class label per sample with loss = "squared-error"'
        return reason

    def takes_sample_weights(self) -> bool:
        """Whether the loss is that of the task."""
        return self.loss == "cross-entropy"

    def code_length(self, width: int) -> float:
        """Return the length for which the numbers of a code have the root mean square
        `sigma_data`."""
        return self.sigma_data * math.sqrt(width)

    def has_head(self, spec: BlockSpec) -> bool:
        """Whether it is no last block that ends in class scores."""
        return not spec.is_last or self.loss == "squared-error"

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the outlet, to class scores or to codes."""
        if self.loss == "cross-entropy":
            return DenoiserHead(self.class_outlet(block))
        return DenoiserHead(head_networks.greedy(block.output_shape, self.code_width(block)))

    # ---- noise levels

    def band_edges(self, blocks: int, parts: int = 1) -> list[float]:
        """Return the ends of the bands, the lowest first; `parts`: of equal parts of each band."""
        low, high = self._mass(self.sigma_min), self._mass(self.sigma_max)
        count = blocks * parts
        masses = [low + (high - low) * i / count for i in range(1, count)]
        inner = [math.exp(self.p_mean + self.p_std * NormalDist().inv_cdf(m)) for m in masses]
        return [self.sigma_min, *inner, self.sigma_max]

    def step_edges(self, spec: BlockSpec) -> list[float]:
        """Return the levels between the steps of a block in prediction, the highest first."""
        edges = self.band_edges(spec.blocks, self.steps)[::-1]
        return edges[spec.index * self.steps : (spec.index + 1) * self.steps + 1]

    def scales(self, sigma: Tensor) -> Scales:
        """Return the factors at noise levels (rows, ...)."""
        variance = self.sigma_data**2
        total = sigma.square() + variance
        output = sigma * self.sigma_data / total.sqrt()
        return Scales(
            skip=variance / total,
            output=output,
            input=total.rsqrt(),
            noise=sigma.log() / 4,
            weight=total / (sigma * self.sigma_data).square(),
        )

    def euler_step(self, state: Tensor, estimate: Tensor, sigma: float, lower: float) -> Tensor:
        """Return the state (rows, ...) at a lower noise level, given the estimated code."""
        return state - (sigma - lower) / sigma * (state - estimate)

    def _mass(self, sigma: float) -> float:
        """Return the probability of a noise level below `sigma`."""
        return NormalDist().cdf((math.log(sigma) - self.p_mean) / self.p_std)

    def _draw_sigma(self, spec: BlockSpec, micro_batch: MicroBatch) -> Tensor:
        """Return noise levels (rows,) of the block's band, each as likely as under the
        log-normal."""
        low, high = self._mass(self.sigma_min), self._mass(self.sigma_max)
        position = spec.blocks - 1 - spec.index + self.draw_uniform(micro_batch, "level")
        masses = low + (high - low) * position / spec.blocks
        sigma: Tensor = (self.p_mean + self.p_std * torch.special.ndtri(masses)).exp()
        return sigma.clamp(self.sigma_min, self.sigma_max)

    # ---- training

    def training_input(self, spec: BlockSpec, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return c_in z, and c_noise."""
        state, sigma = self._noisy_codes(spec, micro_batch)
        scales = self.scales(sigma)
        return state * self.expand(spec, scales.input), scales.noise

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the loss of the block's estimate."""
        output = outlet_of(block, micro_batch.y)
        if self.loss == "cross-entropy":
            return [loss_pair(micro_batch, output)]
        state, sigma = self._noisy_codes(spec, micro_batch)
        estimate = self._estimate(spec, state, output, self.expand(spec, sigma))
        errors = (estimate - self.clean_codes(spec, micro_batch)).square().mean(-1)
        return [scaled_loss_pair(micro_batch, (self.scales(sigma).weight * errors).mean())]

    def _noisy_codes(self, spec: BlockSpec, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return z (rows, *P, d) and the noise levels (rows,)."""
        sigma = self._draw_sigma(spec, micro_batch)
        noise = self.draw_noise(spec, micro_batch, "noise")
        return self.clean_codes(spec, micro_batch) + self.expand(spec, sigma) * noise, sigma

    def _estimate(self, spec: BlockSpec, state: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        """Return D (rows, *P, d), of an outlet's output."""
        if self.loss == "cross-entropy":
            return self.expected_code(spec, output)
        scales = self.scales(sigma)
        return scales.skip * state + scales.output * output.to(state.dtype)

    # ---- prediction

    def start(self, noise: Tensor) -> Tensor:
        """Return noise of the largest level."""
        return self.sigma_max * noise

    def prediction_input(
        self, spec: BlockSpec, state: Tensor, step: int
    ) -> tuple[Tensor, Tensor | float]:
        """Return c_in z, and c_noise."""
        scales = self.scales(state.new_tensor(self.step_edges(spec)[step]))
        return state * scales.input, scales.noise

    def advance(
        self,
        spec: BlockSpec,
        block: Block,
        micro_batch: MicroBatch,
        state: Tensor,
        step: int,
        chain: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the state after an Euler step, and the block's class scores, or the products of
        the codes and its estimate."""
        sigma, lower = self.step_edges(spec)[step : step + 2]
        output = outlet_of(block, micro_batch.y)
        estimate = self._estimate(spec, state, output, state.new_tensor(sigma))
        after = self.euler_step(state, estimate, sigma, lower)
        if self.loss == "cross-entropy":
            return after, output
        return after, estimate @ self.codes(spec).to(state.device).T / self.sigma_data**2
