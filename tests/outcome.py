"""Read and change run folders, for tests that compare runs."""

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
    content: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return content


def model(out: Path) -> dict[str, Tensor]:
    """Return the tensors of the newest checkpoint's model."""
    manifest = latest_checkpoint(out / "checkpoints")
    assert manifest is not None
    return manifest.load_prefix("model/")


def break_off(out: Path, updates: int) -> None:
    """Delete the checkpoints after `updates`, as if the run had ended before they were written."""
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("update-")) > updates:
            shutil.rmtree(folder)


def close(one: Path, other: Path, rtol: float = 1e-12) -> None:
    """Assert that two runs ended in the same model, up to rounding."""
    tensors, other_tensors = model(one), model(other)
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, other_tensors[name], rtol=rtol, atol=1e-13)
