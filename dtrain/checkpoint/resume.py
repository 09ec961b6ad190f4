"""Which checkpoint a run goes on from, and what may differ from the run that wrote it.

Invariant: whatever decides what is trained must be the same; only the length, the mesh, the device
and what is reported may change, the length not where learning rates followed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.checkpoint.manifest import Manifest, latest_checkpoint
from dtrain.checkpoint.run_folder import OWNER_FILE
from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.schema import Table, toml_text


def newest_checkpoint(folder: Path) -> Manifest:
    """Return the newest complete checkpoint of a run; refuse where there is none."""
    if not folder.is_dir():
        raise ConfigError(
            "todo.key", f"there is no run folder {folder}: give the one that `dtrain train` named"
        )
    if not (folder / "run.toml").is_file():
        raise ConfigError(
            "todo.key", f"{folder} holds no run.toml: give a folder that `dtrain train` named"
        )
    where = folder / CHECKPOINT_FOLDER
    manifest = latest_checkpoint(where)
    if manifest is None:
        raise ConfigError(
            "todo.key",
            f"there is no complete checkpoint in {where}: a run writes one at the end of its first "
            "epoch (or sooner, by [checkpoint] every); let it come that far",
        )
    return manifest


CHANGEABLE_KEYS = (
    "epochs",
    "updates",
    "device",
    "threads",
    "debug",
    "trace",
    "mesh.",
    "log.",
    "partition.recompute",
    "evaluate.",
    "checkpoint.keep",
)


LENGTH_KEYS = ("epochs", "updates")


RUN_FOLDER_FILES = {"summary.json", "checkpoints", OWNER_FILE}


CHECKPOINT_FOLDER = "checkpoints"


def find_checkpoint(out: Path, resume: str) -> Manifest | None:
    """Return the checkpoint that a run into `out` goes on from; None: it starts afresh.

    Parameters
    ----------
    resume : str
        "auto": the newest in `out`; "never": none, and `out` must be empty; else the folder of a
        run whose newest is taken, unless `out` has gone on from there already.

    Raises
    ------
    DtrainError
        A folder that is not empty, holds no run of ours, or lacks the checkpoint asked for.
    """
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    held -= {name for name in held if name.startswith(f".{OWNER_FILE}")}
    if resume == "never" and held - {OWNER_FILE}:
        raise ConfigError(
            "todo.key", f"--resume never, but {out} is not empty: delete it or choose another --out"
        )
    if held and not held & RUN_FOLDER_FILES:
        raise ConfigError(
            "todo.key",
            f"{out} is not empty and no run folder ({', '.join(sorted(held)[:3])}): "
            "choose another --out",
        )
    own = latest_checkpoint(out / CHECKPOINT_FOLDER)
    if own is not None or resume in ("auto", "never"):
        return own
    manifest = latest_checkpoint(Path(resume) / CHECKPOINT_FOLDER)
    if manifest is None:
        raise ConfigError(
            "todo.key", f"--resume {resume}: there is no complete checkpoint in {resume}"
        )
    return manifest


def check_same_run(
    out: Path, saved_table: Table | None, run: RunConfig, fully_trained: bool = False
) -> None:
    """Refuse what would not be the same run, or would overwrite its run file.

    Parameters
    ----------
    before : dict or None
        The resolved run of the checkpoint to go on from.
    reached : bool
        Whether that checkpoint holds all updates of `run`: then nothing is left to train, at
        whatever rate.
    """
    if run.path == (out / "run.toml").resolve():
        raise ConfigError(
            "todo.key", f"--out {out} would overwrite the run file {run.path}: choose another --out"
        )
    old, new = dict(_flatten(saved_table or {})), dict(_flatten(run.to_table()))
    told = {
        key: f"{key} (was {_value_text(old, key)}, is {_value_text(new, key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    changed = [words for key, words in told.items() if not key.startswith(CHANGEABLE_KEYS)]
    if saved_table is not None and changed:
        raise ConfigError(
            "todo.key",
            f"the run to go on from was begun with other settings: {', '.join(changed)}; put them "
            f"back, or choose another --out than {out}",
        )
    length = [told[key] for key in LENGTH_KEYS if key in told]
    if saved_table is not None and length and not fully_trained:
        for what in length_dependent_parts(run):
            raise ConfigError(
                "todo.key",
                f"the {what} followed the length that the run was begun with: "
                f"{', '.join(length)}; put it back, or choose another --out than {out}",
            )


def length_dependent_parts(run: RunConfig) -> Iterator[str]:
    """Yield in words what follows the length of a run, which then cannot be made longer."""
    if run.make_lr_schedule().depends_on_run_length:
        yield f"learning rates of '{run.lr_schedule.name}'"
    if run.make_sync().traits().depends_on_run_length:
        yield f"phases of '{run.sync.name}'"


def _flatten(table: Table, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the nested tables as dotted keys; lists and tuples are the same."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def _value_text(table: Table, key: str) -> str:
    return toml_text(table[key]) if key in table else "absent"
