"""Models: ordered, named layers, by a name of ours or by a user's function.

Invariant: whatever the layout, a layer's initial weights depend on the seed and on the model alone.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from dtrain.errors import DtrainError, unknown_name
from dtrain.models.cnn import Cnn
from dtrain.models.layers import LayerStack, as_layers
from dtrain.models.mlp import Mlp
from dtrain.models.resnet import ResNet
from dtrain.models.shape_inference import LayerSpec, infer_layers, profile_module
from dtrain.schema import convert, kebab
from dtrain.user_code import PATTERN, bind_arguments, import_object

__all__ = [
    "MODELS",
    "Cnn",
    "LayerSpec",
    "LayerStack",
    "Mlp",
    "ResNet",
    "as_layers",
    "infer_layers",
    "load",
    "profile_module",
]


MODELS: dict[str, type[Cnn | Mlp | ResNet]] = {"cnn": Cnn, "mlp": Mlp, "resnet": ResNet}


def load(
    name: str,
    fields: Mapping[str, object],
    folder: Path,
    shape: tuple[int, ...],
    classes: int,
) -> LayerStack:
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
    DtrainError
        Unknown name, key or function; a value of another type than the key's; a function that
        returns no legal model.
    """
    if ":" in name:
        function = import_object(name, folder, "model")
        given = bind_arguments("[model]", function, fields, {"shape": shape, "classes": classes})
        return as_layers(partial(function, **given), name)
    if name not in MODELS:
        raise unknown_name("model", name, [*MODELS, PATTERN])
    kind = MODELS[name]
    hints = typing.get_type_hints(kind)
    given = {
        key: convert(value, hints[key], f"[model] {kebab(key)}")
        for key, value in bind_arguments("[model]", kind, fields).items()
    }
    return as_layers(partial(kind(**given).layers, shape, classes), name)
