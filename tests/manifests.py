"""Change manifests of checkpoints, with hashes that fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.checkpoint.manifest_file import write_manifest


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a manifest, with a hash that fits."""
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del content["sha256"]
    change(content)
    write_manifest(folder, content)


def renumber(folder: Path, update: int) -> Path:
    """Give a checkpoint the number of another update; return its new folder."""
    edit_manifest(folder, lambda content: content["state"].update(update=update))
    return folder.rename(folder.with_name(f"update-{update:08d}"))
