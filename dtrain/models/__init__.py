"""Make a model of `MODELS`, or the one that a user's function returns.

Invariant: a layer's initial weights depend only on the seed and the model, never on the layout.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain.errors import ConfigError, unknown_name
from dtrain.models.cnn import Cnn
from dtrain.models.graph_nets import Gcn, GraphNetwork, Sage
from dtrain.models.layers import LayerStack, as_layers
from dtrain.models.lstm import Lstm
from dtrain.models.mlp import Mlp
from dtrain.models.output_spec import OutputModel, OutputSpec
from dtrain.models.resnet import ResNet
from dtrain.models.revnet import RevNet
from dtrain.models.transformer import Transformer
from dtrain.models.unet import UNet
from dtrain.models.vit import Vit
from dtrain.node_graph import NodeGraph
from dtrain.schema import convert, kebab
from dtrain.user_code import PATTERN, bind_arguments, import_object

MODELS: dict[
    str,
    type[Cnn | Mlp | ResNet | RevNet] | type[Lstm | Transformer | UNet | Vit] | type[GraphNetwork],
] = {
    "cnn": Cnn,
    "gcn": Gcn,
    "lstm": Lstm,
    "mlp": Mlp,
    "resnet": ResNet,
    "sage": Sage,
    "revnet": RevNet,
    "transformer": Transformer,
    "unet": UNet,
    "vit": Vit,
}


def load_model(
    name: str,
    fields: Mapping[str, object],
    folder: Path,
    shape: tuple[int, ...],
    classes: int,
    inputs: int = 1,
    open_names: Collection[str] = (),
    target: Any = None,
    output: OutputSpec | None = None,
    graph: NodeGraph | None = None,
) -> LayerStack:
    """Make the model that a run file's `[model]` table names; no layer is built yet.

    Parameters
    ----------
    name : str
        A key of `MODELS`, or `"package.module:function"`.
    fields : mapping
        The table's other keys, in snake_case.
    folder : Path
        The run file's folder; it is first on the import path.
    shape : tuple of int
        Shape of one sample. A user's function receives it as the argument `shape`, if it has one.
    classes : int
        Number of classes. A user's function receives it as `classes`, if it has that argument.
    inputs : int
        Number of inputs of a sample.
    open_names : collection of str
        Dotted names of sub-modules whose parts are layers of their own.
    target : function, nn.Module or list of (str, factory), optional
        The model itself, where it was given in Python. Of a module every build takes a copy, with
        its present weights.
    output : OutputSpec, optional
        The output that the task needs, by default (classes,). A model of dtrain whose head follows
        the targets reads it.
    graph : NodeGraph, optional
        The graph whose nodes are the samples. A user's function receives it as `graph`, if it has
        that argument.

    Raises
    ------
    ConfigError
        Unknown name, key or function; a value of another type than the key's; a function that
        returns no legal model; a graph network for samples that are no nodes.
    """
    if ":" in name or target is not None:
        function = _user_function(name, folder, target)
        context: dict[str, object] = {"shape": shape, "classes": classes}
        if graph is not None:
            context["graph"] = graph
        return as_layers(
            partial(function, **bind_arguments("[model]", function, fields, context)),
            name,
            inputs,
            open_names,
        )
    if name not in MODELS:
        raise unknown_name("model", name, [*MODELS, PATTERN])
    return _load_own(name, fields, shape, classes, output or OutputSpec((classes,)), graph)


def _user_function(name: str, folder: Path, target: Any) -> Callable[..., object]:
    """Return the function that makes a user's model, which `target` is where it is given."""
    function: Any = import_object(name, folder, "model") if target is None else target
    if isinstance(function, nn.Module):
        return partial(_copy_module, function)
    if isinstance(function, list | tuple):
        return partial(list, function)
    return function  # type: ignore[no-any-return]


def _load_own(
    name: str,
    fields: Mapping[str, object],
    shape: tuple[int, ...],
    classes: int,
    output: OutputSpec,
    graph: NodeGraph | None,
) -> LayerStack:
    """Make a model of `MODELS`."""
    kind = MODELS[name]
    hints = typing.get_type_hints(kind)
    arguments = {
        key: convert(value, hints[key], f"[model] {kebab(key)}")
        for key, value in bind_arguments("[model]", kind, fields).items()
    }
    model = kind(**arguments)
    if isinstance(model, GraphNetwork):
        if graph is None:
            raise ConfigError(
                "model.needs-graph",
                f'[model] name = "{name}" needs data whose samples are the nodes of a graph: set '
                '[data] name = "planetoid", or choose another model',
            )
        return as_layers(partial(model.module, shape, classes, graph), name, inputs=2)
    if isinstance(model, OutputModel):
        return as_layers(partial(model.layers, shape, output), name)
    return as_layers(partial(model.layers, shape, classes), name)


def _copy_module(module: nn.Module) -> nn.Module:
    """Return a copy of a user's module, on the default device."""
    return copy.deepcopy(module).to(torch.get_default_device())
