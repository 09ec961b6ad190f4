"""The file of a manifest: JSON with a hash of its own content, checked against a strict schema.

Invariant: a manifest that was changed by a bit, cut short or edited is refused, never interpreted.
The file must be a plain one: links and pipes are refused.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from dtrain.checkpoint.files import read_plain_file, write_file
from dtrain.checkpoint.shard_file import HASH_BYTES, SHARD_HASH
from dtrain.errors import CheckpointError

MANIFEST_NAME = "manifest.json"


MAX_BYTES = 2**30


HASH_KEY = "sha256"
"""Key of the hash over the rest of the manifest."""


REQUIRED_KEYS, OPTIONAL_KEYS = {"run", "state", "shards", HASH_KEY}, {"fingerprint"}


SHARD_KEYS = {"bytes", SHARD_HASH, "keys"}


CHECKPOINT_NAME = re.compile(r"update-(\d{8,})")
"""Name of the folder of a complete checkpoint; folders of other names are left alone."""


SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.h5")


HASH = re.compile(f"[0-9a-f]{{{2 * HASH_BYTES}}}")


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint with its hash, and sync it.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    plain = json.loads(json.dumps(content))  # a tuple becomes a list, as a reader finds it
    path = folder / MANIFEST_NAME
    write_file(path, json.dumps({HASH_KEY: content_hash(plain), **plain}), sync=True)


def read_manifest_content(folder: Path) -> dict[str, Any]:
    """Return the checked content of the manifest in a checkpoint's folder.

    Raises
    ------
    CheckpointError
        It is missing, no plain file, damaged, or that of another checkpoint.
    """
    path = folder / MANIFEST_NAME
    try:
        text = read_plain_file(path, MAX_BYTES).decode()
        content = json.loads(text, object_pairs_hook=_unique_keys)
        _check_schema(content, folder)
        _require(text == json.dumps(content), "its text was changed")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "checkpoint.manifest-damaged",
            f"{path} is damaged ({error}): delete the folder {folder} to resume from the "
            "checkpoint before it",
        ) from error
    assert isinstance(content, dict)
    return content


def content_hash(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest, its own hash left out."""
    rest = {key: value for key, value in content.items() if key != HASH_KEY}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _check_schema(content: Any, folder: Path) -> None:
    """Raise `ValueError` for content that no version of dtrain writes."""
    _require(isinstance(content, dict), "it is no table")
    keys = set(content)
    _require(keys >= REQUIRED_KEYS, f"it lacks {sorted(REQUIRED_KEYS - keys)}")
    unknown = keys - REQUIRED_KEYS - OPTIONAL_KEYS
    _require(not unknown, f"it has unknown keys {sorted(unknown)}")
    _require(content[HASH_KEY] == content_hash(content), "its hash is not that of its content")
    for key in keys - {HASH_KEY}:
        _require(isinstance(content[key], dict), f"'{key}' is no table")
    update = content["state"].get("update")
    _require(isinstance(update, int) and not isinstance(update, bool) and update >= 0, "no update")
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    is_own = match is None or int(match[1]) == update
    _require(is_own, f"it belongs to the checkpoint of update {update}")
    _check_shards(content["shards"])


def _check_shards(shards: dict[str, Any]) -> None:
    seen: set[str] = set()
    for name, shard in shards.items():
        _require(SHARD_NAME.fullmatch(name) is not None, f"'{name}' is no name of a shard")
        _require(isinstance(shard, dict) and set(shard) == SHARD_KEYS, f"'{name}' has other keys")
        digest, keys = shard[SHARD_HASH], shard["keys"]
        is_hash = isinstance(digest, str) and HASH.fullmatch(digest) is not None
        _require(is_hash, f"'{name}' has no hash")
        _require(isinstance(keys, list) and all(map(_is_key, keys)), f"'{name}' has illegal keys")
        is_new = len(set(keys)) == len(keys) and seen.isdisjoint(keys)
        _require(is_new, f"'{name}' has a key that occurs twice")
        seen.update(keys)


def _is_key(key: object) -> bool:
    """Return whether a key is a path of names, a replica's with its number."""
    if not isinstance(key, str) or not key or "" in key.split("/") or ".." in key.split("/"):
        return False
    first, *rest = key.split("/")
    return first != "replica" or (len(rest) > 1 and rest[0].isdecimal())


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)
