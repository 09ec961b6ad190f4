"""Model: ordered, named layers, of which a rank builds its own.

Two kinds. `Listed`: (name, factory) pairs; a rank calls only its own factories, each under
(seed, name). `Whole`: a user's `nn.Sequential`; built whole under the seed on every rank, then
trimmed to the rank's own layers, so that its own initialisation is kept::

    rank with layers 2, 3      Listed   . . f2 f3 . .     calls two factories
                               Whole    0 1 2 3 4 5       builds all (a transient peak), keeps 2, 3

Invariant: a layer's initial weights are pure in (seed, name) or in (seed, function), whatever else
is built in the process, and torch's own generator is left as it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
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
        The layers' names in order; a parameter's global name is `<layer>.<name in the layer>`.
    """

    names: tuple[str, ...]

    def build(self, indices: Iterable[int], seed: int, dtype: torch.dtype) -> dict[str, nn.Module]:
        """Return the layers at `indices`, initialised, in training mode, on the CPU.

        Weights are drawn in torch's default dtype and then cast. Not collective: no layer knows
        of any other.

        Raises
        ------
        DtrainError
            A layer that holds tensors which its factory did not make, or makes no module.
        """
        chosen = tuple(indices)
        layers = self._make_layers(chosen, seed)
        for index, layer in zip(chosen, layers, strict=True):
            if any(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()]):
                raise ConfigError(
                    "todo.key",
                    f"layer '{self.names[index]}' holds tensors that were made before its factory "
                    f"was called, so (seed, name) cannot decide them: make them in the factory",
                )
        return {
            self.names[index]: layer.to(dtype) for index, layer in zip(chosen, layers, strict=True)
        }

    def rebuild_layer(self, index: int, seed: int, dtype: torch.dtype) -> nn.Module:
        """Return one layer anew, as `build` first made it; without memory on the meta device."""
        [layer] = self._make_layers([index], seed)
        return layer.to(dtype)

    def structure_key(self, index: int) -> Hashable:
        """Return what layers of equal structure have in common, None where that is not known."""
        return None

    @property
    @abstractmethod
    def builds_all_layers(self) -> bool:
        """Whether a rank must make all layers to get its own."""

    @abstractmethod
    def _make_layers(self, indices: Sequence[int], seed: int) -> list[nn.Module]:
        """Return new layers in the order of `indices`, drawn as the class promises."""

    @abstractmethod
    def meta_layers(self, dtype: torch.dtype) -> list[nn.Module | None]:
        """Return all layers without memory (on the meta device); None where that cannot be."""


@final
@dataclass(frozen=True)
class FactoryLayers(LayerStack):
    """Layers that are made one by one, each by its own factory."""

    factories: tuple[Factory, ...] = field(repr=False)

    def structure_key(self, index: int) -> Hashable:
        factory = self.factories[index]
        if not isinstance(factory, partial) or not isinstance(factory.func, type):
            return None
        kind = factory.func, factory.args, tuple(factory.keywords.items())
        try:
            hash(kind)
        except TypeError:  # such as a list among the arguments
            return None
        return kind

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
            kind = type(layer).__name__
            raise ConfigError(
                "todo.key", f"the factory of layer '{name}' returned {kind}, not a torch.nn.Module"
            )
        return layer

    def meta_layers(self, dtype: torch.dtype) -> list[nn.Module | None]:
        return [self._meta_layer(index, dtype) for index in range(len(self.names))]

    def _meta_layer(self, index: int, dtype: torch.dtype) -> nn.Module | None:
        try:
            with torch.device("meta"):
                return self._make_layer(index, seed=0).to(dtype)
        except DtrainError:
            raise
        except Exception:  # not every layer can be made on meta; a real fault shows when it is run
            return None


@final
@dataclass(frozen=True)
class SequentialLayers(LayerStack):
    """A user's `nn.Sequential`, made again by its function whenever layers are built."""

    function: Function = field(repr=False)

    @property
    def builds_all_layers(self) -> bool:
        return True

    def _make_layers(self, indices: Sequence[int], seed: int) -> list[nn.Module]:
        with torch.random.fork_rng(devices=[]):
            # The plain seed, so that a user gets the same weights after torch.manual_seed(seed).
            torch.default_generator.manual_seed(seed)
            children = _children(self.function())
        return [children[index][1] for index in indices]

    def meta_layers(self, dtype: torch.dtype) -> list[nn.Module | None]:
        made = _children(call_on_meta(self.function))
        return [layer.to(dtype) for _, layer in made]


def as_layers(function: Function, name: str) -> LayerStack:
    """Return the model that a function without arguments describes.

    Parameters
    ----------
    function : callable
        Returns an `nn.Sequential`, or a list of (name, factory) pairs. It is called on the meta
        device here, and a `Sequential`'s once more per `build`.
    name : str
        What the run file calls it, for the messages.

    Raises
    ------
    DtrainError
        Another return type; no layers; an empty, dotted or repeated name; a shared module.
    """
    made = call_on_meta(function)
    if isinstance(made, nn.Sequential):
        return _from_sequential(made, function, name)
    pairs = _named_factories(made, name)
    _check_names([each for each, _ in pairs], name)
    return FactoryLayers(tuple(each for each, _ in pairs), tuple(make for _, make in pairs))


def require_unshared(layers: dict[str, nn.Module]) -> None:
    """Refuse modules and parameters that occur twice, in one layer or in two, by their names.

    A shared weight would be trained by two blocks, or be two weights as soon as a cut parts them.
    """
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        members = [
            *layer.named_modules(prefix=name, remove_duplicate=False),
            *layer.named_parameters(prefix=name, remove_duplicate=False),
        ]
        for path, member in members:
            other = seen.setdefault(id(member), path)
            if other != path:
                raise ConfigError(
                    "todo.key",
                    f"'{path}' is the same {_kind(member)} as '{other}', and a layer "
                    f"cannot share with another place: make one for each",
                )


def call_on_meta(function: Function) -> object:
    """Call a function on the meta device, so that tensors take no memory; for real if it must."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return function()
        except DtrainError:
            raise
        except Exception:  # such as .item(): called for real, where a true fault shows again
            return function()


def _from_sequential(sequential: nn.Sequential, function: Function, name: str) -> SequentialLayers:
    """Return the model of a Sequential, or refuse one that cannot be cut or made again."""
    if type(sequential).forward is not nn.Sequential.forward:
        raise ConfigError(
            "todo.key",
            f"model '{name}' is a Sequential with a forward() of its own, which cannot be cut: "
            f"return a plain nn.Sequential or (name, factory) pairs",
        )
    children = _children(sequential)
    names = tuple(each for each, _ in children)
    _check_names(names, name)
    require_unshared(dict(children))
    if call_on_meta(function) is sequential:
        raise ConfigError(
            "todo.key",
            f"model '{name}' returned the same Sequential twice, so the seed cannot decide its "
            f"weights: make it in the function",
        )
    return SequentialLayers(names, function)


def _children(sequential: object) -> list[tuple[str, nn.Module]]:
    """Return a Sequential's layers; `named_children` would drop one that occurs twice."""
    assert isinstance(sequential, nn.Sequential)
    paths = sequential.named_modules(remove_duplicate=False)
    return [(path, layer) for path, layer in paths if path and "." not in path]


def _named_factories(value: object, name: str) -> list[tuple[str, Factory]]:
    """Check that a user's list holds (name, factory) pairs."""
    if not isinstance(value, list | tuple):
        raise ConfigError(
            "todo.key",
            f"model '{name}' is {type(value).__name__}: return an nn.Sequential, or a "
            f"list of (name, factory) pairs",
        )
    for index, pair in enumerate(value):
        match pair:
            case (str(label), nn.Module()):
                raise ConfigError(
                    "todo.key",
                    f"model '{name}': layer '{label}' is a module, not a factory: "
                    f"return a function that makes it",
                )
            case (str(), factory) if callable(factory):
                continue
        raise ConfigError(
            "todo.key", f"model '{name}': item {index} of its list is no (name, factory) pair"
        )
    return [(label, factory) for label, factory in value]


def _check_names(names: Sequence[str], name: str) -> None:
    """Refuse names that could not be told apart, or not be told from a parameter's path."""
    if not names:
        raise ConfigError("todo.key", f"model '{name}' has no layers: return at least one")
    for each in names:
        if each == "heads":
            raise ConfigError(
                "todo.key",
                f"model '{name}': a layer called 'heads' would share its name with the local "
                f"heads of an objective (heads.0, ...): rename it",
            )
        if not each or "." in each:
            raise ConfigError(
                "todo.key", f"model '{name}': layer name '{each}' is empty or has a dot: rename it"
            )
        if names.count(each) > 1:
            raise ConfigError(
                "todo.key",
                f"model '{name}' has {names.count(each)} layers called '{each}': "
                f"give each its own name",
            )


def _kind(member: object) -> str:
    return "module" if isinstance(member, nn.Module) else "parameter"
