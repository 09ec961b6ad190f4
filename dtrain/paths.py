"""Paths that users write: `$VAR` and `${VAR}` are variables of the environment, `~` is home.

Invariant: an unset variable is an error that names it; nothing is read from a wrong folder.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import ConfigError


def expand_text(
    text: str, name: str, folder: Path = Path(), key: str = "path.variable-unset"
) -> str:
    """Return a path as text, with variables and `~` replaced by their values.

    Parameters
    ----------
    name : str
        The option or key that gives the path, for the error.
    folder : Path
        Folder of relative paths: a file whose name has a dollar sign is itself.
    key : str
        Of the error.

    Raises
    ------
    ConfigError
        A variable is not set.
    """
    expanded = os.path.expandvars(text)
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset is not None and not (folder / expanded).exists():
        variable = unset[1].strip("{}")
        raise ConfigError(
            key,
            f"{name} {text}: the environment variable {variable} is not set: set it, or write the "
            "path",
        )
    return os.path.expanduser(expanded)


def expand_path(path: str | Path, name: str) -> Path:
    """Return a path with variables and `~` replaced by their values; see `expand_text`."""
    return Path(expand_text(str(path), name))


def expand_options(options: Namespace, texts: Sequence[str]) -> None:
    """Expand the paths of a command line in place.

    Parameters
    ----------
    options : Namespace
        All values that are paths, or lists of paths, are expanded.
    texts : sequence of str
        Names of options whose values are texts and may be paths, too.
    """
    for name, value in vars(options).items():
        vars(options)[name] = _expand_value(value, name, name in texts)


def _expand_value(value: Any, name: str, is_text: bool) -> Any:
    if isinstance(value, list):
        return [_expand_value(item, name, is_text) for item in value]
    if isinstance(value, Path):
        return expand_path(value, name)
    return expand_text(value, name) if is_text and isinstance(value, str) else value
