"""Checkpoints: HDF5 shards, one per rank, and a manifest; visible only when complete.

Invariant: a folder without the suffix ``.part`` is complete. Every shard is written and synced,
then the manifest, then one rename commits them all. Keys are global names, so a rank finds its
tensors whichever rank wrote them. Nothing is ever unpickled.

::

    checkpoints/
      update-00000072/
        manifest.json            update, run table, counters, fingerprint of model and data;
                                 file, bytes, sha256 and keys per shard
        replica-0-stage-0.h5     model/fc1.weight            evaluated and exported
                                 statistics/mean             of the training inputs, by channel
                                 replica/0/optimizer/fc1.weight/exp_avg
        replica-0-stage-1.h5     ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.block.block import Block
from dtrain.checkpoint import files
from dtrain.checkpoint.manifest import PARTIAL_SUFFIX, Manifest, checkpoint_names
from dtrain.checkpoint.manifest_file import write_manifest
from dtrain.checkpoint.shard import write_shard
from dtrain.comm.communicator import Comm
from dtrain.errors import CheckpointError
from dtrain.syncs.base import Sync


def save(
    folder: Path,
    shard: str,
    tensors: Mapping[str, Tensor],
    run_table: dict[str, Any],
    state: dict[str, Any],
    control: Comm,
    keep: int,
    fingerprint: dict[str, Any] | None = None,
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

    Raises
    ------
    CheckpointError
        On a rank that cannot write: the disk is full, for example.
    """
    final = folder / f"update-{state['update']:08d}"
    part = final.with_name(final.name + PARTIAL_SUFFIX)
    if control.rank == 0:
        with _convert_write_errors(part):
            for remains in folder.glob(f"update-*{PARTIAL_SUFFIX}"):
                files.delete_folder(remains)
            files.make_folder(part)
    control.allgather_object("made")
    with _convert_write_errors(part):
        row = write_shard(part / f"{shard}.h5", tensors) if tensors else None
    rows = control.allgather_object(row)
    if control.rank == 0:
        shards = {row.pop("file"): row for row in rows if row is not None}
        with _convert_write_errors(part):
            manifest = {"run": run_table, "state": state, "fingerprint": fingerprint or {}}
            _commit(part, final, manifest | {"shards": shards})
            others = [folder / name for name in checkpoint_names(folder) if name != final.name]
            for old in others[: max(0, len(others) - keep + 1)]:
                _remove(old)
    control.allgather_object("done")


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
    replaced = _set_aside(final) if final.exists() else None
    files.calls.rename(part, final)
    files.fsync(final.parent)
    if replaced is not None:
        files.delete_folder(replaced)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, marked as incomplete first, in case the process dies meanwhile."""
    files.delete_folder(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    """Mark a checkpoint as incomplete by its name; return the new path."""
    removed = folder.with_name(folder.name + ".old" + PARTIAL_SUFFIX)
    files.calls.rename(folder, removed)
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
