"""List, verify and compare checkpoints, for people and programs.

Invariant: nothing is written, and nothing of a damaged file is shown.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.checkpoint.local_level import host_folders
from dtrain.checkpoint.manifest import (
    PARTIAL_SUFFIX,
    Manifest,
    checkpoint_names,
    latest_checkpoint,
    read_manifest,
)
from dtrain.checkpoint.manifest_file import MANIFEST_NAME
from dtrain.checkpoint.ownership import OWNER_FILE
from dtrain.checkpoint.run_folder import BEST_FOLDER, CHECKPOINT_FOLDER
from dtrain.checkpoint.shard import dtype_name
from dtrain.errors import CheckpointError, ConfigError
from dtrain.schema import flatten_table

MAX_ROWS = 40
"""Tensors that a comparison shows, those that differ most first."""


@dataclass(frozen=True)
class CheckpointRow:
    """One checkpoint of a run.

    Attributes
    ----------
    name : str
        Its folder in `checkpoints`.
    update : int or None
        Updates that it holds; None where that cannot be read.
    saved_s : float or None
        When it was completed, in seconds since 1970.
    shards, size_bytes : int
        Number of its shards, and bytes of all files.
    problem : str or None
        What is wrong with it; None: nothing was found.
    """

    name: str
    update: int | None
    saved_s: float | None
    shards: int
    size_bytes: int
    problem: str | None = None

    @property
    def is_damaged(self) -> bool:
        """Whether it counts as complete by its name, and is not."""
        return self.problem is not None and not self.name.endswith(PARTIAL_SUFFIX)


def list_checkpoints(folder: Path, verify: bool = False) -> list[CheckpointRow]:
    """Return the checkpoints of a run, the oldest first, then the best one, and those that the
    disk of this node holds (``HOST:update-N``, with the shards that are there).

    Parameters
    ----------
    folder : Path
        A run folder.
    verify : bool
        Hash every shard; otherwise only the manifest is checked, and that all shards have the size
        that it names.

    Raises
    ------
    ConfigError
        The folder has no checkpoints.
    """
    root = folder / CHECKPOINT_FOLDER
    if not root.is_dir():
        raise ConfigError(
            "checkpoint.no-folder",
            f"{folder} has no checkpoints: give a run folder that `dtrain train` printed",
        )
    paths = [root / name for name in checkpoint_names(root)]
    best = root / BEST_FOLDER
    paths += [best / name for name in checkpoint_names(best)] if best.is_dir() else []
    rows = [_describe(path, str(path.relative_to(root)), verify) for path in paths]
    reason = "it was never finished"
    if (folder / OWNER_FILE).exists():  # it may belong to an asynchronous save
        reason = "it is being written, or was never finished"
    rows += [
        CheckpointRow(path.name, None, None, 0, _size(path), f"incomplete: {reason}")
        for path in sorted(root.glob(f"update-*{PARTIAL_SUFFIX}"))
    ]
    return rows + [
        _describe(place / name, f"{place.name}:{name}", verify, is_local=True)
        for place in _local_folders(folder)
        for name in checkpoint_names(place)
    ]


def rows_as_json(rows: list[CheckpointRow]) -> list[dict[str, Any]]:
    """Return rows as plain values."""
    return [asdict(row) for row in rows]


def rows_text(rows: list[CheckpointRow]) -> str:
    """Return rows as a table for the screen."""
    lines = [f"{'checkpoint':32} {'updates':>9} {'shards':>6} {'MB':>10}  saved"]
    for row in rows:
        update = "" if row.update is None else f"{row.update:,}"
        saved = ""
        if row.saved_s is not None:
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.saved_s))
        size = f"{row.size_bytes / 1e6:,.1f}"
        lines.append(f"{row.name:32} {update:>9} {row.shards:6} {size:>10}  {saved}".rstrip())
        if row.problem is not None:
            lines.append(f"    {row.problem}")
    return "\n".join(lines) + "\n"


def _local_folders(folder: Path) -> list[Path]:
    """Return the node-local folders of a run that this machine sees."""
    with suppress(OSError, ValueError):
        table = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
        setting = table.get("checkpoint", {}).get("local")
        return host_folders(setting, folder) if isinstance(setting, str) else []
    return []


def _describe(path: Path, name: str, verify: bool, is_local: bool = False) -> CheckpointRow:
    """Return the row of a checkpoint; one on a node-local disk may lack shards of other nodes."""
    size = _size(path)
    try:
        manifest = read_manifest(path)
        shards = sorted(manifest.hashes)
        if is_local:
            shards = [shard for shard in shards if (path / shard).is_file()]
        for shard in shards if verify else ():
            manifest.check_shard(shard)
        problem = None if verify or is_local else _missing_shard(manifest)
    except CheckpointError as error:
        return CheckpointRow(name, None, None, 0, size, error.message)
    saved = (path / MANIFEST_NAME).stat().st_mtime
    update = int(manifest.state["update"])
    return CheckpointRow(name, update, saved, len(shards), size, problem)


def _missing_shard(manifest: Manifest) -> str | None:
    missing = [name for name in manifest.hashes if not (manifest.folder / name).is_file()]
    return f"damaged: {missing[0]} is missing" if missing else None


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.iterdir() if path.is_file())


# ---- comparison


def open_checkpoint(path: Path) -> Manifest:
    """Return the manifest of a checkpoint, or of the newest one of a run folder.

    Raises
    ------
    ConfigError
        There is no checkpoint.
    CheckpointError
        It is damaged.
    """
    if (path / MANIFEST_NAME).is_file():
        return read_manifest(path)
    manifest = latest_checkpoint(path / CHECKPOINT_FOLDER)
    if manifest is None:
        raise ConfigError(
            "checkpoint.none-there",
            f"{path} holds no checkpoint: give a run folder, or one of its checkpoints/update-N",
        )
    return manifest


def compare_checkpoints(first: Path, second: Path) -> dict[str, Any]:
    """Compare two checkpoints, tensor by tensor and setting by setting.

    Returns
    -------
    dict
        "equal": whether all tensors have equal bits; "tensors": a row per tensor that differs, with
        the share of different numbers and the largest difference; "only_first", "only_second":
        keys; "run", "state": settings and counts that differ, with both values.
    """
    manifests = open_checkpoint(first), open_checkpoint(second)
    keys = [set(manifest.files) for manifest in manifests]
    rows = [row for key in sorted(keys[0] & keys[1]) for row in _compare_tensor(key, *manifests)]
    rows.sort(key=lambda row: -(row["largest_difference"] or float("inf")))
    return {
        "first": str(manifests[0].folder),
        "second": str(manifests[1].folder),
        "equal": not rows and keys[0] == keys[1],
        "tensors": rows,
        "only_first": sorted(keys[0] - keys[1]),
        "only_second": sorted(keys[1] - keys[0]),
        "run": dict(_changes(manifests[0].run_table, manifests[1].run_table)),
        "state": {"update": [int(manifest.state["update"]) for manifest in manifests]},
    }


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Return a comparison for the screen."""
    lines = [f"first   {comparison['first']}", f"second  {comparison['second']}"]
    updates = comparison["state"]["update"]
    lines.append(f"updates {updates[0]:,} and {updates[1]:,}")
    lines += [f"{key}: {was} and {now}" for key, (was, now) in comparison["run"].items()]
    for which in ("first", "second"):
        lines += [f"only in the {which}: {key}" for key in comparison[f"only_{which}"]]
    rows = comparison["tensors"]
    for row in rows[:MAX_ROWS]:
        largest = row["largest_difference"]
        how = row["reason"] if largest is None else f"largest difference {largest:.3g}"
        share = "" if row["share"] is None else f", {row['share']:.1%} of its numbers"
        lines.append(f"{row['key']}: {how}{share}")
    if len(rows) > MAX_ROWS:
        lines.append(f"... and {len(rows) - MAX_ROWS} tensors more that differ")
    lines.append("all tensors are equal" if comparison["equal"] else "the checkpoints differ")
    return "\n".join(lines) + "\n"


def _compare_tensor(key: str, first: Manifest, second: Manifest) -> Iterator[dict[str, Any]]:
    a, b = first.load([key])[key], second.load([key])[key]
    row: dict[str, Any] = {"key": key, "share": None, "largest_difference": None, "reason": None}
    if a.shape != b.shape or a.dtype != b.dtype:
        reason = f"{_kind(a)} and {_kind(b)}"
        yield row | {"reason": reason}
        return
    differs = (a != b) & ~((a != a) & (b != b))  # NaN equals NaN
    if not bool(differs.any()):
        return
    wide = torch.complex128 if a.is_complex() else torch.float64
    gaps = (a.to(wide) - b.to(wide)).abs()
    largest = float(gaps.max())
    row["share"] = float(differs.double().mean())
    if largest == largest:
        yield row | {"largest_difference": largest}
    else:
        yield row | {"reason": "NaN in one of them"}


def _kind(tensor: Tensor) -> str:
    return f"{dtype_name(tensor)} {list(tensor.shape)}"


def _changes(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the settings that differ, with both values; None where one is absent."""
    tables = dict(flatten_table(first)), dict(flatten_table(second))
    for key in sorted({**tables[0], **tables[1]}):
        values = [table.get(key) for table in tables]
        if values[0] != values[1]:
            yield key, values
