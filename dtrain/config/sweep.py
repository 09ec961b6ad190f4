"""Sweeps: a run file that describes several runs, by the table `[sweep]`.

::

    [sweep]
    optimizer.lr = [0.1, 0.01]                          each value with each value of other lines
    seed = "0..3"                                       whole numbers
    "batch-size, micro-batches" = [[64, 1], [128, 2]]   keys that change together

Invariant: standard library only, so that the process that starts the ranks need not import torch.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from dtrain.config.overrides import override_key, override_name, override_value
from dtrain.errors import ConfigError
from dtrain.schema import flatten_table, load_toml, toml_text

SWEEP = "sweep"
"""The table of a run file, and the stem of the files of a sweep's folder."""


MAX_RUNS = 10_000
"""Runs of a sweep at most."""


MAX_NAME = 200
"""Characters of a name at most, since most file systems allow 255 bytes."""


@final
@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes
    ----------
    name : str
        Keys of the sweep and their values, ``optimizer.lr=0.1,seed=0``: the name of its folder.
    settings : tuple of str
        ``KEY=VALUE`` of the keys that no override sets.
    """

    name: str
    settings: tuple[str, ...]


@final
@dataclass(frozen=True)
class _Axis:
    """One line of `[sweep]`: keys that change together, and their values; of one key a value in
    each step, of several keys a list of values."""

    keys: tuple[str, ...]
    values: Sequence[Any]

    def steps(self) -> Sequence[Sequence[Any]]:
        """Return the values of all keys in each step."""
        return [[value] for value in self.values] if len(self.keys) == 1 else self.values


def read_sweep(
    path: Path, overrides: Sequence[str] = (), out: Path | None = None
) -> tuple[SweepRun, ...]:
    """Return the runs of a run file's sweep, in order; none where it describes a single run.

    Parameters
    ----------
    overrides : sequence of str
        A key that one of them sets has that value in all runs.
    out : Path, optional
        The folder that is asked for. It is that of a single run if overrides set all keys.

    Raises
    ------
    ConfigError
        The file is no TOML, or its sweep is malformed. Keys and values are checked by `read_run`.
    """
    table = load_toml(path, "run file")
    for override in overrides:
        override_key(table, override)
    try:
        runs = sweep_runs(table.get(SWEEP, {}), overrides)
    except ConfigError as error:
        raise error.with_prefix(str(path)) from error
    return () if out is not None and _is_single(runs) else runs


def _is_single(runs: Sequence[SweepRun]) -> bool:
    """Return whether overrides set all keys of a sweep."""
    return not any(run.settings for run in runs)


def refuse_sweep(sweep: object, overrides: Sequence[str]) -> None:
    """Refuse the sweep of a run file of which one run is asked for.

    Raises
    ------
    ConfigError
        Keys of the sweep are left over.
    """
    runs = sweep_runs(sweep, overrides)
    if not _is_single(runs):
        chosen = " ".join(f"--set {shlex.quote(setting)}" for setting in runs[0].settings)
        raise ConfigError(
            "sweep.several-runs",
            f"[sweep] describes {len(runs)} runs: choose one of them, as by {chosen}; "
            "`dtrain train` trains all of them, and `dtrain submit` submits all",
        )


def sweep_runs(sweep: object, overrides: Sequence[str]) -> tuple[SweepRun, ...]:
    """Return the runs of the table `[sweep]`; overrides set keys in all of them.

    Raises
    ------
    ConfigError
        The table or one of its lines is malformed.
    """
    if not isinstance(sweep, Mapping):
        raise ConfigError(
            "sweep.no-table", "sweep is a table: write [sweep] and a list of values for each key"
        )
    axes = [_axis(text, value) for text, value in flatten_table(dict(sweep))]
    if not axes:
        return ()
    _check_keys(axes)
    fixed = {override_name(each): override_value(each) for each in overrides}
    axes = [_with_overrides(axis, fixed) for axis in axes]
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_RUNS:
        raise ConfigError(
            "sweep.too-many", f"[sweep] describes {count:,} runs: give at most {MAX_RUNS:,}"
        )
    keys = [key for axis in axes for key in axis.keys]
    steps = itertools.product(*(axis.steps() for axis in axes))
    runs = [_sweep_run(keys, list(itertools.chain(*step)), fixed) for step in steps]
    names = Counter(run.name for run in runs)
    [(name, times)] = names.most_common(1)
    if times > 1:
        raise ConfigError(
            "sweep.same-name",
            f"[sweep] describes {times} runs with the name {name}: leave the repeated value out",
        )
    return tuple(runs)


def _axis(text: str, value: object) -> _Axis:
    """Return one line of the table."""
    keys = tuple(key.strip() for key in text.split(","))
    bounds = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", value) if isinstance(value, str) else None
    values: Sequence[Any] = value if isinstance(value, list) else ()
    if bounds is not None:
        values = range(int(bounds[1]), int(bounds[2]) + 1)
    if not values or not all(keys):
        raise ConfigError(
            "sweep.no-list",
            f'[sweep] {text} = {toml_text(value)}: give a list of values, or "0..3" for whole '
            "numbers",
        )
    if len(keys) == 1:
        return _Axis(keys, values)
    for item in values:
        if not isinstance(item, list) or len(item) != len(keys):
            raise ConfigError(
                "sweep.linked-values",
                f"[sweep] {text}: {toml_text(item)} must be a list of {len(keys)} values, one for "
                "each key",
            )
    return _Axis(keys, values)


def _check_keys(axes: Sequence[_Axis]) -> None:
    """Refuse a key that two lines give."""
    names = Counter(key for axis in axes for key in axis.keys)
    for name, times in names.items():
        if times > 1:
            raise ConfigError("sweep.key-twice", f"[sweep] gives {name} twice: leave one line out")


def _with_overrides(axis: _Axis, fixed: Mapping[str, Any]) -> _Axis:
    """Return a line, with one value of each key if overrides set them."""
    free = [key for key in axis.keys if key not in fixed]
    if len(free) == len(axis.keys):
        return axis
    if free:
        raise ConfigError(
            "sweep.linked-key-set",
            f"[sweep] {', '.join(axis.keys)} change together: set {', '.join(free)}, too, or none "
            "of them",
        )
    values = [fixed[key] for key in axis.keys]
    return _Axis(axis.keys, values if len(values) == 1 else [values])


def _sweep_run(keys: Sequence[str], values: Sequence[Any], fixed: Collection[str]) -> SweepRun:
    """Return the run of these values."""
    pairs = list(zip(keys, values, strict=True))
    name = ",".join(f"{key}={_value_text(value)}" for key, value in pairs)
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    free = [(key, value) for key, value in pairs if key not in fixed]
    return SweepRun(name, tuple(f"{key}={toml_text(value)}" for key, value in free))


def _value_text(value: object) -> str:
    """Return a value as a part of the name of a folder."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return "-".join(map(_value_text, value))
    text = value if isinstance(value, str) else toml_text(value)
    return re.sub(r"[^\w.+=-]+", "-", text)
