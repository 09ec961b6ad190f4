"""Check that model, data and user code are those of the checkpoint that a run resumes from.

Invariant: another model or other data are an error; a changed text of a module is a note.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.schema import Table

STRUCTURE = "structure of "
"""Begins the keys of a fingerprint that describe layers; alone, it is the key of the versions."""


OTHER_INPUTS = "further inputs"
"""The part of a fingerprint for the further inputs of samples, where there are some."""


COMPARED_SAMPLES = 32
"""Samples of each split that a fingerprint describes."""


SOURCE_SECTIONS = ("data", "model", "objective", "schedule", "sync", "optimizer")
"""Sections of a run that may name a module of the user."""


def check_same_model(saved: Table, current: Mapping[str, str]) -> None:
    """Refuse a model whose tensors or layers are not those of the checkpoint.

    Layers are compared where both were described by the same versions of dtrain and torch.

    Parameters
    ----------
    saved : dict
        The fingerprint of the checkpoint.
    current : mapping of str to str
        Shape and dtype of every parameter and buffer of the model, by name, and the structure of
        its layers.

    Raises
    ------
    ConfigError
        It names the first tensor that differs, else the first layer.
    """
    old = saved.get("model")
    if old is None or old == current:
        return
    names = sorted({**old, **current}, key=lambda name: (name.startswith(STRUCTURE), name))
    if old.get(STRUCTURE) != current.get(STRUCTURE):
        names = [name for name in names if not name.startswith(STRUCTURE)]
    for name in names:
        was, now = old.get(name, "absent"), current.get(name, "absent")
        if was == now:
            continue
        if name.startswith(STRUCTURE):
            name = f"layer '{name.removeprefix(STRUCTURE)}'"
            lines = zip_longest(was.splitlines(), now.splitlines(), fillvalue="absent")
            was, now = next((a.strip(), b.strip()) for a, b in lines if a != b)
        else:
            name = f"'{name}'"
        raise ConfigError(
            "resume.model-changed",
            f"cannot resume: the model has changed since the checkpoint: {name} was {was} and is "
            f"{now}; put it back, or choose another --out",
        )


def check_saved_data(
    saved: Table, current: Mapping[str, Any], path_changes: Mapping[str, str] | None = None
) -> None:
    """Refuse data that are not those of the checkpoint.

    Parameters
    ----------
    saved : dict
        The fingerprint of the checkpoint.
    current : mapping
        That of the data, as `check_same_data` returns it.
    path_changes : mapping, optional
        The result of `data_path_changes`, for the message.

    Raises
    ------
    ConfigError
        It names the first part that differs.
    """
    old = saved.get("data")
    if old is None:
        return
    paths = "".join(f"; {text}" for text in (path_changes or {}).values())
    for part, value in current.items():
        if part == OTHER_INPUTS and part not in old:  # an earlier version has written it
            continue
        if not _is_same(old.get(part), value):
            change = f" (was {old.get(part)}, is {value})"
            if isinstance(value, list):
                is_of_splits = part == "inputs"
                change = _differing_split(current, old.get(part), value) if is_of_splits else ""
            raise ConfigError(
                "resume.data-changed",
                f"cannot resume: the data have changed since the checkpoint: {part}{change}{paths};"
                " put them back, or choose another --out",
            )


def _differing_split(current: Mapping[str, Any], old: Any, new: list[float]) -> str:
    """Return " of the test split" for the first split whose samples differ, "" if none is known."""
    if not isinstance(old, list) or len(old) != len(new):
        return ""
    position = next(i for i, pair in enumerate(zip(old, new, strict=True)) if not _is_close(*pair))
    for part, text in current.items():
        if part.endswith(" split"):  # "50 samples of ..."
            position -= min(COMPARED_SAMPLES, int(text.split()[0]))
            if position < 0:
                return f" of the {part}"
    return ""


def source_hashes(run: RunConfig) -> dict[str, str]:
    """Return a hash of the text of each module of the user that a run names, by section.

    Modules that cannot be read are left out. The modules that they import are not included.
    """
    table = run.to_table()
    names = [(section, str(table.get(section, {}).get("name", ""))) for section in SOURCE_SECTIONS]
    names += [("data", str(table["data"].get(key, ""))) for key in ("augment", "sampler")]
    hashes = {}
    for section, name in names:
        module = _loaded_module(name.partition(":")[0]) if ":" in name else None
        with suppress(OSError, TypeError):
            if module is not None:
                text = inspect.getsource(module)
                hashes[f"[{section}] {name}"] = blake2b(text.encode()).hexdigest()[:16]
    return hashes


def source_notes(saved: Table, current: Mapping[str, str]) -> list[str]:
    """Return a note for each module of the user whose text is not that of the checkpoint.

    Parameters
    ----------
    saved : dict
        The fingerprint of the checkpoint; that of an earlier version has no texts.
    current : mapping of str to str
        The hashes of `source_hashes`.
    """
    old = saved.get("source", {})
    return [
        f"{name}: the text of its module has changed since the checkpoint; tensors and settings "
        "are the same, so training continues with the new text: if it computes something else, "
        "choose another --out for a run of its own"
        for name, value in current.items()
        if name in old and old[name] != value
    ]


def _loaded_module(name: str) -> ModuleType | None:
    """Return a module that is imported; the script that Python runs has the name of its file."""
    main = sys.modules.get("__main__")
    if name not in sys.modules and Path(getattr(main, "__file__", None) or "").stem == name:
        return main
    return sys.modules.get(name)


def _is_same(old: Any, new: Any) -> bool:
    """Return whether two parts of a fingerprint are equal, numbers up to rounding."""
    if not isinstance(new, list):
        return bool(old == new)
    return isinstance(old, list) and len(old) == len(new) and _is_close(old, new)


def _is_close(old: Any, new: Any) -> bool:
    return bool(np.allclose(old, new, rtol=1e-4, atol=1e-6, equal_nan=True))
