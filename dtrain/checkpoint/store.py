"""Checkpoints: HDF5 shards, one per rank, and a manifest; visible only when complete.

Invariant: a folder without the suffix ``.part`` is complete. Every shard is written and synced,
then the manifest, then one rename commits them all. Keys are global names, so a rank finds its
tensors whichever rank wrote them. Nothing is ever unpickled.

::

    checkpoints/
      update-00000072/
        manifest.json            update, run table, counters, fingerprint of model and data;
                                 file, bytes, hash and keys per shard
        replica-0-stage-0.h5     model/fc1.weight            evaluated and exported
                                 statistics/mean             of the training inputs, by channel
                                 replica/0/optimizer/fc1.weight/exp_avg
        replica-0-stage-1.h5     ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from dtrain.block.block import Block
from dtrain.checkpoint import files
from dtrain.checkpoint.manifest import PARTIAL_SUFFIX, Manifest, checkpoint_names
from dtrain.checkpoint.manifest_file import write_manifest
from dtrain.checkpoint.shard import ShardImage, write_image, write_shard
from dtrain.checkpoint.shard_file import SHARD_HASH, copy_file
from dtrain.comm.communicator import Comm
from dtrain.errors import CheckpointError
from dtrain.syncs.base import Sync


@final
@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint that is being written.

    Attributes
    ----------
    folder : Path
        The folder of the run's checkpoints; the same path on all ranks.
    update : int
        Updates that it holds.
    """

    folder: Path
    update: int

    @property
    def final(self) -> Path:
        """Its path once it is complete."""
        return self.folder / f"update-{self.update:08d}"

    @property
    def part(self) -> Path:
        """Its path until then."""
        return self.final.with_name(self.final.name + PARTIAL_SUFFIX)

    def make_folder(self) -> None:
        """Make its folder, on rank 0, and delete what unfinished saves have left.

        This method, and the other two, raise a `CheckpointError` if the disk refuses.
        """
        with _convert_write_errors(self.part):
            remove_partial(self.folder)
            if not self.folder.is_dir():
                files.make_folder(self.folder)
            files.calls.mkdir(self.part)  # its name survives a power cut with the commit

    def write_shard(
        self,
        shard: str,
        tensors: Mapping[str, Tensor],
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Write one shard and return its row for the manifest. Parameters: see `write_shard`."""
        with _convert_write_errors(self.part):
            return write_shard(self.part / f"{shard}.h5", tensors, check)

    def write_image(
        self, shard: str, image: ShardImage, check: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Write one shard that is in memory; else as `write_shard`."""
        with _convert_write_errors(self.part):
            return write_image(self.part / f"{shard}.h5", image, check)

    def copy_shard(
        self, source: Path, row: dict[str, Any], check: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Copy a shard from another disk and return its row, which is `row`.

        Raises
        ------
        CheckpointError
            The shard is damaged, too.
        """
        with _convert_write_errors(self.part):
            digest = copy_file(source, self.part / source.name, check)
        if digest != row[SHARD_HASH]:
            raise CheckpointError(
                "checkpoint.shard-damaged",
                f"{source} is damaged (its hash is not that of the manifest): the checkpoint "
                "before it is complete",
            )
        return row

    def commit(
        self,
        content: Mapping[str, Any],
        rows: Iterable[dict[str, Any] | None],
        keep: int,
        delete: Callable[[Path], None] = files.delete_folder,
    ) -> None:
        """Write the manifest, rename the folder, and remove old checkpoints, on rank 0.

        Parameters
        ----------
        content : mapping
            The manifest without its shards.
        rows : iterable of dict or None
            The rows of all shards.
        keep : int
            Number of complete checkpoints that remain, this one included.
        delete : callable
            Deletes the folder of an old checkpoint, now or later; it is one no more.
        """
        shards = {row["file"]: _without_file(row) for row in rows if row is not None}
        with _convert_write_errors(self.part):
            _commit(self.part, self.final, {**content, "shards": shards})
            names = checkpoint_names(self.folder)
            others = [self.folder / name for name in names if name != self.final.name]
            for old in others[: max(0, len(others) - keep + 1)]:
                delete(_set_aside(old))


def save(
    folder: Path,
    shard: str,
    tensors: Mapping[str, Tensor],
    run_table: dict[str, Any],
    state: dict[str, Any],
    control: Comm,
    keep: int,
    fingerprint: dict[str, Any] | None = None,
    delete: Callable[[Path], None] = files.delete_folder,
) -> None:
    """Write one checkpoint. Collective over `control`.

    Parameters
    ----------
    folder : Path
        The folder of the run's checkpoints; the same path on all ranks.
    shard : str
        This rank's file name, without suffix.
    tensors : mapping of str to Tensor
        This rank's tensors, by global key; without any it writes no shard.
    run_table, state : dict
        For the manifest; those of rank 0 are written.
    keep : int
        Number of complete checkpoints that remain, this one included.
    fingerprint : dict, optional
        What identifies model and data, for the manifest; that of rank 0 is written.
    delete : callable
        See `NewCheckpoint.commit`.

    Raises
    ------
    CheckpointError
        On a rank that cannot write: the disk is full, for example.
    """
    checkpoint = NewCheckpoint(folder, state["update"])
    if control.rank == 0:
        checkpoint.make_folder()
    control.allgather_object("made")
    row = checkpoint.write_shard(shard, tensors) if tensors else None
    rows = control.allgather_object(row)
    if control.rank == 0:
        checkpoint.commit(manifest_content(run_table, state, fingerprint), rows, keep, delete)
    control.allgather_object("done")


def manifest_content(
    run_table: dict[str, Any], state: dict[str, Any], fingerprint: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the content of a manifest without its shards."""
    return {"run": run_table, "state": state, "fingerprint": fingerprint or {}}


def remove_partial(folder: Path) -> None:
    """Delete what a run that was killed left of checkpoints that it wrote or deleted.

    Raises
    ------
    OSError
        A part of it cannot be deleted.
    """
    for remains in folder.glob(f"update-*{PARTIAL_SUFFIX}"):
        files.delete_folder(remains)


def _without_file(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "file"}


def collect_tensors(
    blocks: Mapping[int, Block],
    syncs: Mapping[int, Sync],
    eval_weights: Mapping[int, Mapping[str, Tensor]],
    replica: int,
) -> dict[str, Tensor]:
    """Return the tensors that a rank saves, by global name.

    Replicas that never diverge hold the same tensors, so the first one saves for all.

    Parameters
    ----------
    eval_weights : mapping
        The evaluation weights of the syncs, by block.
    """
    tensors: dict[str, Tensor] = {}
    for index, block in blocks.items():
        sync, root = syncs[index], f"replica/{replica}"
        traits = sync.traits()
        if replica == 0:
            tensors |= {f"model/{name}": tensor for name, tensor in eval_weights[index].items()}
        if replica and not traits.replicas_diverge:
            continue
        parts = {"optimizer": block.optimizer_state(), f"sync/{index}": sync.state()}
        if traits.replicas_diverge or traits.reparametrises:
            tensors |= {f"{root}/{name}": tensor for name, tensor in block.tensors().items()}
        for part, state in parts.items():
            tensors |= {f"{root}/{part}/{name}": tensor for name, tensor in state.items()}
    return tensors


def restore(
    manifest: Manifest, blocks: Mapping[int, Block], syncs: Mapping[int, Sync], replica: int
) -> bool:
    """Load a rank's blocks, optimizers and syncs in place, bit for bit on as many replicas.

    Returns
    -------
    bool
        False where replicas that diverge are not as many as before. Then all start from
        ``model/``, with fresh optimizers and syncs.

    Raises
    ------
    CheckpointError
        The checkpoint is damaged, or its tensors are not those of this model.
    """
    sync = next(iter(syncs.values()))
    traits = sync.traits()
    same = not traits.replicas_diverge or manifest.replicas == sync.replicas.size
    own_root = f"replica/{replica if traits.replicas_diverge else 0}"
    root = own_root if same and (traits.replicas_diverge or traits.reparametrises) else "model"
    if same:
        for index in syncs:
            syncs[index].restore_shapes(manifest.load_prefix(f"{own_root}/sync/{index}/"))
    load_blocks(manifest, blocks, root)
    if same:
        for index, block in blocks.items():
            block.load_optimizer_state(_optimizer_state(manifest, block, own_root))
            syncs[index].restore(manifest.load_prefix(f"{own_root}/sync/{index}/"))
    return same


def load_blocks(manifest: Manifest, blocks: Mapping[int, Block], root: str) -> None:
    """Load the parameters and buffers of blocks in place, from the keys under `root`.

    Raises
    ------
    CheckpointError
        The checkpoint is damaged, or its tensors are not those of these blocks.
    """
    tensors = {
        f"{root}/{name}": tensor
        for block in blocks.values()
        for name, tensor in block.tensors().items()
    }
    for key, tensor in manifest.load_like(tensors).items():
        tensors[key].copy_(tensor)


def _optimizer_state(manifest: Manifest, block: Block, root: str) -> dict[str, Tensor]:
    """Return the optimizer state of a block's parameters, as `load_optimizer_state` takes it."""
    state: dict[str, Tensor] = {}
    for name in block.parameters:
        entries = manifest.load_prefix(f"{root}/optimizer/{name}/")
        state |= {f"{name}/{entry}": tensor for entry, tensor in entries.items()}
    return state


def _commit(part: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and rename the folder, in the place of an older one of that name."""
    write_manifest(part, manifest)
    files.fsync(part)
    replaced = None
    if final.exists():
        replaced = _replace(part, final)
    else:
        files.calls.rename(part, final)
    files.fsync(final.parent)
    if replaced is not None:
        files.delete_folder(replaced)


def _replace(part: Path, final: Path) -> Path:
    """Put a checkpoint in the place of one of the same update; return the new path of that one.

    Where the file system cannot exchange names, that update has no checkpoint for an instant.
    """
    try:
        files.calls.exchange(part, final)
        return part
    except OSError:
        replaced = _set_aside(final)
        files.calls.rename(part, final)
        return replaced


def _set_aside(folder: Path) -> Path:
    """Mark a checkpoint as incomplete by its name, also after a power cut; return the new path."""
    removed = folder.with_name(folder.name + ".old" + PARTIAL_SUFFIX)
    files.calls.rename(folder, removed)
    files.fsync(folder.parent)
    return removed


@contextmanager
def _convert_write_errors(folder: Path) -> Iterator[None]:
    """Raise an error of the disk as a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "checkpoint.write-failed",
            f"cannot write the checkpoint {folder}: {error}; the one before it is complete: free "
            "space and start the same command again",
        ) from error
