"""Find the checkpoint that a run resumes from, and check that it is the same run.

Invariant: every key that decides what is trained must be the same. Only the length, the mesh, the
device and reporting may change; the length not where learning rates or phases depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dtrain.checkpoint.manifest import Manifest, latest_checkpoint, load_latest
from dtrain.checkpoint.run_folder import OWNER_FILE
from dtrain.comm.agree import broadcast_object
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.config.renamed_keys import translate_old_keys
from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.schema import Table, toml_text

T = TypeVar("T")


CHECKPOINT_FOLDER = "checkpoints"


CHANGEABLE_KEYS = (
    "epochs",
    "updates",
    "device",
    "threads",
    "debug",
    "trace",
    "task.metrics",
    "mesh.",
    "log.",
    "partition.recompute",
    "partition.places",
    "evaluate.",
    "checkpoint.keep",
)


LENGTH_KEYS = ("epochs", "updates")


STRUCTURE = "structure of "
"""Begins the keys of a fingerprint that describe layers; alone, it is the key of the versions."""


RUN_FOLDER_FILES = {"summary.json", CHECKPOINT_FOLDER, OWNER_FILE}


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from, the same on all ranks.

    Attributes
    ----------
    checkpoint : str or None
        Its folder; None: the run starts afresh.
    run_table : dict or None
        The resolved run that wrote it.
    updates : int
        Updates that it holds.
    fingerprint : dict
        What identifies its model and its data; empty where that is not known.
    """

    checkpoint: str | None = None
    run_table: Table | None = None
    updates: int = 0
    fingerprint: Table = field(default_factory=dict)

    @staticmethod
    def from_manifest(manifest: Manifest | None) -> ResumePoint:
        """Return the resume point of a checkpoint, or of none."""
        if manifest is None:
            return ResumePoint()
        return ResumePoint(
            str(manifest.folder),
            manifest.run_table,
            int(manifest.state["update"]),
            manifest.fingerprint,
        )


def find_resume_point(comm: Comm, out: Path, resume: str) -> ResumePoint:
    """Return the checkpoint that a run into `out` resumes from. Collective over `comm`.

    Parameters and errors are those of `find_checkpoint`.
    """
    return ResumePoint(
        **broadcast_object(
            comm, lambda: asdict(ResumePoint.from_manifest(find_checkpoint(out, resume)))
        )
    )


def find_checkpoint(out: Path, resume: str) -> Manifest | None:
    """Return the checkpoint that a run into `out` resumes from; None: it starts afresh.

    Parameters
    ----------
    resume : str
        "auto": the newest in `out`. "never": none, and `out` must be empty. Else the folder of
        another run, whose newest is taken unless `out` holds one already.

    Raises
    ------
    ConfigError
        `out` is not empty and no run folder, or the checkpoint that `resume` names is missing.
    CheckpointError
        The manifest of the checkpoint is damaged.
    """
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    names -= {name for name in names if name.startswith(f".{OWNER_FILE}")}
    if resume == "never" and names - {OWNER_FILE}:
        raise ConfigError(
            "run-folder.not-empty",
            f"--resume never, but {out} is not empty: delete it or choose another --out",
        )
    if names and not names & RUN_FOLDER_FILES:
        raise ConfigError(
            "run-folder.other-files",
            f"{out} is not empty and no run folder ({', '.join(sorted(names)[:3])}): "
            "choose another --out",
        )
    manifest = latest_checkpoint(out / CHECKPOINT_FOLDER)
    if manifest is not None or resume in ("auto", "never"):
        return manifest
    manifest = latest_checkpoint(Path(resume) / CHECKPOINT_FOLDER)
    if manifest is None:
        raise ConfigError(
            "run-folder.no-resume-checkpoint",
            f"--resume {resume}: there is no complete checkpoint in {resume}",
        )
    return manifest


def newest_checkpoint(folder: Path) -> Manifest:
    """Return the newest complete checkpoint of a run.

    Raises
    ------
    ConfigError
        There is no run folder, or no checkpoint in it yet.
    CheckpointError
        The manifest of the checkpoint is damaged.
    """
    return load_newest(folder, lambda manifest: manifest, Comm(SingleBackend()))


def load_newest(folder: Path, load: Callable[[Manifest], T], comm: Comm) -> T:
    """Return `load(manifest)` of the newest complete checkpoint of a run. Collective over `comm`.

    A run that is still training may delete the checkpoint meanwhile: then the newer one is loaded.

    Parameters
    ----------
    folder : Path
        The run folder.

    Raises
    ------
    ConfigError
        There is no run folder, or no checkpoint in it yet.
    CheckpointError
        The checkpoint is damaged.
    """
    broadcast_object(comm, partial(_check_run_folder, folder))
    loaded = load_latest(folder / CHECKPOINT_FOLDER, load, comm)
    if loaded is None:
        raise ConfigError(
            "run-folder.no-checkpoint",
            f"there is no complete checkpoint in {folder / CHECKPOINT_FOLDER}: a run writes one at "
            "the end of its first epoch (or sooner, by [checkpoint] every); wait until then",
            on_all_ranks=True,
        )
    return loaded


def _check_run_folder(folder: Path) -> None:
    """Refuse a folder that holds no run."""
    if not folder.is_dir():
        raise ConfigError(
            "run-folder.missing",
            f"there is no run folder {folder}: give the one that `dtrain train` printed",
        )
    if not (folder / "run.toml").is_file():
        raise ConfigError(
            "run-folder.no-run-file",
            f"{folder} has no run.toml: give a run folder that `dtrain train` printed",
        )


def check_same_run(
    out: Path, saved_table: Table | None, run: RunConfig, fully_trained: bool = False
) -> None:
    """Refuse a run that is not the one of the checkpoint, or would overwrite its own run file.

    Parameters
    ----------
    saved_table : dict or None
        The resolved run of the checkpoint to resume from; None: there is none.
    fully_trained : bool
        Whether that checkpoint holds all updates of `run`: then nothing is left to train, at
        whatever rate.

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
    saved = dict(_flatten(translate_old_keys(saved_table)))
    current = dict(_flatten(run.to_table()))
    changes = {
        key: f"{key} (was {_value_text(saved, key)}, is {_value_text(current, key)})"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    }
    forbidden = [text for key, text in changes.items() if not key.startswith(CHANGEABLE_KEYS)]
    if forbidden:
        raise ConfigError(
            "resume.settings-changed",
            f"cannot resume: settings differ from the checkpoint: {', '.join(forbidden)}; "
            f"restore them, or choose another --out than {out}",
        )
    length = [changes[key] for key in LENGTH_KEYS if key in changes]
    for part in length_dependent_parts(run) if length and not fully_trained else ():
        raise ConfigError(
            "resume.length-changed",
            f"cannot resume with another length, on which the {part} depend: "
            f"{', '.join(length)}; restore it, or choose another --out than {out}",
        )


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


def check_saved_data(saved: Table, current: Mapping[str, Any]) -> None:
    """Refuse data that are not those of the checkpoint.

    Parameters
    ----------
    saved : dict
        The fingerprint of the checkpoint.
    current : mapping
        That of the data, as `data_fingerprint` returns it.

    Raises
    ------
    ConfigError
        It names the first part that differs.
    """
    old = saved.get("data")
    if old is None:
        return
    for part, value in current.items():
        if not _is_same(old.get(part), value):
            change = "" if isinstance(value, list) else f" (was {old.get(part)}, is {value})"
            raise ConfigError(
                "resume.data-changed",
                f"cannot resume: the data have changed since the checkpoint: {part}{change}; put "
                "them back, or choose another --out",
            )


def _is_same(old: Any, new: Any) -> bool:
    """Return whether two parts of a fingerprint are equal, numbers up to rounding."""
    if not isinstance(new, list):
        return bool(old == new)
    return (
        isinstance(old, list)
        and len(old) == len(new)
        and np.allclose(old, new, rtol=1e-4, atol=1e-6, equal_nan=True)
    )


def length_dependent_parts(run: RunConfig) -> Iterator[str]:
    """Yield a description of each part that depends on the run's length, which then is fixed."""
    if run.lr_schedule.instance.depends_on_run_length:
        yield f"learning rates of '{run.lr_schedule.name}'"
    if run.sync.instance.traits().depends_on_run_length:
        yield f"phases of '{run.sync.name}'"


def _flatten(table: Table, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the nested tables as dotted keys and values; a tuple becomes a list."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def _value_text(table: Table, key: str) -> str:
    return toml_text(table[key]) if key in table else "absent"
