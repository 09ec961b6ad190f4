"""Leaf calls: the outputs of the modules that hold trained parameters, replaced one by one.

Invariant: outside the contexts of this file the modules of a block are unchanged.

::

    x ---- linear ---- norm ---- ReLU ---- linear ---- y
             |          |                    |
          replace    replace              replace         each gets (name, output), returns another

The output of a module with a part `sums` (`mlp` has them) is that of `sums`: the pre-activation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from dtrain import eager_torch
from dtrain.block.block import Block
from dtrain.block.low_rank import FACTORS_MODULE

PARAMETRIZATIONS = (FACTORS_MODULE, "parametrizations")
"""Parts of a module that hold parameters from which its own weight is computed."""


ReplaceOutput = Callable[[str, Tensor], Tensor]
"""Gets the name of a call and its output; returns the output that later modules get."""


def leaf_modules(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules that hold trained parameters of their own, by dotted name."""
    return {
        ".".join(filter(None, (root, name))): module
        for root, layer in layers.items()
        for name, module in layer.named_modules()
        if not set(PARAMETRIZATIONS).intersection(name.split("."))
        if any(parameter.requires_grad for parameter in own_parameters(module))
    }


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module that belong to none of its parts."""
    parts = [getattr(module, name) for name in PARAMETRIZATIONS if hasattr(module, name)]
    parameters = [p for part in parts for p in part.parameters()]
    return [*module.parameters(recurse=False), *parameters]


@contextmanager
def replaced_outputs(modules: Mapping[str, nn.Module], replace: ReplaceOutput) -> Iterator[None]:
    """Give the outputs of modules to `replace` while the body runs forwards.

    The second call of a module has the name ``<name>#1``, and so on. An output that is no tensor is
    left as it is.
    """
    counts: Counter[str] = Counter()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        def call(_module: nn.Module, _args: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor):
                return None
            number = counts[name]
            counts[name] += 1
            return replace(f"{name}#{number}" if number else name, output)

        return call

    with ExitStack() as stack:
        for name, module in modules.items():
            sums = getattr(module, "sums", None)
            tapped = sums if isinstance(sums, nn.Module) else module
            stack.callback(tapped.register_forward_hook(hook(name)).remove)
        yield


@contextmanager
def parameter_tangents(block: Block, tangents: Mapping[int, Tensor]) -> Iterator[None]:
    """Give the parameters of a block's layers tangents while the body runs, inside a dual level.

    Parameters
    ----------
    tangents : mapping of int to Tensor
        The tangent of a parameter, by its ``id``; parameters without one stay constants.
    """
    low_rank = list(block.low_rank_weights.values())
    replaced: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    try:
        for layer in block.layers.values():
            for module in layer.modules():
                parameters: dict[str, Any] = module._parameters
                for name, parameter in list(parameters.items()):
                    if parameter is not None and id(parameter) in tangents:
                        replaced.append((parameters, name, parameter))
                        tangent = tangents[id(parameter)]
                        parameters[name] = eager_torch.make_dual(parameter.detach(), tangent)
        for weight in low_rank:
            weight.show()
        yield
    finally:
        for parameters, name, parameter in replaced:
            parameters[name] = parameter
        for weight in low_rank:
            weight.show()
