"""Fill keys of a run into the name of its run folder: ``runs/{name}-{seed}``."""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.config.overrides import override_name
from dtrain.config.run import RunConfig
from dtrain.config.sweep import SweepRun
from dtrain.errors import ConfigError, unknown_name
from dtrain.schema import flatten_table


def fill_keys(out: Path, run: RunConfig) -> Path:
    """Return the path of a run folder, with the values of keys in place of their names.

    ``{name}`` is the run file's name without suffix. All other names are dotted keys of the run, as
    ``{optimizer.lr}``. A list is written with hyphens, and so is a slash in a value.

    Raises
    ------
    ConfigError
        A brace is not closed, or the run has no such key.
    """
    values = {"name": run.path.stem} | dict(flatten_table(run.to_table()))
    parts = []
    try:
        fields = list(string.Formatter().parse(str(out)))
    except ValueError as error:
        raise ConfigError("out.malformed", f"--out {out}: {error}; write {{key}}") from error
    for text, key, _, _ in fields:
        parts.append(text)
        if key is not None:
            if key not in values:
                raise unknown_name("key in --out", key, values, key="out.unknown-key")
            parts.append(_text(values[key]))
    return Path("".join(parts))


def sweep_folder(out: Path, run: RunConfig, runs: Sequence[SweepRun]) -> Path:
    """Return the folder of a sweep, with the values of keys that all its runs share.

    Parameters
    ----------
    run : RunConfig
        One of its runs.

    Raises
    ------
    ConfigError
        As `fill_keys`, or a key of the sweep stands in `out`.
    """
    keys = [override_name(setting) for setting in runs[0].settings]
    if swept := [key for key in keys if f"{{{key}}}" in str(out)]:
        raise ConfigError(
            "sweep.out",
            f"--out {out} names the folder of all runs of the sweep: leave {{{swept[0]}}} out; the "
            "folder of each run is named by its values",
        )
    return fill_keys(out, run)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "-".join(map(_text, value))
    return str(value).replace(os.sep, "-")
