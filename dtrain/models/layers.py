"""Models as ordered, named layers, of which each rank builds only its own.

`FactoryLayers`: (name, factory) pairs. A rank calls the factories of its own layers, each with
torch's generator seeded by (seed, name). `ModuleLayers`: a user's module, an `nn.Sequential` or any
other whose forward can be traced. Every rank builds all of it with torch's generator seeded by the
seed, which keeps the user's initialisation, and drops the layers of other ranks::

    rank with layers 2, 3      FactoryLayers      . . f2 f3 . .    calls two factories
                               ModuleLayers       0 1 2 3 4 5      builds all (a peak), keeps 2, 3

Invariant: a layer's initial weights depend only on (seed, name) or (seed, function), whatever else
is built in the process. The state of torch's generator is unchanged afterwards.
"""

from __future__ import annotations

import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError, DtrainError
from dtrain.models.graph import ModelGraph, trace_model
from dtrain.rng import seeded

Factory = Callable[[], nn.Module]


NamedFactories = Sequence[tuple[str, Factory]]


Function = Callable[[], object]


@dataclass(frozen=True)
class LayerStack(ABC):
    """Ordered, named layers.

    Parameters
    ----------
    names : tuple of str
        The layers' names in order. A parameter's global name is `<layer>.<name in the layer>`.
    """

    names: tuple[str, ...]

    def build(self, indices: Iterable[int], seed: int, dtype: torch.dtype) -> dict[str, nn.Module]:
        """Build the layers at `indices`, initialised, in training mode, on the CPU; by name.

        Where the model is a graph, the names are those of the sub-modules, and "" holds the tensors
        outside sub-modules. Weights are drawn in torch's default dtype and then cast to `dtype`.
        Not collective.

        Raises
        ------
        ConfigError
            A layer has tensors that its factory did not make, or a factory returns no module.
        """
        return merge_layers(self.build_each(indices, seed, dtype))

    def build_each(
        self, indices: Iterable[int], seed: int, dtype: torch.dtype
    ) -> list[dict[str, nn.Module]]:
        """Build the layers at `indices` as `build` does; return the modules of each by name."""
        layers = self._make_layers(tuple(indices), seed)
        for modules in layers:
            for name, module in modules.items():
                # A tensor that exists already when `as_layers` calls the function is on meta.
                if any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
                    raise ConfigError(
                        "model.factory-reuses-tensors",
                        f"layer '{name}' holds tensors that were made before its factory was "
                        f"called, so they do not depend on (seed, name): make them in the factory",
                    )
                cast_module(module, dtype)
        return layers

    def rebuild_layer(self, index: int, seed: int, dtype: torch.dtype) -> nn.Module:
        """Build one layer again, equal to that of `build`; on the meta device without memory.

        Raises
        ------
        ConfigError
            The layer is no single module.
        """
        [modules] = self._make_layers([index], seed)
        if len(modules) != 1:
            raise ConfigError(
                "model.layer-not-a-module",
                f"layer '{self.names[index]}' is no single module, as this objective needs",
            )
        [layer] = modules.values()
        return cast_module(layer, dtype)

    def structure_key(self, index: int) -> Hashable:
        """Return a key that layers of equal structure share; None where structure is unknown."""
        return None

    @property
    @abstractmethod
    def builds_all_layers(self) -> bool:
        """Whether a rank must build all layers to get its own."""

    @property
    def graph(self) -> ModelGraph | None:
        """The calls of the model's forward; None where it is a chain of the layers."""
        return None

    @property
    def tied_names(self) -> Mapping[str, str]:
        """Names of parameters that are the same as another one, with the name of that one."""
        return {}

    @abstractmethod
    def _make_layers(self, indices: Sequence[int], seed: int) -> list[dict[str, nn.Module]]:
        """Make new layers in the order of `indices`: the modules of each by name."""

    @abstractmethod
    def meta_layers(self, dtype: torch.dtype) -> list[dict[str, nn.Module] | None]:
        """Make all layers without memory, on the meta device; None where a layer cannot be."""


@final
@dataclass(frozen=True, eq=False)
class LayerCopy:
    """A factory of a copy of a model's layer, with the initial weights that it has in a run.

    Copies are equal where their structure is known and equal; else they cannot be hashed.
    """

    model: LayerStack = field(repr=False)
    index: int
    seed: int
    dtype: torch.dtype

    def __call__(self) -> nn.Module:
        return self.model.rebuild_layer(self.index, self.seed, self.dtype)

    @property
    def structure(self) -> Hashable:
        """A key that copies of equal structure share; None where it is unknown."""
        key = self.model.structure_key(self.index)
        return None if key is None else (key, self.dtype)

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, LayerCopy):
            return self is other
        return self.structure is not None and self.structure == other.structure

    def __hash__(self) -> int:
        if self.structure is None:
            raise TypeError("the structure of the layer is unknown")
        return hash(self.structure)


@final
@dataclass(frozen=True)
class FactoryLayers(LayerStack):
    """Layers that are each made by a factory of their own."""

    factories: tuple[Factory, ...] = field(repr=False)

    def structure_key(self, index: int) -> Hashable:
        factory = self.factories[index]
        if isinstance(factory, LayerCopy):
            return factory.structure
        if not isinstance(factory, partial) or not isinstance(factory.func, type):
            return None
        key = factory.func, factory.args, tuple(factory.keywords.items())
        try:
            hash(key)
        except TypeError:  # such as a list among the arguments
            return None
        return key

    @property
    def builds_all_layers(self) -> bool:
        return False

    def _make_layers(self, indices: Sequence[int], seed: int) -> list[dict[str, nn.Module]]:
        return [{self.names[index]: self._make_layer(index, seed)} for index in indices]

    def _make_layer(self, index: int, seed: int) -> nn.Module:
        name = self.names[index]
        with seeded(seed, name):
            layer: object = self.factories[index]()
        if not isinstance(layer, nn.Module):
            raise ConfigError(
                "model.factory-result",
                f"the factory of layer '{name}' returned {type(layer).__name__}: return a "
                f"torch.nn.Module",
            )
        return layer

    def meta_layers(self, dtype: torch.dtype) -> list[dict[str, nn.Module] | None]:
        return [self._meta_layer(index, dtype) for index in range(len(self.names))]

    def _meta_layer(self, index: int, dtype: torch.dtype) -> dict[str, nn.Module] | None:
        try:
            with on_meta():
                layer = self._make_layer(index, seed=0)
                return {self.names[index]: cast_module(layer, dtype)}
        except DtrainError:
            raise
        except Exception:  # not supported on meta, or a fault, which the run on the CPU repeats
            return None


@final
@dataclass(frozen=True)
class ModuleLayers(LayerStack):
    """Layers of a user's module, which its function makes again for every build.

    Attributes
    ----------
    paths : tuple of tuple of str
        Dotted names of the sub-modules of each layer.
    tensor_paths : tuple of tuple of str
        Dotted names of the parameters and buffers outside sub-modules that each layer is the first
        to read.
    """

    function: Function = field(repr=False)
    paths: tuple[tuple[str, ...], ...] = field(repr=False)
    tensor_paths: tuple[tuple[str, ...], ...] = field(repr=False)
    model_graph: ModelGraph | None = field(default=None, repr=False)
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def builds_all_layers(self) -> bool:
        return True

    @property
    def graph(self) -> ModelGraph | None:
        return self.model_graph

    @property
    def tied_names(self) -> Mapping[str, str]:
        return self.aliases

    def _make_layers(self, indices: Sequence[int], seed: int) -> list[dict[str, nn.Module]]:
        with torch.random.fork_rng(devices=[]):
            # The plain seed, so that the weights are those after the user's manual_seed(seed).
            torch.default_generator.manual_seed(seed)
            module = self.function()
        assert isinstance(module, nn.Module)
        return [self._modules_of(module, index) for index in indices]

    def _modules_of(self, module: nn.Module, index: int) -> dict[str, nn.Module]:
        modules = {path: module.get_submodule(path) for path in self.paths[index]}
        if self.tensor_paths[index]:
            modules[""] = _tensor_module(module, self.tensor_paths[index])
        return modules

    def meta_layers(self, dtype: torch.dtype) -> list[dict[str, nn.Module] | None]:
        module = _call_on_meta(self.function)
        assert isinstance(module, nn.Module)
        cast_module(module, dtype)
        return [self._modules_of(module, index) for index in range(len(self.names))]


def as_layers(
    function: Function, name: str, inputs: int = 1, open_names: Collection[str] = ()
) -> LayerStack:
    """Return the layers of the model that a function without arguments makes.

    Parameters
    ----------
    function : callable
        Returns a module, or a list of (name, factory) pairs. It is called here on the meta device;
        a function that returns a module is called again in every `build`.
    name : str
        The model's name in the run file, for the messages.
    inputs : int
        Number of inputs of a sample.
    open_names : collection of str
        Dotted names of sub-modules whose parts are layers of their own.

    Raises
    ------
    ConfigError
        Another result; no layers; an illegal or repeated name; a forward that cannot be traced.
    """
    result = _call_on_meta(function)
    if isinstance(result, nn.Module):
        if _call_on_meta(function) is result:
            raise ConfigError(
                "model.module-reused",
                f"model '{name}' returned the same module twice, so its weights do not depend on "
                f"the seed: make it in the function",
            )
        return _from_module(result, function, name, inputs, open_names)
    pairs = _named_factories(result, name)
    if inputs > 1:
        raise ConfigError(
            "model.chain-of-several-inputs",
            f"model '{name}' is a list of layers, which takes one input, but a sample has "
            f"{inputs}: return a module whose forward takes {inputs} arguments",
        )
    names = tuple(layer_name for layer_name, _ in pairs)
    _check_names(names, name)
    return FactoryLayers(names, tuple(factory for _, factory in pairs))


@contextmanager
def on_meta() -> Iterator[None]:
    """Make tensors on the meta device, without the warnings and the output of a user's function.

    The function is called again when weights are made. Weights that it loads are left out on the
    meta device, with one warning of torch's for each.
    """
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.device("meta"):
        warnings.simplefilter("ignore")
        yield


def cast_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floats of a module to `dtype` and its complex numbers to pairs of it, in place."""

    def cast(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    module._apply(cast)  # type: ignore[no-untyped-call]
    return module


def merge_layers(layers: Iterable[Mapping[str, nn.Module]]) -> dict[str, nn.Module]:
    """Return the modules of several layers by name; "" holds the tensors outside modules of all."""
    merged: dict[str, nn.Module] = {}
    for modules in layers:
        free_tensors = merged.get("")
        merged |= modules
        if free_tensors is not None and "" in modules:
            merged[""] = _merge_modules(free_tensors, modules[""])
    return merged


def shared_names(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the names of parameters and buffers that are the same tensor as an earlier one, with
    the name of that one."""
    first_names: dict[int, str] = {}
    shared: dict[str, str] = {}
    for path, module in modules.items():
        tensors = [
            *module.named_parameters(prefix=path, remove_duplicate=False),
            *module.named_buffers(prefix=path, remove_duplicate=False),
        ]
        for name, tensor in tensors:
            first = first_names.setdefault(id(tensor), name)
            if first != name:
                shared[name] = first
    return shared


def require_unshared(layers: Sequence[dict[str, nn.Module] | None]) -> None:
    """Refuse parameters and buffers that occur in two layers of a list of factories.

    Each factory makes its own tensors, so these would become two tensors on two ranks.

    Raises
    ------
    ConfigError
        A parameter or buffer has names in two layers.
    """
    modules = {name: m for layer in layers if layer for name, m in layer.items()}
    for name, first in shared_names(modules).items():
        layer, other = name.partition(".")[0], first.partition(".")[0]
        if layer != other:
            raise ConfigError(
                "model.shared",
                f"'{name}' is the same tensor as '{first}': make one for each layer, or return a "
                f"module whose layers share it",
            )


def _call_on_meta(function: Function) -> object:
    """Call a function on the meta device, without memory; on the CPU where that fails."""
    with torch.random.fork_rng(devices=[]):
        try:
            with on_meta():
                return function()
        except DtrainError:
            raise
        except Exception:  # such as .item(), which meta lacks; a fault is raised again on the CPU
            return function()


def _from_module(
    module: nn.Module, function: Function, name: str, inputs: int, open_names: Collection[str]
) -> ModuleLayers:
    """Return the layers of a module: the children of a plain Sequential, else those of its
    graph."""
    graph = None
    if type(module).forward is nn.Sequential.forward and inputs == 1:
        names = tuple(path for path, _ in _children(module, open_names))
        paths: list[tuple[str, ...]] = [(path,) for path in names]
        tensor_paths: list[tuple[str, ...]] = [() for _ in names]
    else:
        graph = trace_model(module, name, inputs, open_names)
        while len(graph.layers) == 1 and _is_container(module, graph.layers[0].name):
            open_names = {*open_names, graph.layers[0].name}  # a forward that calls one container
            graph = trace_model(module, name, inputs, open_names)
        names = tuple(layer.name for layer in graph.layers)
        paths = [tuple(layer.modules) for layer in graph.layers]
        tensor_paths = [tuple(layer.tensors) for layer in graph.layers]
    _check_names(names, name, dotted=True)
    for path, _ in module.named_parameters():
        if _is_head_name(path):
            _check_names([path], name, dotted=True)
    return ModuleLayers(
        names=names,
        function=function,
        paths=tuple(paths),
        tensor_paths=tuple(tensor_paths),
        model_graph=graph,
        aliases=shared_names({"": module}),
    )


def _is_container(module: nn.Module, name: str) -> bool:
    sub_module = module.get_submodule(name.partition("@")[0])
    return type(sub_module).forward is nn.Sequential.forward and len(sub_module._modules) > 0


def _children(
    sequential: nn.Module, open_names: Collection[str], prefix: str = ""
) -> list[tuple[str, nn.Module]]:
    """Return a Sequential's layers with dotted names, including repeated ones, which
    `named_children` drops; those of the containers that are open in place of these."""
    children: list[tuple[str, nn.Module]] = []
    for key, child in sequential._modules.items():
        path = f"{prefix}{key}"
        plain = child is not None and type(child).forward is nn.Sequential.forward
        if child is not None and plain and path in open_names:
            children += _children(child, open_names, f"{path}.")
        elif child is not None:
            children.append((path, child))
    return children


def _tensor_module(module: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Return a module that holds parameters and buffers of another one, under the same dotted
    names."""
    root = nn.Module()
    for path in paths:
        owner_path, _, key = path.rpartition(".")
        owner = module.get_submodule(owner_path)
        tensor = getattr(owner, key)
        parent = root
        for part in filter(None, owner_path.split(".")):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            parent.register_parameter(key, tensor)
        else:
            parent.register_buffer(key, tensor, key not in owner._non_persistent_buffers_set)
    return root


def _merge_modules(first: nn.Module, second: nn.Module) -> nn.Module:
    """Return the first module with the tensors of the second, too."""
    for key, parameter in second._parameters.items():
        first.register_parameter(key, parameter)
    for key, buffer in second._buffers.items():
        first.register_buffer(key, buffer)
    for key, child in second._modules.items():
        assert child is not None
        if key in first._modules:
            _merge_modules(first.get_submodule(key), child)
        else:
            first.add_module(key, child)
    return first


def _named_factories(value: object, name: str) -> list[tuple[str, Factory]]:
    """Return a user's list of (name, factory) pairs, or refuse another value."""
    if not isinstance(value, list | tuple):
        raise ConfigError(
            "model.function-result",
            f"model '{name}' is {type(value).__name__}: return a torch.nn.Module, or a list of "
            f"(name, factory) pairs",
        )
    for index, pair in enumerate(value):
        match pair:
            case (str(layer_name), nn.Module()):
                raise ConfigError(
                    "model.layer-not-a-factory",
                    f"model '{name}': layer '{layer_name}' is a module, not a factory: "
                    f"return a function that makes it",
                )
            case (str(), factory) if callable(factory):
                continue
        raise ConfigError(
            "model.pair-invalid",
            f"model '{name}': item {index} of its list must be a (name, factory) pair",
        )
    return [(layer_name, factory) for layer_name, factory in value]


def _is_head_name(name: str) -> bool:
    """Return whether the name of a layer would be that of a head of the objective."""
    first, _, rest = name.partition(".")
    return first == "heads" and rest.partition(".")[0].isdigit()


def _check_names(names: Sequence[str], model: str, dotted: bool = False) -> None:
    """Refuse names that are repeated, or ambiguous as a part of a parameter's path.

    With `dotted` a dot is legal: the names are paths in a user's module.
    """
    if not names:
        raise ConfigError("model.no-layers", f"model '{model}' has no layers: return at least one")
    for name in names:
        if (name == "heads" and not dotted) or _is_head_name(name):
            raise ConfigError(
                "model.layer-name-reserved",
                f"model '{model}': a layer called 'heads' would share its name with the auxiliary "
                f"heads of an objective (heads.0, ...): rename it",
            )
        if not name or ("." in name and not dotted):
            raise ConfigError(
                "model.layer-name-invalid",
                f"model '{model}': layer name '{name}' is empty or has a dot: rename it",
            )
        if names.count(name) > 1:
            raise ConfigError(
                "model.layer-name-repeated",
                f"model '{model}' has {names.count(name)} layers called '{name}': "
                f"give each its own name",
            )
