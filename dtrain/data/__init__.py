"""Data: samples and labels of two splits, by a name of ours or by a user's function.

Invariant: shape, size and classes are known when a data set is open; images are read on first need.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dtrain.data.augment import AUGMENTS, Augment
from dtrain.data.custom import adopt
from dtrain.data.digits import Digits
from dtrain.data.hdf5 import Hdf5
from dtrain.data.order import SHUFFLES, order, parts, updates_per_epoch
from dtrain.data.reader import Reader
from dtrain.data.source import Arrays, Data, Source, Standardised, standardised
from dtrain.errors import unknown
from dtrain.models.custom import PATTERN, bind, find

__all__ = [
    "AUGMENTS",
    "DATA",
    "SHUFFLES",
    "Arrays",
    "Augment",
    "Data",
    "Digits",
    "Hdf5",
    "Reader",
    "Source",
    "Standardised",
    "load",
    "order",
    "parts",
    "standardised",
    "updates_per_epoch",
]

DATA = {"digits": Digits, "hdf5": Hdf5}

COMMON = ("normalise", "shuffle", "augment")
"""Keys of `[data]` that belong to no data set in particular."""


def load(name: str, fields: Mapping[str, object], folder: Path, *, normalise: bool = True) -> Data:
    """Return the data that a run file's `[data]` table asks for.

    Parameters
    ----------
    name : str
        A key of `DATA`, or `"package.module:function"`.
    fields : mapping
        The table's other keys, in snake_case, without the common ones (`normalise`, `shuffle`,
        `augment`).
    folder : Path
        The run file's folder: paths are relative to it, and it comes first on the import path.
    normalise : bool
        Standardise inputs per channel with the training split's statistics.

    Raises
    ------
    Refusal
        Unknown names and keys; with code 3, whatever is wrong with the data.
    """
    data = _open(name, fields, folder)
    return standardised(data) if normalise else data


def _open(name: str, fields: Mapping[str, object], folder: Path) -> Data:
    if ":" in name:
        function = find(name, folder, "data")
        return adopt(function(**bind("[data]", function, fields, common=COMMON)), f"data '{name}'")
    if name not in DATA:
        raise unknown("data", name, [*DATA, PATTERN])
    strategy: Digits | Hdf5 = DATA[name](**bind("[data]", DATA[name], fields, common=COMMON))
    return strategy.open(folder)
