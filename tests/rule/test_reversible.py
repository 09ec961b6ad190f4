"""Reversible layers: the inverse, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.errors import ConfigError
from dtrain.models.reversible import AdditiveCoupling, ResidualCoupling, Reversible
from dtrain.models.revnet import RevNetUnit
from dtrain.rng import seeded
from tests.refusals import refuses


def convolution(dropout: float = 0.3) -> nn.Module:
    """Return a function of a stream of 3 channels, with batch statistics and dropout."""
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(dropout))


LAYERS = {
    "additive": lambda: AdditiveCoupling(convolution(), convolution(0.0)),
    "residual": lambda: ResidualCoupling(convolution()),
    "unit": lambda: RevNetUnit(3, "group", 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_inverse_of_an_output_is_the_input(name: str) -> None:
    """In float64 up to rounding, with batch statistics and equal random numbers."""
    torch.manual_seed(0)
    layer: Reversible = LAYERS[name]().double()
    x = torch.randn(5, 6, 4, 4, dtype=torch.float64)
    with seeded(0, "layer"):
        y = layer(x)
    with seeded(0, "layer"):
        rebuilt = layer.inverse(y)
    torch.testing.assert_close(rebuilt, x, rtol=0, atol=1e-13)
    assert not torch.allclose(x, y)


def test_two_residual_couplings_are_an_additive_one() -> None:
    f, g, x = nn.Linear(3, 3).double(), nn.Tanh(), torch.randn(5, 6, dtype=torch.float64)
    both = nn.Sequential(ResidualCoupling(f), ResidualCoupling(g))
    torch.testing.assert_close(both(x), AdditiveCoupling(f, g)(x), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("function", "width", "key"),
    [
        (nn.ReLU(inplace=True), 6, "model.coupling-in-place"),
        (nn.Linear(3, 4), 6, "model.coupling-shape"),
        (nn.Identity(), 7, "model.streams-unequal"),
    ],
)
def test_functions_that_cannot_be_undone_are_refused(
    function: nn.Module, width: int, key: str
) -> None:
    with refuses(ConfigError, key):
        ResidualCoupling(function)(torch.zeros(2, width))
    with refuses(ConfigError, "model.coupling-random"):
        AdditiveCoupling(nn.Dropout(), nn.Dropout())
