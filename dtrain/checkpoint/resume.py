"""Find the checkpoint that a run resumes from, and check that it is the same run.

Invariant: every key that decides what is trained must be the same. Only the length, the mesh, the
device and reporting may change; the length not where learning rates or phases depend on it. The
same data may be read from another path.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from hashlib import blake2b
from itertools import chain, count, zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from dtrain.checkpoint.manifest import (
    Manifest,
    checkpoint_names,
    latest_checkpoint,
    load_latest,
    read_manifest,
)
from dtrain.checkpoint.ownership import OWNER_FILE
from dtrain.comm.agree import broadcast_object
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.config.renamed_keys import translate_old_keys
from dtrain.config.run import RunConfig
from dtrain.errors import CheckpointError, ConfigError
from dtrain.schema import Table, flatten_table, toml_text

T = TypeVar("T")


CHECKPOINT_FOLDER = "checkpoints"


BEST_FOLDER = "best"
"""Folder inside it that holds the best evaluated weights; no run resumes from them."""


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
    "checkpoint.signals",
    "checkpoint.stop-before-limit",
    "checkpoint.best",
    "stop.",
    "ema.evaluate",
)


FLUSH_KEY = "evaluate.every-updates"
"""It sets where the pipeline is flushed, so it stays as it is."""


LENGTH_KEYS = ("epochs", "updates")


STRUCTURE = "structure of "
"""Begins the keys of a fingerprint that describe layers; alone, it is the key of the versions."""


OTHER_INPUTS = "further inputs"
"""The part of a fingerprint for the further inputs of samples, where there are some."""


SOURCE_SECTIONS = ("data", "model", "objective", "schedule", "sync", "optimizer")
"""Sections of a run that may name a module of the user."""


OWN_FILES = (
    *(f".{OWNER_FILE}*", "flight*"),
    *("job.sh", ".job.sh-*", "job.log", "slurm-*.log", ".requeues"),
)
"""Files of a job script, and those that a start leaves which ends before it trains."""


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
    damaged : dict of str to str
        Folders of newer checkpoints that are damaged, and what is wrong with each.
    """

    checkpoint: str | None = None
    run_table: Table | None = None
    updates: int = 0
    fingerprint: Table = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

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

    The ranks share the shards of the newest checkpoint and hash them. Where one is damaged, the
    checkpoint before it is taken. Parameters and errors are those of `find_checkpoint`.
    """
    damaged: dict[str, str] = {}

    def newest() -> list[dict[str, Any]]:
        manifest = find_checkpoint(out, resume, damaged)
        return [asdict(ResumePoint.from_manifest(manifest)), damaged]

    while True:
        record, damaged = broadcast_object(comm, newest)
        point = replace(ResumePoint(**record), damaged=damaged)
        if point.checkpoint is None:
            return point
        reasons = comm.allgather_object(_damaged_shard(Path(point.checkpoint), comm))
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is None:
            return point
        damaged[point.checkpoint] = reason


def _damaged_shard(folder: Path, comm: Comm) -> str | None:
    """Return what is wrong with this rank's share of the shards of a checkpoint."""
    try:
        manifest = read_manifest(folder)
        for name in sorted(manifest.hashes)[comm.rank :: comm.size]:
            manifest.check_shard(name)
    except CheckpointError as error:
        return error.message
    return None


def set_damaged_aside(out: Path, point: ResumePoint) -> None:
    """Rename the damaged checkpoints in `out`, so that no later start reads them."""
    for name in point.damaged:
        folder = Path(name)
        if folder.parent == out / CHECKPOINT_FOLDER and folder.exists():
            folder.rename(_free_name(folder.with_name(f"{folder.name}.damaged")))


def _free_name(path: Path) -> Path:
    others = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(name for name in chain([path], others) if not name.exists())


def damage_notes(point: ResumePoint) -> list[str]:
    """Return a note for each checkpoint that was passed over."""
    return [
        f"{message.partition(': delete')[0]}; the run resumes from the checkpoint before it, at "
        f"update {point.updates:,}, and the damaged one is kept as {Path(name).name}.damaged"
        for name, message in point.damaged.items()
    ]


def find_checkpoint(
    out: Path, resume: str, damaged: dict[str, str] | None = None
) -> Manifest | None:
    """Return the checkpoint that a run into `out` resumes from; None: it starts afresh.

    Parameters
    ----------
    damaged : dict, optional
        Folders that are passed over; a checkpoint whose manifest is damaged is added with the
        reason. Without it such a checkpoint is an error.
    resume : str
        "auto": the newest in `out`. "never": none, and `out` must be empty. "fresh": none, whatever
        `out` holds. Else the folder of another run, whose newest is taken unless `out` holds one
        already.

    Raises
    ------
    ConfigError
        `out` is not empty and no run folder, or the checkpoint that `resume` names is missing.
    CheckpointError
        The manifest of the checkpoint is damaged; with `damaged`, no checkpoint is whole.
    """
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    names -= {name for name in names if fnmatch_any(name, OWN_FILES)}
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
    if resume == "fresh":
        return None
    find = latest_checkpoint if damaged is None else partial(newest_whole, damaged=damaged)
    manifest = find(out / CHECKPOINT_FOLDER)
    if manifest is not None or resume in ("auto", "never"):
        return manifest
    manifest = find(Path(resume) / CHECKPOINT_FOLDER)
    if manifest is None:
        raise ConfigError(
            "run-folder.no-resume-checkpoint",
            f"--resume {resume}: there is no complete checkpoint in {resume}",
        )
    return manifest


def fnmatch_any(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name has one of some patterns, as of a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def newest_whole(folder: Path, damaged: dict[str, str]) -> Manifest | None:
    """Return the newest checkpoint in `folder` that is not known to be damaged.

    Parameters
    ----------
    damaged : dict
        As in `find_checkpoint`.

    Raises
    ------
    CheckpointError
        There are checkpoints, but none is whole.
    """
    paths = [folder / name for name in reversed(checkpoint_names(folder))]
    for path in paths:
        if str(path) in damaged:
            continue
        try:
            return read_manifest(path)
        except CheckpointError as error:
            damaged[str(path)] = error.message
    if paths:
        raise CheckpointError(
            "checkpoint.none-whole",
            f"no checkpoint in {folder} is whole; the newest: {damaged[str(paths[0])]}; choose "
            "another --out to start anew",
        )
    return None


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


def load_newest(folder: Path, load: Callable[[Manifest], T], comm: Comm, best: bool = False) -> T:
    """Return `load(manifest)` of the newest complete checkpoint of a run. Collective over `comm`.

    A run that is still training may delete the checkpoint meanwhile: then the newer one is loaded.

    Parameters
    ----------
    folder : Path
        The run folder.
    best : bool
        Load the best evaluated weights instead, which `[checkpoint] best` keeps.

    Raises
    ------
    ConfigError
        There is no run folder, or no checkpoint in it yet.
    CheckpointError
        The checkpoint is damaged.
    """
    broadcast_object(comm, partial(_check_run_folder, folder))
    checkpoints = folder / CHECKPOINT_FOLDER
    loaded = load_latest(checkpoints / BEST_FOLDER if best else checkpoints, load, comm)
    if loaded is None and best:
        raise ConfigError(
            "run-folder.no-best-checkpoint",
            f"there is no best checkpoint in {folder}: a run keeps it with [checkpoint] best = "
            '"accuracy" or another metric, from its first evaluation on',
            on_all_ranks=True,
        )
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
    out: Path,
    saved_table: Table | None,
    run: RunConfig,
    fully_trained: bool = False,
    data_paths_may_differ: bool = False,
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


def _loaded_module(name: str) -> ModuleType | None:
    """Return a module that is imported; the script that Python runs has the name of its file."""
    main = sys.modules.get("__main__")
    if name not in sys.modules and Path(getattr(main, "__file__", None) or "").stem == name:
        return main
    return sys.modules.get(name)


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


def data_path_notes(saved_table: Table | None, run: RunConfig) -> list[str]:
    """Return a note if the run reads the data of the checkpoint from other paths."""
    changes = data_path_changes(saved_table, run)
    if not changes:
        return []
    return [
        f"the data are read from another path than before: {', '.join(changes.values())}; sizes, "
        "labels and some samples of each split are those of the checkpoint"
    ]


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
            change = "" if isinstance(value, list) else f" (was {old.get(part)}, is {value})"
            raise ConfigError(
                "resume.data-changed",
                f"cannot resume: the data have changed since the checkpoint: {part}{change}{paths};"
                " put them back, or choose another --out",
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


def _value_text(table: Table, key: str) -> str:
    return toml_text(table[key]) if key in table else "absent"
