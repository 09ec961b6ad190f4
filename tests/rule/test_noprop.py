"""NoProp: the chain of signal levels, and the losses of its blocks, against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dtrain.block.micro_batch import RowRandom
from dtrain.objectives.noprop import ChainStep, Noprop, signal_levels

D = torch.float64


@pytest.mark.parametrize("blocks", [1, 2, 5, 10, 40])
def test_a_step_of_the_chain_keeps_its_identities(blocks: int) -> None:
    """a^2 / c = SNR_t - SNR_{t-1}; a step with the true code has the marginal of the next level."""
    levels = signal_levels(blocks, 0.99)
    assert (levels[0], levels[-1]) == (0.0, 0.99)
    assert levels == sorted(levels)
    for before, after in itertools.pairwise(levels):
        step = ChainStep.between(before, after)
        gain = after / (1 - after) - before / (1 - before)
        assert abs(step.code**2 / step.variance / gain - 1) <= 1e-14
        mean = step.code + step.state * math.sqrt(before)
        variance = step.state**2 * (1 - before) + step.variance
        assert abs(mean - math.sqrt(after)) <= 1e-15
        assert abs(variance - (1 - after)) <= 1e-15
        assert abs(step.gain - gain) <= 1e-12 * gain


def test_the_reference_form_of_a_step() -> None:
    """a, b and c in the notation of the paper: alpha = level before / level after."""
    before, after = 0.3, 0.8
    alpha = before / after
    step = ChainStep.between(before, after)
    assert step.code == pytest.approx(math.sqrt(after) * (1 - alpha) / (1 - before), rel=1e-15)
    assert step.state == pytest.approx(math.sqrt(alpha) * (1 - after) / (1 - before), rel=1e-15)
    assert step.variance == pytest.approx((1 - after) * (1 - alpha) / (1 - before), rel=1e-15)


def test_the_noise_of_a_prediction_belongs_to_the_sample() -> None:
    """Whatever the micro-batches are; other names, blocks and seeds have other noise."""

    def draw(
        indices: list[int], name: str = "noise", block: int = 1, seed: int = 5
    ) -> torch.Tensor:
        random = RowRandom.of_samples(seed, block, torch.tensor(indices))
        return random.generate(name, lambda n, g: torch.randn(n, 3, generator=g, dtype=D))

    whole = draw(list(range(200)))
    assert torch.equal(whole[[130, 7, 63, 64]], draw([130, 7, 63, 64]))
    assert torch.equal(whole[50:90], draw(list(range(50, 90))))
    others = [draw([7], "other"), draw([7], block=2), draw([7], seed=6)]
    assert all(not torch.equal(whole[[7]], other) for other in others)
    assert abs(float(whole.mean())) < 0.1
    assert abs(float(whole.std()) - 1) < 0.1


def test_the_defaults() -> None:
    assert Noprop().form == "discrete"
