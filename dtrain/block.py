"""One block: consecutive layers, the objective's helper modules, one optimizer.

Invariant: a block knows nothing of ranks or messages, and a loss of one block moves no parameter
of another, because what arrives is detached from what sent it.

::

        x (leaf)          y                      pulls = [(tensor, cotangent), ...]
    ----------> layers ------> heads.<block>  ------> backward ------> gradients, x.grad
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn, optim

from dtrain.seeds import seeded

Pull = tuple[Tensor, Tensor]
Step = Callable[[Iterable[nn.Parameter]], optim.Optimizer]

# Layers made of these alone never draw random numbers, so they need no generator of their own.
CALM = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    *(nn.LayerNorm, nn.GroupNorm, nn.Flatten, nn.Identity, nn.Embedding),
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Hardtanh),
)


@dataclass(slots=True)
class Live:
    """One micro-batch on its way through one block.

    Attributes
    ----------
    x : Tensor
        What arrived, a leaf, (rows, ...).
    y : Tensor
        What the block's layers made of it, with its graph while training.
    targets : Tensor
        Labels of the rows, (rows,) int64.
    share : float
        Rows of this micro-batch over the rows of this replica in this update (n_i / n_r): where
        a signal is born, it is scaled by it.
    told : dict of str to Tensor
        What the routes brought to the current action, by the route's name.
    loss : Tensor or None
        Mean over the rows of what a user sees as the loss; left behind by the objective.
    """

    x: Tensor
    y: Tensor
    targets: Tensor
    share: float = 1.0
    told: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None


class Block:
    """Layers, helpers and optimizer of one block.

    Parameters
    ----------
    index : int
        Position among the run's blocks.
    layers : mapping of str to nn.Module
        The model's own layers under their global names, in order.
    helper : nn.Module or None
        What the objective adds; its parameters are named ``heads.<index>.*``.
    step : callable
        Makes the block's optimizer from its parameters.
    seed : int
        The run's seed; with a layer's name and the clock it keys the layer's random draws.
    """

    def __init__(
        self,
        index: int,
        layers: Mapping[str, nn.Module],
        helper: nn.Module | None,
        step: Step,
        seed: int = 0,
    ) -> None:
        self.index = index
        self.layers = dict(layers)
        self.helper = helper
        self.seed = seed
        self.drawing = {name for name, layer in self.layers.items() if _may_draw(layer)}
        roots = {**self.layers, **({} if helper is None else {f"heads.{index}": helper})}
        self.parameters = {
            f"{root}.{name}": tensor
            for root, module in roots.items()
            for name, tensor in module.named_parameters()
        }
        self.trained = [p for p in self.parameters.values() if p.requires_grad]
        self.optimizer = step(self.trained) if self.trained else None
        self.roots = roots
        first = next(iter(self.layers.values()))
        self.writes = any(getattr(module, "inplace", False) for module in first.modules())

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers under their global names, looked up anew: a layer may rebind its own."""
        return {
            f"{root}.{name}": tensor
            for root, module in self.roots.items()
            for name, tensor in module.named_buffers()
        }

    @property
    def lr(self) -> float:
        """The optimizer's present learning rate, 0 where there is nothing to train."""
        return float(self.optimizer.param_groups[0].get("lr", 0)) if self.optimizer else 0.0

    def train(self, mode: bool = True) -> None:
        """Put every module into training mode, or into evaluation mode."""
        for module in self.roots.values():
            module.train(mode)

    def forward(self, x: Tensor, draw: tuple[int, ...]) -> Tensor:
        """Run the layers in order on `x` (rows, ...); `draw` keys the layers' random numbers."""
        if x.requires_grad and self.writes:
            x = x.clone()  # a leaf may not be written to
        for name, layer in self.layers.items():
            if name in self.drawing:
                with seeded(self.seed, name, *draw):
                    x = layer(x)
            else:
                x = layer(x)
        return x

    def learn(self, pulls: Iterable[Pull]) -> None:
        """Add the gradients of ``sum <tensor, cotangent>`` to this block's parameters and to x.

        A block without parameters whose input nobody asks about has nothing to learn.
        """
        reached = [(tensor, told) for tensor, told in pulls if tensor.requires_grad]
        if reached:
            tensors, cotangents = zip(*reached, strict=True)
            torch.autograd.backward(tensors, cotangents)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all trained parameters, zeros where no sample gave one."""
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.trained if p.grad is not None]

    def update(self) -> None:
        """Take one optimizer step and forget the gradients."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers under their global names, detached, not copied."""
        return {name: t.detach() for name, t in {**self.parameters, **self.buffers}.items()}

    @contextmanager
    def showing(self, view: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold the tensors of `view` instead of its own ones while the body runs."""
        own = {**self.parameters, **self.buffers}
        kept = [(tensor, tensor.data) for tensor in own.values()]
        for name, tensor in own.items():
            tensor.data = view[name]
        try:
            yield
        finally:
            for tensor, data in kept:
                tensor.data = data

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
        self.optimizer.state.clear()
        for name, tensor in memory.items():
            parameter, _, entry = name.rpartition("/")
            self.optimizer.state[self.parameters[parameter]][entry] = tensor


def _may_draw(layer: nn.Module) -> bool:
    """Tell whether a layer might use random numbers: any module inside that is not known calm.

    A subclass may do what its parent does not, so a user's class is calm only if it says so,
    by an attribute ``draws = False``.
    """
    return not all(_calm(module) for module in layer.modules())


def _calm(module: nn.Module) -> bool:
    own = type(module).forward.__module__.startswith("torch.nn.modules.")
    known = own and isinstance(module, (*CALM, nn.Sequential))
    return known or getattr(module, "draws", True) is False
