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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.block.block import Block
from dtrain.checkpoint.manifest import PARTIAL_SUFFIX, Manifest
from dtrain.checkpoint.shard import convert_write_errors, fsync, write_shard
from dtrain.comm.communicator import Comm
from dtrain.syncs.base import Sync


def save(
    folder: Path,
    shard: str,
    tensors: Mapping[str, Tensor],
    run_table: dict[str, Any],
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
    part = final.with_name(final.name + PARTIAL_SUFFIX)
    if control.rank == 0:
        with convert_write_errors(part):
            for remains in folder.glob(f"*{PARTIAL_SUFFIX}"):
                shutil.rmtree(remains)
            part.mkdir(parents=True)
    control.allgather_object("made")
    with convert_write_errors(part):
        row = write_shard(part / f"{shard}.h5", tensors) if tensors else None
    rows = control.allgather_object(row)
    if control.rank == 0:
        shards = {row.pop("file"): row for row in rows if row is not None}
        with convert_write_errors(part):
            told = {"run": run_table, "state": state, "shards": shards}
            _write_text(part / "manifest.json", json.dumps(told))
            fsync(part)
            if final.exists():
                _remove(final)
            part.rename(final)
            fsync(folder)
            for old in sorted(folder.glob("update-*"))[:-keep]:
                _remove(old)
    control.allgather_object("done")


def collect_tensors(
    blocks: Mapping[int, Block],
    syncs: Mapping[int, Sync],
    eval_weights: Mapping[int, Mapping[str, Tensor]],
    replica: int,
) -> dict[str, Tensor]:
    """Return what a rank hands over: each part's state under its global name.

    Replicas that are not apart hold the same, so the first writes for all. `views` are what the
    syncs show, by block.
    """
    found: dict[str, Tensor] = {}
    for index, block in blocks.items():
        sync, own = syncs[index], f"replica/{replica}"
        traits = sync.traits()
        if replica == 0:
            found |= {f"model/{name}": tensor for name, tensor in eval_weights[index].items()}
        if replica and not traits.replicas_diverge:
            continue
        if traits.replicas_diverge or traits.reparametrises:
            found |= {f"{own}/{name}": tensor for name, tensor in block.tensors().items()}
        found |= {f"{own}/optimizer/{name}": each for name, each in block.optimizer_state().items()}
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
    DtrainError
        The checkpoint is damaged, or its tensors are not those of this model (code 3).
    """
    one = next(iter(syncs.values()))
    traits = one.traits()
    same = not traits.replicas_diverge or manifest.replicas == one.replicas.size
    own = f"replica/{replica if traits.replicas_diverge else 0}"
    root = own if same and (traits.replicas_diverge or traits.reparametrises) else "model"
    for index, sync in syncs.items() if same else ():
        sync.restore_shapes(manifest.load_prefix(f"{own}/sync/{index}/"))
    tensors = {name: t for block in blocks.values() for name, t in block.tensors().items()}
    held = {f"{root}/{name}": tensor for name, tensor in tensors.items()}
    for key, tensor in manifest.verify_and_load(held).items():
        held[key].copy_(tensor)
    for index, block in blocks.items() if same else ():
        memory: dict[str, Tensor] = {}
        for name in block.parameters:
            entries = manifest.load_prefix(f"{own}/optimizer/{name}/")
            memory |= {f"{name}/{entry}": tensor for entry, tensor in entries.items()}
        block.load_optimizer_state(memory)
        syncs[index].restore(manifest.load_prefix(f"{own}/sync/{index}/"))
    return same


def _remove(folder: Path) -> None:
    """Remove a checkpoint; what a crash leaves of it is marked as incomplete."""
    doomed = folder.with_name(folder.name + ".old" + PARTIAL_SUFFIX)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    fsync(path)
