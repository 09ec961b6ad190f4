"""Export: what a run has learnt as one plain state dict, for the user's own module.

Invariant: nothing but tensors under the names that the user's modules have; what lies at the path
is complete, or what lay there before.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dtrain.checkpoint.resume import newest_checkpoint
from dtrain.errors import ConfigError, DtrainError
from dtrain.syncs.common.low_rank import full_rank_factors

SUFFIXES = (".pt", ".safetensors")


def export(
    folder: Path, out: Path, heads: bool = False, factors: bool = False
) -> dict[str, Tensor]:
    """Write the newest complete checkpoint's model; return the state dict.

    Parameters
    ----------
    folder : Path
        A run folder; it may belong to a run that goes on.
    out : Path
        `.pt`: for ``torch.load(out, weights_only=True)``; `.safetensors`: where that package is
        installed. A file there is replaced.
    heads : bool
        The modules that the objective added, too, as ``heads.<block>.*``.
    factors : bool
        Matrices (a, ...) that were trained in low rank as ``<name>.left`` (a, k) and
        ``<name>.right`` (k, b), where those are fewer numbers: ``(left @ right).view(a, ...)``.

    Raises
    ------
    DtrainError
        No run, no checkpoint, a damaged one (code 3), another suffix, a path that cannot be
        written; factors of a run that has none.
    """
    write = _state_dict_writer(out)
    state, thin = _load_model(folder)
    if factors:
        state = _with_factors(state, thin)
    if not heads:
        state = {name: each for name, each in state.items() if not name.startswith("heads.")}
    part = out.with_name(out.name + ".part")
    try:
        with part.open("wb") as file:
            write(state, file)
        os.replace(part, out)
    except OSError as error:
        raise ConfigError(
            "todo.key", f"cannot write {out}: {error.strerror}; choose another file"
        ) from error
    return state


def _with_factors(state: dict[str, Tensor], low_rank_names: set[str]) -> dict[str, Tensor]:
    """Return the state dict with two factors in the place of each matrix that has few ranks."""
    if not low_rank_names:
        raise ConfigError(
            "todo.key", "no weight of this run was trained in low rank: leave --factors out"
        )
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        left, right = full_rank_factors(tensor) if name in low_rank_names else (tensor, tensor)
        if name in low_rank_names and left.numel() + right.numel() < tensor.numel():
            found |= {f"{name}.left": left, f"{name}.right": right}
        else:
            found[name] = tensor
    return found


def _load_model(folder: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Return the model of the newest checkpoint, or of the one that has taken its place, and the
    names of what was trained in low rank."""
    while True:
        manifest = newest_checkpoint(folder)
        try:
            manifest.verify_shards(key for key in manifest.files if key.startswith("model/"))
            weights = manifest.state.get("weights", {})
            thin = {name for name, each in weights.items() if each["rank"] is not None}
            return manifest.load_prefix("model/"), thin
        except (DtrainError, OSError):
            if manifest.folder.is_dir():
                raise


def _state_dict_writer(out: Path) -> Callable[[dict[str, Tensor], BinaryIO], object]:
    """Return what writes a state dict in the format that the file's suffix names."""
    if out.suffix not in SUFFIXES:
        raise ConfigError(
            "todo.key", f"cannot export to {out.name}: its suffix must be {' or '.join(SUFFIXES)}"
        )
    if out.suffix == ".pt":
        return torch.save
    if importlib.util.find_spec("safetensors") is None:
        raise ConfigError(
            "todo.key", "the package 'safetensors' is not installed: pip install it, or export .pt"
        )
    from safetensors.torch import save

    return lambda state, file: file.write(save(state))
