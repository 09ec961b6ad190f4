"""Checkpoints: HDF5 shards, one per rank, and a manifest; visible only when complete.

Invariant: a folder without the suffix ``.part`` is complete. Every shard is written and synced,
then the manifest, then one rename commits them all. Keys are global names, so any rank finds what
it holds whoever wrote it; nothing is ever unpickled.

::

    checkpoints/
      update-00000072/
        manifest.json            update, run table, counters; file, bytes, sha256 and keys per shard
        replica-0-stage-0.h5     model/fc1.weight            what is evaluated and exported
                                 replica/0/optimizer/fc1.weight/exp_avg
        replica-0-stage-1.h5     ...
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
from torch import Tensor

from dtrain.block import Block
from dtrain.comm.comm import Comm
from dtrain.errors import DATA, Refusal
from dtrain.shard import fsync, hashed, loaded, store, writing
from dtrain.syncs.sync import Sync

PART = ".part"


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
    table: dict[str, Any]
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
                raise Refusal(f"the checkpoint {self.folder} lacks '{key}'", DATA)
            shards.setdefault(self.files[key], []).append(key)
        found = {}
        for name, wanted in shards.items():
            with h5py.File(self.folder / name, "r", locking=False) as shard:
                found.update({key: loaded(shard[key]) for key in wanted})
        return found

    def verified(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the keys of `held`; refuse a damaged shard, or another model.

        Parameters
        ----------
        held : mapping of str to Tensor
            This rank's tensors by their keys; the shards that hold them are hashed.
        """
        missing = sorted(held.keys() - self.files.keys())
        if missing:
            raise Refusal(f"the checkpoint {self.folder} lacks '{missing[0]}'", DATA)
        self.intact(held)
        found = self.load(held)
        for key, tensor in found.items():
            if (tensor.shape, tensor.dtype) != (held[key].shape, held[key].dtype):
                was = f"{tuple(tensor.shape)} {tensor.dtype}"
                now = f"{tuple(held[key].shape)} {held[key].dtype}"
                raise Refusal(f"'{key}' is {was} in {self.folder}, but {now} in the model", DATA)
        return found

    def intact(self, keys: Iterable[str]) -> None:
        """Refuse damage in the shards that hold `keys`."""
        for name in sorted({self.files[key] for key in keys}):
            path = self.folder / name
            if not path.is_file() or hashed(path) != self.hashes[name]:
                raise Refusal(
                    f"{path} is damaged (its content is not what the manifest says): delete the "
                    f"folder {self.folder} to go on from the checkpoint before it",
                    DATA,
                )

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return every tensor whose key starts with `prefix`, by the rest of its key."""
        keys = [key for key in self.files if key.startswith(prefix)]
        return {key[len(prefix) :]: tensor for key, tensor in self.load(keys).items()}


def latest(folder: Path) -> Manifest | None:
    """Return the newest complete checkpoint in `folder`, None if there is none."""
    while True:
        complete = [path.parent for path in folder.glob("update-*/manifest.json")]
        named = sorted(path for path in complete if path.suffix != PART)
        try:
            return read(named[-1]) if named else None
        except FileNotFoundError:  # a run that still goes on has just replaced it
            continue


def read(folder: Path) -> Manifest:
    """Return what the complete checkpoint in `folder` says of itself."""
    try:
        told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(
            f"{folder / 'manifest.json'} is damaged ({error}): delete the folder {folder} to go on "
            "from the checkpoint before it",
            DATA,
        ) from error
    files = {key: name for name, shard in told["shards"].items() for key in shard["keys"]}
    hashes = {name: shard["sha256"] for name, shard in told["shards"].items()}
    return Manifest(folder, told["run"], told["state"], files, hashes)


def save(
    folder: Path,
    shard: str,
    tensors: Mapping[str, Tensor],
    table: dict[str, Any],
    state: dict[str, Any],
    control: Comm,
    keep: int,
) -> None:
    """Write one checkpoint; collective over all ranks of `control`. Refuses on ranks that cannot.

    Parameters
    ----------
    folder : Path
        Where checkpoints lie; the same path on all ranks.
    shard : str
        This rank's file name, without suffix.
    tensors : mapping of str to Tensor
        What this rank writes, by global key; where there are none it writes no shard.
    table, state : dict
        For the manifest; rank 0's count.
    keep : int
        How many complete checkpoints remain, this one included.
    """
    final = folder / f"update-{state['update']:08d}"
    part = final.with_name(final.name + PART)
    if control.rank == 0:
        with writing(part):
            for remains in folder.glob(f"*{PART}"):
                shutil.rmtree(remains)
            part.mkdir(parents=True)
    control.exchange("made")
    with writing(part):
        row = store(part / f"{shard}.h5", tensors) if tensors else None
    rows = control.exchange(row)
    if control.rank == 0:
        shards = {row.pop("file"): row for row in rows if row is not None}
        with writing(part):
            told = {"run": table, "state": state, "shards": shards}
            _text(part / "manifest.json", json.dumps(told))
            fsync(part)
            if final.exists():
                _remove(final)
            part.rename(final)
            fsync(folder)
            for old in sorted(folder.glob("update-*"))[:-keep]:
                _remove(old)
    control.exchange("done")


def tensors(
    blocks: Mapping[int, Block],
    syncs: Mapping[int, Sync],
    views: Mapping[int, Mapping[str, Tensor]],
    replica: int,
) -> dict[str, Tensor]:
    """Return what a rank hands over: each part's state under its global name.

    Replicas that are not apart hold the same, so the first writes for all. `views` are what the
    syncs show, by block.
    """
    found: dict[str, Tensor] = {}
    for index, block in blocks.items():
        sync, own = syncs[index], f"replica/{replica}"
        if replica == 0:
            found |= {f"model/{name}": tensor for name, tensor in views[index].items()}
        if replica and not sync.apart:
            continue
        if sync.apart or sync.reforms:
            found |= {f"{own}/{name}": tensor for name, tensor in block.tensors().items()}
        found |= {f"{own}/optimizer/{name}": each for name, each in block.memory().items()}
        found |= {f"{own}/sync/{index}/{name}": each for name, each in sync.state().items()}
    return found


def restore(
    manifest: Manifest, blocks: Mapping[int, Block], syncs: Mapping[int, Sync], replica: int
) -> bool:
    """Give every part of a rank its state back, in place; bit for bit on as many replicas.

    Replicas that trained apart and are not as many as before all start from ``model/``, their
    optimizers and syncs afresh; then this returns False.

    Raises
    ------
    Refusal
        The checkpoint is damaged, or its tensors are not those of this model (code 3).
    """
    one = next(iter(syncs.values()))
    same = not one.apart or manifest.replicas == one.replicas.size
    own = f"replica/{replica if one.apart else 0}"
    root = own if same and (one.apart or one.reforms) else "model"
    for index, sync in syncs.items() if same else ():
        sync.reshape(manifest.under(f"{own}/sync/{index}/"))
    tensors = {name: t for block in blocks.values() for name, t in block.tensors().items()}
    held = {f"{root}/{name}": tensor for name, tensor in tensors.items()}
    for key, tensor in manifest.verified(held).items():
        held[key].copy_(tensor)
    for index, block in blocks.items() if same else ():
        memory: dict[str, Tensor] = {}
        for name in block.parameters:
            entries = manifest.under(f"{own}/optimizer/{name}/")
            memory |= {f"{name}/{entry}": tensor for entry, tensor in entries.items()}
        block.remember(memory)
        syncs[index].restore(manifest.under(f"{own}/sync/{index}/"))
    return same


def _remove(folder: Path) -> None:
    """Remove a checkpoint; what a crash leaves of it is marked as incomplete."""
    doomed = folder.with_name(folder.name + ".old" + PART)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    fsync(path)
