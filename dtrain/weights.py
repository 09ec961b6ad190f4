"""What a block holds: parameters, buffers and optimizer state, all by global names.

Invariant: a name says what a tensor is in every rank and every file; a matrix that is a product for
a while is shown under its own name, its factors under ``<name>.left`` and ``<name>.right``, and
``<name>.core`` where there are three.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn, optim

from dtrain.factors import NAMES, Factors, eligible

Step = Callable[[Iterable[nn.Parameter]], optim.Optimizer]

ORIGINAL = ".parametrizations.weight.original"
"""What torch calls a factor: this in the place of ``.weight``, and its place."""


class Weights:
    """The tensors of one block, and the optimizer that moves them.

    Parameters
    ----------
    roots : mapping of str to nn.Module
        Layers and helper under their global names.
    step : callable
        Makes the optimizer from parameters.
    ends : (bool, bool)
        Whether it holds the first layer of the model, and the last.

    Attributes
    ----------
    parameters : dict of str to nn.Parameter
        Under their global names.
    trained : list of nn.Parameter
        Those that learn.
    optimizer : Optimizer or None
        None where nothing learns.
    factors : dict of str to Factors
        Matrices that are products now.
    form : int
        How often other parameters have taken the place of these.
    """

    def __init__(
        self,
        roots: Mapping[str, nn.Module],
        step: Step,
        ends: tuple[bool, bool] = (False, False),
    ) -> None:
        self.roots, self.ends, self._step = dict(roots), ends, step
        self.factors: dict[str, Factors] = {}
        self.form = 0
        self._order: dict[str, int] = {}
        self._take()

    def _name(self) -> None:
        """Find the parameters, in the order that they had at first."""
        found = {
            self._named(f"{root}.{name}"): tensor
            for root, module in self.roots.items()
            for name, tensor in module.named_parameters()
        }
        self._order = self._order or {name: place for place, name in enumerate(found)}
        names = sorted(found, key=lambda name: (self._order[whole(name)], name))
        self.parameters = {name: found[name] for name in names}

    def _named(self, name: str) -> str:
        """Return the global name of a parameter that torch calls so."""
        root, _, place = name.partition(ORIGINAL)
        own = self.factors.get(f"{root}.weight")
        return name if own is None or not place else f"{root}.weight.{own.names[int(place)]}"

    def _take(self) -> None:
        self._name()
        self.trained = [p for p in self.parameters.values() if p.requires_grad]
        self.optimizer = self._step(self.trained) if self.trained else None
        groups = self.optimizer.param_groups if self.optimizer else []
        self.rates = [float(group["lr"]) for group in groups]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers under their global names, looked up anew: a layer may rebind its own."""
        return {
            f"{root}.{name}": tensor
            for root, module in self.roots.items()
            for name, tensor in module.named_buffers()
        }

    @property
    def drifting(self) -> dict[str, Tensor]:
        """The buffers in which replicas may differ, such as batch statistics: all but those that
        their module names in an attribute ``alike``."""
        alike = {
            ".".join(filter(None, (root, path, name)))
            for root, module in self.roots.items()
            for path, each in module.named_modules()
            for name in getattr(each, "alike", ())
        }
        return {name: buffer for name, buffer in self.buffers.items() if name not in alike}

    # ---- the optimizer

    @property
    def lr(self) -> float:
        """The optimizer's present learning rate, 0 where there is nothing to train."""
        return float(self.optimizer.param_groups[0].get("lr", 0)) if self.optimizer else 0.0

    @property
    def peak(self) -> float:
        """The learning rate that the optimizer was made with, 0 where there is nothing to train."""
        return self.rates[0] if self.rates else 0.0

    def rate(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times the one that it was made with."""
        if self.optimizer is not None:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all trained parameters, zeros where no sample gave one."""
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.trained if p.grad is not None]

    # ---- matrices that are products

    def matrices(self, first: bool = False) -> list[str]:
        """Return the names of the weights that learn and may become products: those of linear maps
        and convolutions, heads and the last of the model excepted, and its first unless asked."""
        found = [
            f"{name}.weight"
            for name, module in self.modules().items()
            if eligible(module) and self.parameters[f"{name}.weight"].requires_grad
        ]
        own = [name for name in found if not name.startswith("heads.")]
        begins, ends = self.ends
        return own[begins and not first : len(own) - ends]

    def shape(self, name: str) -> tuple[int, int]:
        """Return rows and columns of a weight seen as a matrix."""
        own = self.factors.get(name)
        shape = self.parameters[name].shape if own is None else own.product.shape
        return shape[0], shape[1:].numel()

    def factor(self, name: str, *sides: Tensor) -> Factors:
        """Put a product in the place of a weight, or of another; `reform` must follow.

        Its factors are `sides`, from left to right; see `Factors`.
        """
        if name in self.factors:
            self.factors[name].put(*sides)
        else:
            module = self.modules()[name.removesuffix(".weight")]
            self.factors[name] = Factors(module, *sides)
        self._name()
        return self.factors[name]

    def whole(self, name: str) -> None:
        """Put a weight, the product, in the place of its factors; `reform` must follow."""
        self.factors.pop(name).dissolve()
        self._name()

    def reform(self, memory: Mapping[str, Tensor]) -> None:
        """Let the optimizer move what learns now, with this state."""
        self._take()
        self.form += 1
        self.remember(memory)

    # ---- state

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers under their global names, detached, not copied."""
        return {name: t.detach() for name, t in {**self.parameters, **self.buffers}.items()}

    def values(self) -> dict[str, Tensor]:
        """Return what of them is trained, likewise, in the order of `trained`."""
        return {name: p.detach() for name, p in self.parameters.items() if p.requires_grad}

    def wholes(self) -> dict[str, Tensor]:
        """Return parameters and buffers, products in the place of factors; detached."""
        own = {name: t for name, t in self.tensors().items() if whole(name) not in self.factors}
        return own | {n: f.product(*f.sides).detach() for n, f in self.factors.items()}

    def named(self, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return one tensor for each of `values` under their names, such as `gradients()`."""
        return dict(zip(self.values(), gradients, strict=True))

    @contextmanager
    def showing(self, view: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold the tensors of `view` instead of its own ones while the body runs."""
        own = {n: t for n, t in {**self.parameters, **self.buffers}.items() if n in view}
        kept = [(tensor, tensor.data) for tensor in own.values()]
        for name, tensor in own.items():
            tensor.data = view[name]
        for name, product in self.factors.items():
            product.product.shown = view[name]
        try:
            yield
        finally:
            for tensor, data in kept:
                tensor.data = data
            for product in self.factors.values():
                product.product.shown = None

    def memory(self) -> dict[str, Tensor]:
        """Return the optimizer's state as ``<parameter>/<key>``: tensors, scalars as 0-dim."""
        if self.optimizer is None:
            return {}
        return {
            f"{name}/{entry}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for entry, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Restore the optimizer's state from what `memory()` once returned."""
        if self.optimizer is None:
            return
        place = {id(parameter): number for number, parameter in enumerate(self.trained)}
        state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in memory.items():
            parameter, _, entry = name.rpartition("/")
            state[place[id(self.parameters[parameter])]][entry] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        # torch knows which entry belongs on which device.
        self.optimizer.load_state_dict({"state": dict(state), "param_groups": groups})

    def modules(self) -> dict[str, nn.Module]:
        """Return all modules under their global names."""
        return {
            f"{root}.{name}".rstrip("."): module
            for root, layer in self.roots.items()
            for name, module in layer.named_modules()
        }


def whole(name: str) -> str:
    """Return the name of the matrix that a factor is of, other names as they are."""
    root, _, side = name.rpartition(".")
    return root if root.endswith(".weight") and side in NAMES[3] else name
