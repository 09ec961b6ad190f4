"""Read the manifest of a checkpoint: which shard holds which tensor, and its hash."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
from torch import Tensor

from dtrain.checkpoint.shard import file_sha256, read_tensor
from dtrain.errors import DataError

PARTIAL_SUFFIX = ".part"


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself.

    Attributes
    ----------
    folder : Path
        Where its shards lie.
    table : dict
        The resolved run, as the nested tables of its run file.
    state : dict
        The loop's own counts (update, epoch, sums), as `save` was given them.
    files : dict of str to str
        The shard of every key.
    hashes : dict of str to str
        SHA-256 of every shard.
    """

    folder: Path
    run_table: dict[str, Any]
    state: dict[str, Any]
    files: dict[str, str]
    hashes: dict[str, str]

    @property
    def replicas(self) -> int:
        """Replicas that handed over a state of their own."""
        return 1 + max(int(key.split("/")[1]) for key in self.files if key.startswith("replica/"))

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of `keys`, read from the shards that hold them, on the CPU."""
        shards: dict[str, list[str]] = {}
        for key in keys:
            if key not in self.files:
                raise DataError("todo.key", f"the checkpoint {self.folder} lacks '{key}'")
            shards.setdefault(self.files[key], []).append(key)
        found = {}
        for name, wanted in shards.items():
            with h5py.File(self.folder / name, "r", locking=False) as shard:
                found.update({key: read_tensor(shard[key]) for key in wanted})
        return found

    def verify_and_load(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the keys of `held`; refuse a damaged shard, or another model.

        Parameters
        ----------
        held : mapping of str to Tensor
            This rank's tensors by their keys; the shards that hold them are hashed.
        """
        missing = sorted(expected.keys() - self.files.keys())
        if missing:
            raise DataError("todo.key", f"the checkpoint {self.folder} lacks '{missing[0]}'")
        self.verify_shards(expected)
        found = self.load(expected)
        for key, tensor in found.items():
            if (tensor.shape, tensor.dtype) != (expected[key].shape, expected[key].dtype):
                was = f"{tuple(tensor.shape)} {tensor.dtype}"
                now = f"{tuple(expected[key].shape)} {expected[key].dtype}"
                raise DataError(
                    "todo.key", f"'{key}' is {was} in {self.folder}, but {now} in the model"
                )
        return found

    def verify_shards(self, keys: Iterable[str]) -> None:
        """Refuse damage in the shards that hold `keys`."""
        for name in sorted({self.files[key] for key in keys}):
            path = self.folder / name
            if not path.is_file() or file_sha256(path) != self.hashes[name]:
                raise DataError(
                    "todo.key",
                    f"{path} is damaged (its content is not what the manifest says): delete the "
                    f"folder {self.folder} to go on from the checkpoint before it",
                )

    def load_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Return every tensor whose key starts with `prefix`, by the rest of its key."""
        keys = [key for key in self.files if key.startswith(prefix)]
        return {key[len(prefix) :]: tensor for key, tensor in self.load(keys).items()}


def latest_checkpoint(folder: Path) -> Manifest | None:
    """Return the newest complete checkpoint in `folder`, None if there is none."""
    while True:
        complete = [path.parent for path in folder.glob("update-*/manifest.json")]
        named = sorted(path for path in complete if path.suffix != PARTIAL_SUFFIX)
        try:
            return read_manifest(named[-1]) if named else None
        except FileNotFoundError:  # a run that still goes on has just replaced it
            continue


def read_manifest(folder: Path) -> Manifest:
    """Return what the complete checkpoint in `folder` says of itself."""
    try:
        told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            "todo.key",
            f"{folder / 'manifest.json'} is damaged ({error}): delete the folder {folder} to go on "
            "from the checkpoint before it",
        ) from error
    files = {key: name for name, shard in told["shards"].items() for key in shard["keys"]}
    hashes = {name: shard["sha256"] for name, shard in told["shards"].items()}
    return Manifest(folder, told["run"], told["state"], files, hashes)
