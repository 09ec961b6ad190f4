"""Export the trained weights of a run as one plain state dict, for the user's own module.

Invariant: the file holds tensors under the names of the user's modules, nothing else but the
statistics of the inputs on request. A failed export leaves the previous file unchanged.

::

    inputs --(x - normalise.mean) / normalise.std--> the exported weights --> outputs
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dtrain.block.parameters import is_head_name
from dtrain.checkpoint.files import replacing
from dtrain.checkpoint.manifest import Manifest
from dtrain.checkpoint.newest_checkpoint import load_newest
from dtrain.checkpoint.shard import dtype_name
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.common.low_rank import full_rank_factors

SUFFIXES = (".pt", ".safetensors")


STATISTICS_SUFFIX = ".statistics.json"
"""Ending of the file beside the weights that holds mean and standard deviation by channel."""


@dataclass(frozen=True)
class ExportedModel:
    """The content of a checkpoint that is exported.

    Attributes
    ----------
    state : dict of str to Tensor
        The tensors of the model.
    low_rank_names : set of str
        The matrices that were trained in low rank.
    statistics : dict of str to Tensor
        "mean" and "std" of the training inputs, each (channels, 1, ...) in float64; empty where
        inputs were not standardised.
    tied_names : dict of str to str
        Other names of tensors that the user's module holds under several.
    """

    state: dict[str, Tensor]
    low_rank_names: set[str]
    statistics: dict[str, Tensor]
    tied_names: dict[str, str]


def export(
    folder: Path,
    out: Path,
    heads: bool = False,
    factors: bool = False,
    with_normalisation: bool = False,
    best: bool = False,
    ema: bool = False,
    write_files: bool = True,
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
    with_normalisation : bool
        Also write the statistics that standardise inputs, as ``normalise.mean`` and
        ``normalise.std``. Otherwise they are written as numbers to ``OUT.statistics.json``.
    best, ema : bool
        Write the weights that `[checkpoint] best` has kept; the averaged weights of `[ema]`.
    write_files : bool
        False: return the state dict alone.

    Raises
    ------
    ConfigError
        There is no run or no checkpoint, the suffix is unknown, the file cannot be written, or
        the run trained no weight in low rank and `factors` is true, or it did not standardise
        inputs and `with_normalisation` is true.
    CheckpointError
        The checkpoint is damaged.
    """
    write = _state_dict_writer(out)
    load = partial(_load_model, ema=ema)
    model = load_newest(folder, load, Comm(SingleBackend()), best)
    state = _with_factors(model.state, model.low_rank_names) if factors else model.state
    state = _user_names(state, heads, model.tied_names)
    if with_normalisation:
        state = _normalisation(model) | state
    if not write_files:
        return state
    try:
        with replacing(out) as draft, draft.open("wb") as file:
            write(state, file)
        if not with_normalisation:
            _write_statistics(model.statistics, statistics_path(out))
    except OSError as error:
        raise ConfigError(
            "export.unwritable", f"cannot write {out}: {error.strerror}; choose another file"
        ) from error
    return state


def load_state_dict(folder: Path) -> dict[str, Tensor]:
    """Return the model of the newest complete checkpoint under the names of the user's module.

    Raises
    ------
    ConfigError
        There is no run or no checkpoint.
    CheckpointError
        The checkpoint is damaged.
    """
    model = load_newest(folder, _load_model, Comm(SingleBackend()))
    return _user_names(model.state, False, model.tied_names)


def _user_names(
    state: dict[str, Tensor], heads: bool, tied_names: dict[str, str]
) -> dict[str, Tensor]:
    """Return the tensors under all names of the user's module, with the heads on request."""
    own = {name: t for name, t in state.items() if heads or not is_head_name(name)}
    return _with_aliases(own, tied_names)


def statistics_path(out: Path) -> Path:
    """Return the path of the statistics of an export without a layer that normalises."""
    return out.with_name(out.name + STATISTICS_SUFFIX)


def _normalisation(model: ExportedModel) -> dict[str, Tensor]:
    """Return the statistics as the tensors of a layer `normalise`, in the dtype of the model."""
    if not model.statistics:
        raise ConfigError(
            "export.no-statistics",
            "this run did not standardise its inputs ([data] normalise = false), or an earlier "
            "version trained it: leave --with-normalisation out",
        )
    conflicts = [name for name in model.state if name.partition(".")[0] == "normalise"]
    if conflicts:
        raise ConfigError(
            "export.name-taken",
            f"the model has a layer 'normalise' of its own ('{conflicts[0]}'): leave "
            "--with-normalisation out",
        )
    floats = (tensor.dtype for tensor in model.state.values() if tensor.is_floating_point())
    dtype = next(floats, torch.float32)
    return {f"normalise.{name}": tensor.to(dtype) for name, tensor in model.statistics.items()}


def _write_statistics(statistics: dict[str, Tensor], path: Path) -> None:
    """Write mean and standard deviation by channel as JSON; remove an older file without any."""
    if not statistics:
        path.unlink(missing_ok=True)
        return
    numbers = {name: tensor.flatten().tolist() for name, tensor in statistics.items()}
    with replacing(path) as draft:
        draft.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


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


def _with_aliases(state: dict[str, Tensor], tied_names: dict[str, str]) -> dict[str, Tensor]:
    """Return the state dict with every tensor under all names that the user's module has for it."""
    names: dict[str, list[str]] = {}
    for alias, first in tied_names.items():
        names.setdefault(first, [first]).append(alias)
    state = dict(state)
    for same in names.values():
        saved = [state[name] for name in same if name in state]
        for name in same:
            if saved and name not in state:
                state[name] = saved[0].clone()
    return state


def _load_model(manifest: Manifest, ema: bool = False) -> ExportedModel:
    """Return the model of a checkpoint, or its averaged weights."""
    weights = manifest.state.get("weights", {})
    low_rank_names = {name for name, stats in weights.items() if stats["rank"] is not None}
    return ExportedModel(
        manifest.load_model(ema),
        low_rank_names,
        manifest.load_prefix("statistics/"),
        manifest.state.get("tied_names", {}),
    )


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
    return _write_safetensors


def _write_safetensors(state: dict[str, Tensor], file: BinaryIO) -> None:
    from safetensors.torch import save

    for name, tensor in state.items():
        if tensor.dtype == torch.complex128:
            raise ConfigError(
                "export.safetensors-dtype",
                f"safetensors has no {dtype_name(tensor)}, the dtype of '{name}': export .pt",
            )
    file.write(save(state))
