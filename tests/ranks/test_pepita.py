"""The two passes of `pepita` in a run: they differ only by the modulation of the input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.harness import train_in_threads
from tests.outcome import model
from tests.ranks.test_frozen import first_parameters as first


@pytest.mark.parametrize("net", ["dropping", "noisy"])
@pytest.mark.parametrize("recompute", [False, True])
def test_random_layers_draw_the_same_numbers_in_both_passes(
    net: str, recompute: bool, tmp_path: Path
) -> None:
    """With a modulation too small to change a number, h - h' would only be the random numbers."""
    changes = {"model": {"name": f"tests.tiny:{net}"}, "optimizer": {"name": "sgd", "lr": 0.1}}
    changes |= {"partition": {"cuts": [2, 4], "recompute": recompute}, "epochs": 1}
    trained_blocks = []
    for scale in (1e-200, 0.5):
        objective = {"name": "pepita", "scale": scale}
        run = tiny.run(**changes, objective=objective, mesh__stages=2)
        train_in_threads(run, tmp_path / str(scale), 2)
        final, blocks = model(tmp_path / str(scale)), first(run, 2)
        trained_blocks.append(
            [any(not torch.equal(final[n], t) for n, t in block.items()) for block in blocks]
        )
    has_parameters = [bool(block) for block in first(run, 2)]
    assert trained_blocks == [[False, False, True], has_parameters]
