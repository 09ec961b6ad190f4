"""The two passes of `pepita` in a run: alike in all but what the error added to the input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.outcome import model
from tests.ranks.test_frozen import first
from tests.ranks.test_laws import trained


@pytest.mark.parametrize("net", ["dropping", "noisy"])
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_that_draw_draw_alike_in_both_passes(
    net: str, recompute: bool, tmp_path: Path
) -> None:
    """With an error that is too small to change a number, h - h' is nothing but the draws."""
    told = {"model": {"name": f"tests.tiny:{net}"}, "optimizer": {"name": "sgd", "lr": 0.1}}
    told |= {"partition": {"cuts": [2, 4], "recompute": recompute}, "epochs": 1}
    moved = []
    for scale in (1e-200, 0.5):
        objective = {"name": "pepita", "scale": scale}
        run = tiny.run(**told, objective=objective, mesh__stages=2)
        trained(run, tmp_path / str(scale), 2)
        found, blocks = model(tmp_path / str(scale)), first(run, 2)
        moved.append(
            [any(not torch.equal(found[n], t) for n, t in block.items()) for block in blocks]
        )
    drawing = [bool(block) for block in first(run, 2)]
    assert moved == [[False, False, True], drawing]
