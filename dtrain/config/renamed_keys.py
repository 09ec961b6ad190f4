"""Keys of earlier versions: refused in a run file, translated in the records of an older run."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from dtrain.errors import ConfigError
from dtrain.schema import Table

RENAMED_KEYS: dict[tuple[str, str], str | None] = {
    ("partition", "wire"): "activation-compression",
    ("sync", "worth"): "min-compression-rate",
    ("sync", "heat-compatible"): None,
}
"""The new key for each section and old key; None: the key is gone."""


def refuse_old_keys(table: Table) -> None:
    """Raise an error for an old key that names the new one.

    Raises
    ------
    ConfigError
        A table of the run file has an old key.
    """
    for location, section, part in _sections(table):
        for (owner, old), new in RENAMED_KEYS.items():
            if owner == section and old in part:
                advice = "is gone: leave it out" if new is None else f"is now called {new}"
                raise ConfigError("run-file.renamed-key", f"[{location}] {old} {advice}")


def translate_old_keys(table: Table) -> Table:
    """Return a resolved run of an earlier version with the keys of this one.

    A removed key that was switched on is kept, so that such a run differs from all others.
    """
    translated = copy.deepcopy(table)
    for _, section, part in _sections(translated):
        for (owner, old), new in RENAMED_KEYS.items():
            if owner != section or old not in part:
                continue
            if new is not None:
                part[new] = part.pop(old)
            elif not part[old]:
                del part[old]
    return translated


def _sections(table: Table) -> Iterator[tuple[str, str, Table]]:
    """Yield location, section and table of every section; `[sync.inner]` is of section `sync`.

    Tables of a user's own strategy, model or data set are left out: their keys are the user's.
    """
    for section, part in table.items():
        location = section
        while isinstance(part, dict):
            if ":" not in str(part.get("name")):
                yield location, section, part
            location, part = f"{location}.inner", part.get("inner")
