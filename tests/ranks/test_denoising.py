"""Blocks that denoise labels, on tokens: a class per position, and no message in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.harness import train_in_threads

TOKENS, LENGTH = 5, 6


def tokens() -> tuple[np.ndarray, ...]:
    """Return sequences of tokens, each the one before plus 1 or 2, by turns, and the next ones."""
    start = np.random.default_rng(0).integers(0, TOKENS, 80)
    steps = np.cumsum(np.arange(LENGTH + 1) % 2 + 1)
    x = (start[:, None] + steps) % TOKENS
    return x[:60, :-1], x[:60, 1:], x[60:, :-1], x[60:, 1:]


class Causal(nn.Module):
    """The sum of a linear layer of this position and one of the position before."""

    uses_rng = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.here, self.before = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, input: Tensor) -> Tensor:
        """Return features (rows, L, w) that depend on no later position."""
        shifted = torch.cat([torch.zeros_like(input[:, :1]), input[:, :-1]], 1)
        return input + torch.tanh(self.here(input) + self.before(shifted))


def language_model() -> list[tuple[str, Any]]:
    """Return the layers of a causal model of tokens."""
    return [
        ("embed", lambda: nn.Embedding(TOKENS, 12)),
        ("one", lambda: Causal(12)),
        ("two", lambda: Causal(12)),
        ("head", lambda: nn.Linear(12, TOKENS)),
    ]


@pytest.mark.parametrize(
    "objective", [{"name": "noprop"}, {"name": "diffusion-blocks", "width": 8, "chains": 3}]
)
def test_the_next_token_is_learnt_by_blocks_that_send_nothing(
    objective: dict[str, Any], tmp_path: Path
) -> None:
    run = tiny.run(
        data__name=f"{__name__}:tokens",
        model={"name": f"{__name__}:language_model"},
        task={"classes-last": True},
        objective=objective,
        partition={"cuts": ["two"]},
        epochs=14,
        optimizer__lr=0.02,
        evaluate__every=14,
        mesh__stages=2,
    )
    summary = train_in_threads(run, tmp_path, 2)
    assert summary["bytes_intra_node"] == summary["bytes_inter_node"] == 0
    # The first token does not tell which step comes next; the others do.
    assert summary["test_accuracy"] > 0.8
