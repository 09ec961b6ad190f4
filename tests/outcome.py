"""What a run left in its folder, for tests that compare runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.checkpoint.manifest import latest_checkpoint


def summary(out: Path) -> dict[str, Any]:
    """Return `summary.json` of a run folder."""
    told: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return told


def model(out: Path) -> dict[str, Tensor]:
    """Return the tensors of the newest checkpoint's model."""
    manifest = latest_checkpoint(out / "checkpoints")
    assert manifest is not None
    return manifest.load_prefix("model/")


def break_off(out: Path, updates: int) -> None:
    """Leave what a run leaves that was ended at its last checkpoint of at most so many updates."""
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("update-")) > updates:
            shutil.rmtree(folder)


def close(one: Path, other: Path, rtol: float = 1e-12) -> None:
    """Assert that two runs ended in the same model, up to rounding."""
    ours, theirs = model(one), model(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=1e-13)
