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

from dtrain.errors import Refusal
from dtrain.exam import newest

KINDS = (".pt", ".safetensors")


def export(folder: Path, out: Path, heads: bool = False) -> dict[str, Tensor]:
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

    Raises
    ------
    Refusal
        No run, no checkpoint, a damaged one (code 3), another suffix, a path that cannot be
        written.
    """
    write = _writer(out)
    state = _read(folder)
    if not heads:
        state = {name: each for name, each in state.items() if not name.startswith("heads.")}
    part = out.with_name(out.name + ".part")
    try:
        with part.open("wb") as file:
            write(state, file)
        os.replace(part, out)
    except OSError as error:
        raise Refusal(f"cannot write {out}: {error.strerror}; choose another file") from error
    return state


def _read(folder: Path) -> dict[str, Tensor]:
    """Return the model of the newest checkpoint, or of the one that has taken its place."""
    while True:
        manifest = newest(folder)
        try:
            manifest.intact(key for key in manifest.files if key.startswith("model/"))
            return manifest.under("model/")
        except (Refusal, OSError):
            if manifest.folder.is_dir():
                raise


def _writer(out: Path) -> Callable[[dict[str, Tensor], BinaryIO], object]:
    """Return what writes a state dict in the format that the file's suffix names."""
    if out.suffix not in KINDS:
        raise Refusal(f"cannot export to {out.name}: its suffix must be {' or '.join(KINDS)}")
    if out.suffix == ".pt":
        return torch.save
    if importlib.util.find_spec("safetensors") is None:
        raise Refusal("the package 'safetensors' is not installed: pip install it, or export .pt")
    from safetensors.torch import save

    return lambda state, file: file.write(save(state))
