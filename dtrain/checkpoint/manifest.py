"""Read a checkpoint: its manifest lists the tensors of each shard, and the hash of each shard.

Invariant: a tensor is read only from a shard whose hash was compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dtrain.checkpoint.manifest_file import CHECKPOINT_NAME, read_manifest_content
from dtrain.checkpoint.shard import find_dataset, open_shard, read_tensor
from dtrain.checkpoint.shard_file import SHARD_HASH, hash_file
from dtrain.comm.agree import all_or_none, broadcast_object
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.buffers import describe_tensor
from dtrain.comm.communicator import Comm
from dtrain.errors import CheckpointError, ConfigError, DtrainError

T = TypeVar("T")


PARTIAL_SUFFIX = ".part"


MAX_RELOADS = 20
"""Checkpoints in a row that a running job may replace while they are read."""


@dataclass(frozen=True)
class Manifest:
    """The manifest of a complete checkpoint.

    Attributes
    ----------
    folder : Path
        The checkpoint, which holds the shards.
    run_table : dict
        The resolved run, as the nested tables of its run file.
    state : dict
        The counts of the loop (update, epoch, sums), as `save` was given them.
    files : dict of str to str
        The shard of every key.
    hashes : dict of str to str
        Hash of every shard.
    fingerprint : dict
        What identifies model and data; empty in checkpoints of earlier versions.
    """

    folder: Path
    run_table: dict[str, Any]
    state: dict[str, Any]
    files: dict[str, str]
    hashes: dict[str, str]
    fingerprint: dict[str, Any] = field(default_factory=dict)
    _intact: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def replicas(self) -> int:
        """Number of replicas that saved a state of their own."""
        return 1 + max(int(key.split("/")[1]) for key in self.files if key.startswith("replica/"))

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of `keys`, on the CPU.

        Raises
        ------
        CheckpointError
            A key is missing, or its shard is damaged.
        """
        keys_by_shard: dict[str, list[str]] = {}
        for key in keys:
            if key not in self.files:
                raise CheckpointError(
                    "checkpoint.key-missing", f"the checkpoint {self.folder} lacks '{key}'"
                )
            keys_by_shard.setdefault(self.files[key], []).append(key)
        tensors = {}
        for name, shard_keys in sorted(keys_by_shard.items()):
            self.check_shard(name)
            with open_shard(self.folder / name) as shard:
                tensors.update({key: read_tensor(shard, key) for key in shard_keys})
        return tensors

    def load_like(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the keys of `expected`, on the CPU.

        Parameters
        ----------
        expected : mapping of str to Tensor
            Tensors of a model, by key.

        Raises
        ------
        CheckpointError
            A key is missing, its shard is damaged, or shape or dtype are not those of the model.
        """
        tensors = self.load(expected)
        for key, tensor in tensors.items():
            saved, current = describe_tensor(tensor), describe_tensor(expected[key])
            if saved != current:
                raise CheckpointError(
                    "checkpoint.wrong-shape",
                    f"'{key}' is {saved} in {self.folder}, but {current} in the model",
                )
        return tensors

    def load_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Return every tensor whose key starts with `prefix`, by the rest of its key."""
        keys = [key for key in self.files if key.startswith(prefix)]
        return {key.removeprefix(prefix): tensor for key, tensor in self.load(keys).items()}

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor whose key starts with `prefix`, by the rest of it."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name in sorted(set(self.files.values())):
            self.check_shard(name)
            with open_shard(self.folder / name) as shard:
                keys = [k for k, file in self.files.items() if file == name]
                shapes |= {
                    key.removeprefix(prefix): tuple(find_dataset(shard, key).shape)
                    for key in keys
                    if key.startswith(prefix)
                }
        return shapes

    def load_model(self, ema: bool = False) -> dict[str, Tensor]:
        """Return the evaluated model by name, or that of the averaged weights.

        Raises
        ------
        ConfigError
            The run had no averaged weights.
        """
        if ema:
            self.check_ema()
        return self.load_prefix("model/") | (self.load_prefix("ema/") if ema else {})

    def check_ema(self) -> None:
        """Refuse a checkpoint without averaged weights."""
        if not any(key.startswith("ema/") for key in self.files):
            raise ConfigError(
                "checkpoint.no-ema",
                f"{self.folder} holds no averaged weights: train with [ema] decay = 0.999",
            )

    def check_shard(self, name: str) -> None:
        """Refuse a shard that is missing or damaged; each is hashed once.

        Raises
        ------
        CheckpointError
            It names the file.
        """
        if name in self._intact:
            return
        path = self.folder / name
        reason = "its hash is not that of the manifest"
        try:
            is_intact = hash_file(path) == self.hashes[name]
        except OSError as error:
            is_intact, reason = False, str(error)
        if not is_intact:
            raise CheckpointError(
                "checkpoint.shard-damaged",
                f"{path} is damaged ({reason}): delete the folder {self.folder} to resume from "
                "the checkpoint before it",
            )
        self._intact.add(name)


def latest_checkpoint(folder: Path) -> Manifest | None:
    """Return the newest complete checkpoint in `folder`, None if there is none.

    Raises
    ------
    CheckpointError
        Its manifest is damaged.
    """
    return load_latest(folder, lambda manifest: manifest, Comm(SingleBackend()))


def load_latest(folder: Path, load: Callable[[Manifest], T], comm: Comm) -> T | None:
    """Return `load(manifest)` of the newest complete checkpoint, None if there is none.

    Collective over `comm`, whose ranks all load the same checkpoint. A running job may delete it
    while it is loaded: then the newer one is loaded.

    Parameters
    ----------
    folder : Path
        The folder of the checkpoints of a run.

    Raises
    ------
    CheckpointError
        The checkpoint is damaged, or too many were deleted one after the other.
    """
    for _ in range(MAX_RELOADS):
        name = broadcast_object(comm, partial(_latest_name, folder))
        if name is None:
            return None
        loaded = all_or_none(comm, partial(_load_unless_deleted, folder / name, load))
        if all(comm.allgather_object(bool(loaded))):
            return loaded[0]
    raise CheckpointError(
        "checkpoint.replaced-while-read",
        f"{MAX_RELOADS} checkpoints in {folder} were replaced while they were read: try again when "
        "the run has ended",
        on_all_ranks=True,
    )


def checkpoint_names(folder: Path) -> list[str]:
    """Return the names of the complete checkpoints in a folder, the oldest first.

    A folder of another name is none: copies and remains are left alone.
    """
    names = [path.name for path in folder.glob("update-*") if path.is_dir()]
    return sorted(filter(CHECKPOINT_NAME.fullmatch, names), key=lambda name: int(name[7:]))


def _latest_name(folder: Path) -> str | None:
    """Return the name of the newest complete checkpoint."""
    return next(reversed(checkpoint_names(folder)), None)


def _load_unless_deleted(folder: Path, load: Callable[[Manifest], T]) -> list[T]:
    """Return `load(manifest)` of a checkpoint in a list, an empty list if it has been deleted."""
    try:
        return [load(read_manifest(folder))]
    except (DtrainError, OSError):
        if folder.is_dir():
            raise
        return []


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the complete checkpoint in `folder`.

    Raises
    ------
    CheckpointError
        It is damaged.
    """
    content = read_manifest_content(folder)
    shards = content["shards"]
    files = {key: name for name, shard in shards.items() for key in shard["keys"]}
    hashes = {name: shard[SHARD_HASH] for name, shard in shards.items()}
    fingerprint = content.get("fingerprint", {})
    return Manifest(folder, content["run"], content["state"], files, hashes, fingerprint)
