"""Load the newest complete checkpoint of a run folder, also while the run still trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from dtrain.checkpoint.manifest import Manifest, load_latest
from dtrain.checkpoint.run_folder import BEST_FOLDER, CHECKPOINT_FOLDER
from dtrain.comm.agree import broadcast_object
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError

T = TypeVar("T")


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
    path = folder / "run.toml"
    if path.is_symlink() or not path.is_file():
        raise ConfigError(
            "run-folder.no-run-file",
            f"{folder} has no run.toml of its own: give a run folder that `dtrain train` printed",
        )
