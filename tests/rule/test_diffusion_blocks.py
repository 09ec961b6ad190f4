"""DiffusionBlocks: bands of equal mass, EDM preconditioning, and the sign of the Euler step."""

from __future__ import annotations

import pytest
import torch
from torch.special import ndtr

from dtrain.objectives.diffusion_blocks import DiffusionBlocks

D = torch.float64


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 24])
def test_the_bands_have_equal_mass(blocks: int) -> None:
    edges = torch.tensor(DiffusionBlocks().band_edges(blocks), dtype=D)
    masses = ndtr((edges.log() + 1.2) / 1.2).diff()
    assert float((masses / masses.mean() - 1).abs().max()) < 1e-6


def test_the_edges_are_those_of_the_reference() -> None:
    objective = DiffusionBlocks()
    assert objective.band_edges(3) == pytest.approx([0.002, 0.180, 0.505, 80], abs=5e-4)
    assert objective.band_edges(4) == pytest.approx([0.002, 0.134, 0.301, 0.677, 80], abs=5e-4)


def test_the_weight_cancels_the_output_scale() -> None:
    """lambda c_out^2 = 1; a network's target has unit variance, and so has its input."""
    sigma = torch.logspace(-3, 2, 50, dtype=D)
    scales = DiffusionBlocks(sigma_data=0.7).scales(sigma)
    assert float((scales.weight * scales.output**2 - 1).abs().max()) < 1e-14
    variance = scales.input**2 * (0.7**2 + sigma**2)
    assert float((variance - 1).abs().max()) < 1e-14
    error = scales.skip - 1  # of the code in skip z - code; the noise has factor skip
    target = (error**2 * 0.7**2 + scales.skip**2 * sigma**2) / scales.output**2
    assert float((target - 1).abs().max()) < 1e-12


def test_an_euler_step_lowers_the_noise() -> None:
    """With the true code as estimate, the state keeps its code and the noise shrinks in
    proportion."""
    objective = DiffusionBlocks()
    code, noise = torch.randn(2, 6, dtype=D).unbind()
    after = objective.euler_step(code + 3.0 * noise, code, 3.0, 0.5)
    torch.testing.assert_close(after, code + 0.5 * noise, rtol=1e-14, atol=1e-14)
