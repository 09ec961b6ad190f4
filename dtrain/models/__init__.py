"""Models: ordered, named layers, by a name of ours or by a user's function.

Invariant: whatever the layout, a layer's initial weights depend on the seed and on the model alone.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from dtrain.errors import unknown
from dtrain.models.cnn import Cnn
from dtrain.models.custom import PATTERN, bind, find
from dtrain.models.mlp import Mlp
from dtrain.models.model import Model, adopt
from dtrain.models.resnet import ResNet
from dtrain.models.walk import Spec, count, walk
from dtrain.tables import convert, kebab

__all__ = ["MODELS", "Cnn", "Mlp", "Model", "ResNet", "Spec", "adopt", "count", "load", "walk"]

MODELS: dict[str, type[Cnn | Mlp | ResNet]] = {"cnn": Cnn, "mlp": Mlp, "resnet": ResNet}


def load(
    name: str,
    fields: Mapping[str, object],
    folder: Path,
    shape: tuple[int, ...],
    classes: int,
) -> Model:
    """Return the model that a run file's `[model]` table asks for.

    Parameters
    ----------
    name : str
        A key of `MODELS`, or `"package.module:function"`.
    fields : mapping
        The table's other keys, in snake_case.
    folder : Path
        The run file's folder; it comes first on the import path.
    shape : tuple of int
        Shape of one sample, from the data; a user's function gets it where it takes it.
    classes : int
        Number of classes, from the data; likewise.

    Raises
    ------
    Refusal
        Unknown name, key or function; a value of another type than the key's; a function that
        returns no legal model.
    """
    if ":" in name:
        function = find(name, folder, "model")
        given = bind("[model]", function, fields, {"shape": shape, "classes": classes})
        return adopt(partial(function, **given), name)
    if name not in MODELS:
        raise unknown("model", name, [*MODELS, PATTERN])
    kind = MODELS[name]
    hints = typing.get_type_hints(kind)
    given = {
        key: convert(value, hints[key], f"[model] {kebab(key)}")
        for key, value in bind("[model]", kind, fields).items()
    }
    return adopt(partial(kind(**given).layers, shape, classes), name)
