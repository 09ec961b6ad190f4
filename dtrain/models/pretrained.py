"""Initial weights from a file, under the names of the user's model.

Invariant: a rank reads the tensors of its own layers alone. Nothing but tensors is loaded from the
file: no code of a pickle runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from dtrain.errors import ConfigError
from dtrain.models.layers import LayerStack, merge_layers

SHOWN = 5
"""Names that an error lists."""


class TensorSource(Protocol):
    """Tensors that are read one by one."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""


@final
class PretrainedWeights:
    """The tensors of a `.pt` or `.safetensors` file, or of another source.

    Parameters
    ----------
    path : Path
        The file: a state dict of ``torch.save``, or what `dtrain export` writes.
    source : TensorSource, optional
        The tensors of `path`, where that is no such file.

    Raises
    ------
    ConfigError
        The file is missing, has another suffix, or holds no state dict.
    """

    def __init__(self, path: Path, source: TensorSource | None = None) -> None:
        self.path = path
        self._source: Any
        if source is not None:
            self._shapes, self._source = source.shapes(), source
            return
        if not path.is_file():
            raise ConfigError("model.weights-missing", f"[model] weights: there is no file {path}")
        self._shapes, self._source = _open(path)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor of the file, by name."""
        return self._shapes

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self._source[name]
        return tensor


def check_pretrained(weights: PretrainedWeights, model: LayerStack, strict: bool) -> None:
    """Compare the names and shapes of a file with those of a model.

    Raises
    ------
    ConfigError
        A shape differs; with `strict`, a name is missing or unexpected; without, all are.
    """
    layers = [layer for layer in model.meta_layers(torch.float32) if layer is not None]
    expected = {name: _shape(t) for name, t in _named_tensors(merge_layers(layers)).items()}
    aliases = model.tied_names
    found = dict(weights.shapes)
    missing = [name for name in expected if _name_in(name, found, aliases) is None]
    known = {*expected, *aliases}
    unexpected = [name for name in found if name not in known]
    for name, shape in expected.items():
        source = _name_in(name, found, aliases)
        if source is not None and shape is not None and found[source] != shape:
            raise ConfigError(
                "model.weights-shape",
                f"[model] weights: '{source}' of {weights.path} has shape {found[source]}, but "
                f"the model's has {shape}",
            )
    all_missing = len(missing) == len(expected)
    if (strict and (missing or unexpected)) or all_missing:
        raise ConfigError(
            "model.weights-names",
            f"[model] weights: {weights.path} lacks {_listed(missing)} and has "
            f"{_listed(unexpected)} that the model does not know: give a file of this model, or "
            f"set strict = false to load what fits",
        )


def load_pretrained(
    weights: PretrainedWeights, layers: Mapping[str, nn.Module], aliases: Mapping[str, str]
) -> None:
    """Overwrite the tensors of layers by those of the same names in the file."""
    for name, tensor in _named_tensors(layers).items():
        source = _name_in(name, weights.shapes, aliases)
        if source is not None:
            with torch.no_grad():
                tensor.copy_(weights.tensor(source))


def _name_in(name: str, names: Mapping[str, Any], aliases: Mapping[str, str]) -> str | None:
    """Return the name under which a file holds a tensor of the model, None where it does not."""
    if name in names:
        return name
    first = aliases.get(name, name)
    same = [first, *(alias for alias, other in aliases.items() if other == first)]
    return next((other for other in same if other in names), None)


def _named_tensors(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by global name."""
    return {
        f"{root}.{name}".strip("."): tensor
        for root, module in layers.items()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }


def _open(path: Path) -> tuple[dict[str, tuple[int, ...]], Any]:
    """Return the shapes of a file's tensors, and a mapping that reads one by name."""
    if path.suffix == ".safetensors":
        if importlib.util.find_spec("safetensors") is None:
            raise ConfigError(
                "model.safetensors-missing",
                "the package 'safetensors' is not installed: pip install it, or give a .pt file",
            )
        from safetensors import safe_open

        file = _SafeFile(safe_open(str(path), framework="pt"))
        return file.shapes(), file
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        text = str(error).strip().splitlines()[0]
        raise ConfigError(
            "model.weights-unreadable", f"[model] weights: cannot read {path}: {text}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ConfigError(
            "model.weights-no-state-dict",
            f"[model] weights: {path} is no state dict: save model.state_dict()",
        )
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, state


@final
class _SafeFile:
    """The tensors of a `.safetensors` file, each read on access."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: tuple(self._file.get_slice(n).get_shape()) for n in self._file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the shape of a tensor, None where a lazy module has not set it yet."""
    return None if isinstance(tensor, UninitializedTensorMixin) else tuple(tensor.shape)


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more
