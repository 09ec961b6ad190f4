"""Models as ordered, named layers, of which each rank builds only its own.

`FactoryLayers`: (name, factory) pairs. A rank calls the factories of its own layers, each with
torch's generator seeded by (seed, name). `SequentialLayers`: a user's `nn.Sequential`. Every rank
builds all of it with torch's generator seeded by the seed, which keeps the user's initialisation,
and drops the layers of other ranks::

    rank with layers 2, 3      FactoryLayers      . . f2 f3 . .    calls two factories
                               SequentialLayers   0 1 2 3 4 5      builds all (a peak), keeps 2, 3

Invariant: a layer's initial weights depend only on (seed, name) or (seed, function), whatever else
is built in the process. The state of torch's generator is unchanged afterwards.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import nn

from dtrain.errors import ConfigError, DtrainError
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

        Weights are drawn in torch's default dtype and then cast to `dtype`. Not collective.

        Raises
        ------
        ConfigError
            A layer has tensors that its factory did not make, or a factory returns no module.
        """
        chosen = tuple(indices)
        layers = {
            self.names[index]: layer
            for index, layer in zip(chosen, self._make_layers(chosen, seed), strict=True)
        }
        for name, layer in layers.items():
            # A tensor that exists already when `as_layers` calls the function is on meta.
            if any(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()]):
                raise ConfigError(
                    "model.factory-reuses-tensors",
                    f"layer '{name}' has tensors that were made before its factory was called, "
                    f"so they do not depend on (seed, name): make them in the factory",
                )
        return {name: cast_module(layer, dtype) for name, layer in layers.items()}

    def rebuild_layer(self, index: int, seed: int, dtype: torch.dtype) -> nn.Module:
        """Build one layer again, equal to that of `build`; on the meta device without memory."""
        [layer] = self._make_layers([index], seed)
        return cast_module(layer, dtype)

    def structure_key(self, index: int) -> Hashable:
        """Return a key that layers of equal structure share; None where structure is unknown."""
        return None

    @property
    @abstractmethod
    def builds_all_layers(self) -> bool:
        """Whether a rank must build all layers to get its own."""

    @abstractmethod
    def _make_layers(self, indices: Sequence[int], seed: int) -> list[nn.Module]:
        """Make new layers in the order of `indices`."""

    @abstractmethod
    def meta_layers(self, dtype: torch.dtype) -> list[nn.Module | None]:
        """Make all layers without memory, on the meta device; None where a layer cannot be."""


@final
@dataclass(frozen=True)
class FactoryLayers(LayerStack):
    """Layers that are each made by a factory of their own."""

    factories: tuple[Factory, ...] = field(repr=False)

    def structure_key(self, index: int) -> Hashable:
        factory = self.factories[index]
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

    def _make_layers(self, indices: Sequence[int], seed: int) -> list[nn.Module]:
        return [self._make_layer(index, seed) for index in indices]

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

    def meta_layers(self, dtype: torch.dtype) -> list[nn.Module | None]:
        return [self._meta_layer(index, dtype) for index in range(len(self.names))]

    def _meta_layer(self, index: int, dtype: torch.dtype) -> nn.Module | None:
        try:
            with on_meta():
                return cast_module(self._make_layer(index, seed=0), dtype)
        except DtrainError:
            raise
        except Exception:  # not supported on meta, or a fault, which the run on the CPU repeats
            return None


@final
@dataclass(frozen=True)
class SequentialLayers(LayerStack):
    """Layers of a user's `nn.Sequential`, which its function makes again for every build."""

    function: Function = field(repr=False)

    @property
    def builds_all_layers(self) -> bool:
        return True

    def _make_layers(self, indices: Sequence[int], seed: int) -> list[nn.Module]:
        with torch.random.fork_rng(devices=[]):
            # The plain seed, so that the weights are those after the user's manual_seed(seed).
            torch.default_generator.manual_seed(seed)
            children = _children(self.function())
        return [children[index][1] for index in indices]

    def meta_layers(self, dtype: torch.dtype) -> list[nn.Module | None]:
        layers = _children(_call_on_meta(self.function))
        return [cast_module(layer, dtype) for _, layer in layers]


def as_layers(function: Function, name: str) -> LayerStack:
    """Return the layers of the model that a function without arguments makes.

    Parameters
    ----------
    function : callable
        Returns an `nn.Sequential`, or a list of (name, factory) pairs. It is called here on the
        meta device; a function that returns a `Sequential` is called again in every `build`.
    name : str
        The model's name in the run file, for the messages.

    Raises
    ------
    ConfigError
        Another result; no layers; an illegal or repeated name; a shared module or parameter.
    """
    result = _call_on_meta(function)
    if isinstance(result, nn.Sequential):
        return _from_sequential(result, function, name)
    pairs = _named_factories(result, name)
    names = tuple(layer_name for layer_name, _ in pairs)
    _check_names(names, name)
    return FactoryLayers(names, tuple(factory for _, factory in pairs))


@contextmanager
def on_meta() -> Iterator[None]:
    """Make tensors on the meta device; without the warnings of torch for weights that are loaded.

    A user's function may load weights into its modules. On the meta device torch leaves them out,
    with one warning for each.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter.*")
        yield


def cast_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floats of a module to `dtype` and its complex numbers to pairs of it, in place."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    module._apply(cast)  # type: ignore[no-untyped-call]
    return module


def require_unshared(layers: dict[str, nn.Module]) -> None:
    """Refuse modules and parameters that occur twice, in one layer or in two.

    A shared weight would be trained by two blocks, or become two weights once a cut separates its
    layers.

    Raises
    ------
    ConfigError
        A module or parameter has two names.
    """
    paths: dict[int, str] = {}
    for name, layer in layers.items():
        members = [
            *layer.named_modules(prefix=name, remove_duplicate=False),
            *layer.named_parameters(prefix=name, remove_duplicate=False),
        ]
        for path, member in members:
            first_path = paths.setdefault(id(member), path)
            if first_path != path:
                kind = "module" if isinstance(member, nn.Module) else "parameter"
                raise ConfigError(
                    "model.shared",
                    f"'{path}' is the same {kind} as '{first_path}': make one for each",
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


def _from_sequential(sequential: nn.Sequential, function: Function, name: str) -> SequentialLayers:
    """Return the layers of a Sequential, or refuse one that cannot be cut or made again."""
    if type(sequential).forward is not nn.Sequential.forward:
        raise ConfigError(
            "model.own-forward",
            f"model '{name}' is a Sequential with a forward() of its own, which cannot be cut: "
            f"return a plain nn.Sequential or (name, factory) pairs",
        )
    children = _children(sequential)
    names = tuple(layer_name for layer_name, _ in children)
    _check_names(names, name)
    require_unshared(dict(children))
    if _call_on_meta(function) is sequential:
        raise ConfigError(
            "model.sequential-reused",
            f"model '{name}' returned the same Sequential twice, so its weights do not depend on "
            f"the seed: make it in the function",
        )
    return SequentialLayers(names, function)


def _children(sequential: object) -> list[tuple[str, nn.Module]]:
    """Return a Sequential's layers, including repeated ones, which `named_children` drops."""
    assert isinstance(sequential, nn.Sequential)
    paths = sequential.named_modules(remove_duplicate=False)
    return [(path, layer) for path, layer in paths if path and "." not in path]


def _named_factories(value: object, name: str) -> list[tuple[str, Factory]]:
    """Return a user's list of (name, factory) pairs, or refuse another value."""
    if not isinstance(value, list | tuple):
        raise ConfigError(
            "model.function-result",
            f"model '{name}' is {type(value).__name__}: return an nn.Sequential, or a "
            f"list of (name, factory) pairs",
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


def _check_names(names: Sequence[str], model: str) -> None:
    """Refuse names that are repeated, or ambiguous as a part of a parameter's path."""
    if not names:
        raise ConfigError("model.no-layers", f"model '{model}' has no layers: return at least one")
    for name in names:
        if name == "heads":
            raise ConfigError(
                "model.layer-name-reserved",
                f"model '{model}': a layer called 'heads' would share its name with the auxiliary "
                f"heads of an objective (heads.0, ...): rename it",
            )
        if not name or "." in name:
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
