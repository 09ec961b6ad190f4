"""Export the trained weights of a run as one plain state dict, for the user's own module.

Invariant: the file holds tensors under the names of the user's modules, nothing else. It is
complete, or still the file that was there before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dtrain.checkpoint.files import replacing
from dtrain.checkpoint.manifest import Manifest
from dtrain.checkpoint.resume import load_newest
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.common.low_rank import full_rank_factors

SUFFIXES = (".pt", ".safetensors")


def export(
    folder: Path, out: Path, heads: bool = False, factors: bool = False
) -> dict[str, Tensor]:
    """Write the model of the newest complete checkpoint to a file; return the state dict.

    Parameters
    ----------
    folder : Path
        A run folder; the run may still be training.
    out : Path
        `.pt`: for ``torch.load(out, weights_only=True)``; `.safetensors`: where that package is
        installed. A file there is replaced.
    heads : bool
        Also write the modules that the objective added, as ``heads.<block>.*``.
    factors : bool
        Write a matrix (a, ...) that was trained in low rank as ``<name>.left`` (a, k) and
        ``<name>.right`` (k, b), if those have fewer numbers: ``(left @ right).view(a, ...)``.

    Raises
    ------
    ConfigError
        There is no run or no checkpoint, the suffix is unknown, the file cannot be written, or
        the run trained no weight in low rank and `factors` is true.
    CheckpointError
        The checkpoint is damaged.
    """
    write = _state_dict_writer(out)
    state, low_rank_names = load_newest(folder, _load_model, Comm(SingleBackend()))
    if factors:
        state = _with_factors(state, low_rank_names)
    if not heads:
        state = {name: t for name, t in state.items() if not name.startswith("heads.")}
    try:
        with replacing(out) as draft, draft.open("wb") as file:
            write(state, file)
    except OSError as error:
        raise ConfigError(
            "export.unwritable", f"cannot write {out}: {error.strerror}; choose another file"
        ) from error
    return state


def _with_factors(state: dict[str, Tensor], low_rank_names: set[str]) -> dict[str, Tensor]:
    """Return the state dict with two factors in place of each matrix that needs more numbers."""
    if not low_rank_names:
        raise ConfigError(
            "export.no-factors",
            "no weight of this run was trained in low rank: leave --factors out",
        )
    factored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        left, right = full_rank_factors(tensor) if name in low_rank_names else (tensor, tensor)
        if name in low_rank_names and left.numel() + right.numel() < tensor.numel():
            factored |= {f"{name}.left": left, f"{name}.right": right}
        else:
            factored[name] = tensor
    return factored


def _load_model(manifest: Manifest) -> tuple[dict[str, Tensor], set[str]]:
    """Return the tensors of a checkpoint's model, and the names of those trained in low rank."""
    weights = manifest.state.get("weights", {})
    low_rank_names = {name for name, stats in weights.items() if stats["rank"] is not None}
    return manifest.load_prefix("model/"), low_rank_names


def _state_dict_writer(out: Path) -> Callable[[dict[str, Tensor], BinaryIO], object]:
    """Return the function that writes a state dict in the format of the file's suffix."""
    if out.suffix not in SUFFIXES:
        raise ConfigError(
            "export.suffix",
            f"cannot export to {out.name}: its suffix must be {' or '.join(SUFFIXES)}",
        )
    if out.suffix == ".pt":
        return torch.save
    if importlib.util.find_spec("safetensors") is None:
        raise ConfigError(
            "export.safetensors-missing",
            "the package 'safetensors' is not installed: pip install it, or export .pt",
        )
    from safetensors.torch import save

    return lambda state, file: file.write(save(state))
