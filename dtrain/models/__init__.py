"""Models: ordered, named layers, by a name of ours or by a user's function.

Invariant: whatever the layout, a layer's initial weights depend on the seed and on the model alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from dtrain.errors import unknown
from dtrain.models.custom import PATTERN, bind, find
from dtrain.models.mlp import Mlp
from dtrain.models.model import Model, adopt
from dtrain.models.walk import Spec, count, walk

__all__ = ["MODELS", "Mlp", "Model", "Spec", "adopt", "count", "load", "walk"]

MODELS = {"mlp": Mlp}


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
        Unknown name, key or function; a function that returns no legal model.
    """
    if ":" in name:
        function = find(name, folder, "model")
        given = bind("[model]", function, fields, {"shape": shape, "classes": classes})
        return adopt(partial(function, **given), name)
    if name not in MODELS:
        raise unknown("model", name, [*MODELS, PATTERN])
    strategy = MODELS[name](**bind("[model]", MODELS[name], fields))
    return adopt(partial(strategy.layers, shape, classes), name)
