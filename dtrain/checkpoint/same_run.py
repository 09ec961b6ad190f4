"""Check that the settings of a run are those of the checkpoint that it resumes from.

Invariant: every key that decides what is trained must be the same. Only the length, the mesh, the
device and reporting may change; the length not where learning rates or phases depend on it. The
same data may be read from another path.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.config.renamed_keys import translate_old_keys
from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.schema import Table, flatten_table, toml_text

CHANGEABLE_KEYS = (
    "epochs",
    "updates",
    "device",
    "threads",
    "debug",
    "trace",
    "task.metrics",
    "data.workers",
    "mesh.",
    "log.",
    "partition.recompute",
    "partition.places",
    "evaluate.every",
    "checkpoint.keep",
    "checkpoint.every-minutes",
    "checkpoint.asynchronous",
    "checkpoint.local",
    "checkpoint.signals",
    "checkpoint.stop-before-limit",
    "checkpoint.best",
    "stop.",
    "ema.evaluate",
    "timeouts.",
    "numerics.",
)


FLUSH_KEY = "evaluate.every-updates"
"""It sets where the pipeline is flushed, so it stays as it is."""


INTERVAL_KEY = "checkpoint.every"
"""It sets the segments, so it may change only where these decide nothing."""


LENGTH_KEYS = ("epochs", "updates")


def check_same_run(
    out: Path,
    saved_table: Table | None,
    run: RunConfig,
    fully_trained: bool = False,
    data_paths_may_differ: bool = False,
    segments_are_free: bool = False,
) -> None:
    """Refuse a run that is not the one of the checkpoint, or would overwrite its own run file.

    Parameters
    ----------
    saved_table : dict or None
        The resolved run of the checkpoint to resume from; None: there is none.
    fully_trained : bool
        Whether that checkpoint holds all updates of `run`: then nothing is left to train, at
        whatever rate.
    data_paths_may_differ : bool
        Whether paths of `[data]` may differ, since `check_saved_data` compares the data.
    segments_are_free : bool
        Whether the interval between checkpoints, which sets the segments, may differ.

    Raises
    ------
    ConfigError
        Settings differ from the checkpoint that must not, or `out` is the folder of the run file.
    """
    if run.path == (out / "run.toml").resolve():
        raise ConfigError(
            "run-folder.overwrites-run-file",
            f"--out {out} would overwrite the run file {run.path}: choose another --out",
        )
    if saved_table is None:
        return
    changes = _changes(saved_table, run)
    paths = data_path_changes(saved_table, run) if data_paths_may_differ else {}
    if segments_are_free:
        changes.pop(INTERVAL_KEY, None)
    forbidden = [
        text
        for key, text in changes.items()
        if key == FLUSH_KEY or not (key in paths or key.startswith(CHANGEABLE_KEYS))
    ]
    if forbidden:
        raise ConfigError(
            "resume.settings-changed",
            f"cannot resume: settings differ from the checkpoint: {', '.join(forbidden)}; "
            f"restore them, or begin a new run with the same weights: --set "
            f"model.weights={out.resolve()} --out ANOTHER_FOLDER",
        )
    length = [changes[key] for key in LENGTH_KEYS if key in changes]
    for part in length_dependent_parts(run) if length and not fully_trained else ():
        raise ConfigError(
            "resume.length-changed",
            f"cannot resume with another length, on which the {part} depend: "
            f"{', '.join(length)}; restore it, or begin a new run with the same weights: --set "
            f"model.weights={out.resolve()} --out ANOTHER_FOLDER",
        )


def data_path_changes(saved_table: Table | None, run: RunConfig) -> dict[str, str]:
    """Return a text for each path of `[data]` that is not the one of the checkpoint, by key.

    A path is a text, or a list of texts, that names a split or has a separator of folders or the
    suffix of a file name.
    """
    if saved_table is None:
        return {}
    saved, current = (dict(flatten_table(table)) for table in (saved_table, run.to_table()))
    return {
        key: text
        for key, text in _changes(saved_table, run).items()
        if key.startswith("data.")
        and key not in ("data.name", "data.fingerprint")
        and all(_is_path(key, table.get(key)) for table in (saved, current))
    }


def data_path_notes(saved_table: Table | None, run: RunConfig) -> list[str]:
    """Return a note if the run reads the data of the checkpoint from other paths."""
    changes = data_path_changes(saved_table, run)
    if not changes:
        return []
    return [
        f"the data are read from another path than before: {', '.join(changes.values())}; sizes, "
        "labels and some samples of each split are those of the checkpoint"
    ]


def length_dependent_parts(run: RunConfig) -> Iterator[str]:
    """Yield a description of each part that depends on the run's length, which then is fixed."""
    if run.lr_schedule.instance.depends_on_run_length:
        yield f"learning rates of '{run.lr_schedule.name}'"
    if run.sync.instance.traits().depends_on_run_length:
        yield f"phases of '{run.sync.name}'"


def _is_path(key: str, value: Any) -> bool:
    paths = value if isinstance(value, list) and value else [value]
    is_split = key in ("data.train", "data.test", "data.validation")
    return all(
        isinstance(path, str) and (is_split or "/" in path or bool(Path(path).suffix))
        for path in paths
    )


def _changes(saved_table: Table, run: RunConfig) -> dict[str, str]:
    """Return a text for each setting that is not the one of the checkpoint, by key."""
    saved = dict(flatten_table(translate_old_keys(saved_table)))
    current = dict(flatten_table(run.to_table()))
    return {
        key: f"{key} (was {_value_text(saved, key)}, is {_value_text(current, key)})"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    }


def _value_text(table: Table, key: str) -> str:
    return toml_text(table[key]) if key in table else "absent"
