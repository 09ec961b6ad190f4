"""Range checks of run-file keys that several objectives have.

Invariant: every function raises `ConfigError` or does nothing.
"""

from __future__ import annotations

import math

from dtrain.errors import ConfigError


def check_hidden(hidden: int) -> None:
    """Reject a negative number of layers."""
    if hidden < 0:
        raise ConfigError(
            "objective.hidden-negative", f"[objective] hidden = {hidden} must be at least 0"
        )


def check_lag(lag: int) -> None:
    """Reject a negative number of updates."""
    if lag < 0:
        raise ConfigError(
            "objective.lag-negative",
            f"[objective] lag = {lag} must be at least 0 (2 or more under 'stream')",
        )


def check_scale(scale: float, default: float, key: str = "scale") -> None:
    """Reject a factor that is not a finite number above 0."""
    if not 0 < scale < math.inf:
        raise ConfigError(
            "objective.scale-not-positive",
            f"[objective] {key} = {scale} must be above 0 (default {default})",
        )


def check_temperature(temperature: float) -> None:
    """Reject a divisor of scores that is not above 0."""
    if not temperature > 0:
        raise ConfigError(
            "objective.temperature-not-positive",
            f"[objective] temperature = {temperature} must be above 0",
        )


def check_steps(steps: int) -> None:
    """Reject a prediction without a step."""
    if steps < 1:
        raise ConfigError(
            "objective.steps-too-few", f"[objective] steps = {steps} must be at least 1"
        )
