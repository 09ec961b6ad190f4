"""Parameters, buffers and optimizer state of a block, by global names.

Invariant: a name means the same tensor on every rank and in every file, whether its layer is
compiled by `torch.compile` or not. A matrix that is factorized
keeps its name; its factors are ``<name>.left`` and ``<name>.right``, and ``<name>.core`` where
there are three.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dtrain.block.complex_tensors import real_view
from dtrain.block.low_rank import FACTOR_NAMES, FACTORS_MODULE, LowRankWeight, is_factorizable
from dtrain.block.module_traits import first_replica_buffers
from dtrain.block.optimizer import NamedParameter, OptimizerFactory

WRAPPER = "_orig_mod"
"""Name of a module inside the one that `torch.compile` returns for it."""


class BlockParameters:
    """The tensors of one block, and its optimizer.

    Parameters
    ----------
    roots : mapping of str to nn.Module
        Layers and head under their global names.
    make_optimizer : callable
        Makes the optimizer from parameters.
    model_ends : (bool, bool)
        Whether the block holds the first layer of the model, and the last.
    first_copies : mapping of str to (str, str)
        For parameters that an earlier block holds, too: name there, and class of the module. The
        optimizer sees these, so that it treats all copies alike.

    Attributes
    ----------
    parameters : dict of str to nn.Parameter
        By global name, in the order of the model.
    trainable_parameters : list of nn.Parameter
        Those that require a gradient, in the same order.
    optimizer : Optimizer or None
        None where nothing is trained.
    base_lrs, base_lr : list of float, float
        Learning rates with which the optimizer's groups were made, and that of the first group: 0
        where nothing is trained.
    low_rank_weights : dict of str to LowRankWeight
        The matrices that are factorized now, by name.
    parametrisation_version : int
        How often the parameters were replaced by others.
    """

    def __init__(
        self,
        roots: Mapping[str, nn.Module],
        make_optimizer: OptimizerFactory,
        model_ends: tuple[bool, bool] = (False, False),
        first_copies: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.roots = dict(roots)
        self._first_copies = first_copies or {}
        self.model_ends = model_ends
        self._make_optimizer = make_optimizer
        self.low_rank_weights: dict[str, LowRankWeight] = {}
        self.parametrisation_version = 0
        self._initial_order: dict[str, int] = {}
        self._build_optimizer()

    def _collect_parameters(self) -> None:
        """Collect the parameters in their initial order."""
        named = [
            (self._global_name(plain_name(join(root, name))), parameter)
            for root, module in self.roots.items()
            for name, parameter in module.named_parameters()
        ]
        # A parameter that two layers share has the name of the first one.
        first_names: dict[int, str] = {}
        for name, parameter in named:
            first_names.setdefault(id(parameter), name)
        parameters = {
            name: parameter for name, parameter in named if first_names[id(parameter)] == name
        }
        self._initial_order = self._initial_order or {
            name: number for number, name in enumerate(parameters)
        }
        names = sorted(parameters, key=lambda name: (self._initial_order[matrix_name(name)], name))
        self.parameters = {name: parameters[name] for name in names}

    def _global_name(self, name: str) -> str:
        """Return the global name of a parameter, given its name in the modules."""
        layer, _, factor = name.rpartition(f".{FACTORS_MODULE}.")
        matrix = f"{layer}.weight"
        return f"{matrix}.{factor}" if matrix in self.low_rank_weights else name

    def _build_optimizer(self) -> None:
        self._collect_parameters()
        self.trainable_parameters = [p for p in self.parameters.values() if p.requires_grad]
        named = self.named_parameters()
        self.optimizer = self._make_optimizer(named) if named else None
        groups = self.optimizer.param_groups if self.optimizer else []
        self.base_lrs = [float(group["lr"]) for group in groups]
        self.base_lr = self.base_lrs[0] if self.base_lrs else 0.0

    def named_parameters(self) -> list[NamedParameter]:
        """Return the trained parameters with their names and the classes of their modules, those
        of the first copy where an earlier block holds one."""
        modules = self.modules()

        def name_and_class(name: str) -> tuple[str, str]:
            owner = modules.get(matrix_name(name).rpartition(".")[0])
            return self._first_copies.get(name, (name, type(owner).__name__))

        return [
            NamedParameter(first_name, parameter, module_class)
            for name, parameter in self.parameters.items()
            if parameter.requires_grad
            for first_name, module_class in [name_and_class(name)]
        ]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers by global name, looked up anew since a layer may rebind its own."""
        return {
            plain_name(join(root, name)): tensor
            for root, module in self.roots.items()
            for name, tensor in module.named_buffers()
        }

    @property
    def unsynced_buffers(self) -> dict[str, Tensor]:
        """The buffers in which replicas may differ, such as batch statistics.

        Left out are the buffers that their module lists in an attribute ``identical_buffers``.
        """
        identical = self._listed_buffers(lambda m: getattr(m, "identical_buffers", ()))
        return {name: buffer for name, buffer in self.buffers.items() if name not in identical}

    @property
    def first_replica_buffers(self) -> set[str]:
        """The names of the unsynced buffers that are not averaged, but those of replica 0."""
        return self._listed_buffers(first_replica_buffers)

    def _listed_buffers(self, list_names: Callable[[nn.Module], Iterable[str]]) -> set[str]:
        """Return the global names of the buffers that a function lists for their modules."""
        return {
            plain_name(".".join(filter(None, (root, path, name))))
            for root, layer in self.roots.items()
            for path, module in layer.named_modules()
            for name in list_names(module)
        }

    # ---- the optimizer

    @property
    def lr(self) -> float:
        """The optimizer's present learning rate, 0 where nothing is trained."""
        return float(self.optimizer.param_groups[0].get("lr", 0)) if self.optimizer else 0.0

    def set_lr_factor(self, lr_factor: float) -> None:
        """Set every group's learning rate to `lr_factor` times its base learning rate."""
        if self.optimizer is not None:
            for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base_lr * lr_factor

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the trained parameters that have one, complex as `real_view`."""
        gradients = [p.grad for p in self.trainable_parameters if p.grad is not None]
        return [real_view(grad) if grad.is_complex() else grad for grad in gradients]

    def fill_gradients(self) -> list[nn.Parameter]:
        """Give gradients of zero to the trained parameters without one; return those parameters.

        `drop_gradients` removes them again: the optimizer leaves a parameter without a gradient
        unchanged, weight decay and momentum included.
        """
        missing = [p for p in self.trainable_parameters if p.grad is None]
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        return missing

    @staticmethod
    def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
        """Remove the gradients of parameters."""
        for parameter in parameters:
            parameter.grad = None

    # ---- factorized matrices

    def factorizable_weights(self, include_first: bool = False) -> list[str]:
        """Return the names of the trained weights that can be factorized.

        These are the weights of linear and convolution layers. Left out are heads, compiled
        modules, the last such weight of the model, and the first one unless `include_first`.
        """
        compiled = self._compiled_names()
        names = [
            f"{name}.weight"
            for name, module in self.modules().items()
            if not is_head_name(name)
            and is_factorizable(module)
            and self.parameters[f"{name}.weight"].requires_grad
            and name not in compiled
        ]
        holds_first, holds_last = self.model_ends
        return names[holds_first and not include_first : len(names) - holds_last]

    def _compiled_names(self) -> set[str]:
        """Return the global names of the modules inside those that `torch.compile` returned."""
        return {
            plain_name(join(root, name))
            for root, layer in self.roots.items()
            for name, _ in layer.named_modules()
            if WRAPPER in name.split(".")
        }

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Return rows and columns of a weight as a matrix (shape[0], product of the others)."""
        low_rank = self.low_rank_weights.get(name)
        shape = self.parameters[name].shape if low_rank is None else low_rank.shape
        return shape[0], shape[1:].numel()

    def factorize(self, name: str, *factors: Tensor) -> LowRankWeight:
        """Replace a weight, or its factors, by a product of `factors` from left to right.

        `rebuild_optimizer` must follow.
        """
        if name in self.low_rank_weights:
            self.low_rank_weights[name].set_factors(*factors)
        else:
            module = self.modules()[name.removesuffix(".weight")]
            self.low_rank_weights[name] = LowRankWeight(module, *factors)
        self._collect_parameters()
        return self.low_rank_weights[name]

    def merge_factors(self, name: str) -> None:
        """Replace the factors of a weight by their product; `rebuild_optimizer` must follow."""
        self.low_rank_weights.pop(name).merge()
        self._collect_parameters()

    def rebuild_optimizer(self, optimizer_state: Mapping[str, Tensor]) -> None:
        """Make a new optimizer for the present parameters, with this state."""
        self._build_optimizer()
        self.parametrisation_version += 1
        self.load_optimizer_state(optimizer_state)

    # ---- state

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers by global name, detached, not copied."""
        return {name: t.detach() for name, t in {**self.parameters, **self.buffers}.items()}

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return the trained parameters by global name, detached, not copied.

        A complex one is returned as `real_view`, so that syncs need no complex arithmetic.
        """
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        return {name: real_view(parameter.detach()) for name, parameter in trained.items()}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers by global name, products in place of their factors."""
        tensors = {
            name: tensor
            for name, tensor in self.tensors().items()
            if matrix_name(name) not in self.low_rank_weights
        }
        for name, low_rank in self.low_rank_weights.items():
            tensors[name] = low_rank.product().detach()
        return tensors

    def name_gradients(self, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the trained parameters, in their order, by global name."""
        return dict(zip(self.trainable_tensors(), gradients, strict=True))

    @contextmanager
    def swap_tensors(self, replacements: Mapping[str, Tensor]) -> Iterator[None]:
        """Compute with `replacements`, under the names of `merged_tensors`, while the body runs."""
        tensors = {**self.parameters, **self.buffers}
        swapped = {name: tensor for name, tensor in tensors.items() if name in replacements}
        own_data = [(tensor, tensor.data) for tensor in swapped.values()]
        for name, tensor in swapped.items():
            tensor.data = replacements[name]
        for name, low_rank in self.low_rank_weights.items():
            low_rank.show(replacements[name])
        try:
            yield
        finally:
            for tensor, data in own_data:
                tensor.data = data
            for low_rank in self.low_rank_weights.values():
                low_rank.show()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state as ``<parameter>/<entry>``; numbers as 0-dim tensors."""
        if self.optimizer is None:
            return {}
        return {
            f"{name}/{entry}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for entry, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }

    def add_optimizer_state(self, entries: Mapping[str, Tensor]) -> None:
        """Add entries to the optimizer's state, or replace those of the same keys."""
        self.load_optimizer_state(self.optimizer_state() | dict(entries))

    def load_optimizer_state(self, optimizer_state: Mapping[str, Tensor]) -> None:
        """Load a state that `optimizer_state` returned."""
        if self.optimizer is None:
            return
        groups = self.optimizer.state_dict()["param_groups"]
        in_order = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbers = {id(parameter): number for number, parameter in enumerate(in_order)}
        state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in optimizer_state.items():
            parameter, _, entry = name.rpartition("/")
            state[numbers[id(self.parameters[parameter])]][entry] = tensor
        # `load_state_dict` moves each entry to the right device.
        self.optimizer.load_state_dict({"state": dict(state), "param_groups": groups})

    def modules(self) -> dict[str, nn.Module]:
        """Return all modules by global name; a compiled one is the module that was compiled."""
        return {
            plain_name(join(root, name)): module
            for root, layer in self.roots.items()
            for name, module in layer.named_modules()
        }


def is_head_name(name: str) -> bool:
    """Return whether a global name is that of a head of the objective, ``heads.<block>``.

    A model may have a sub-module called "heads", too, whose parts have no numbers as names.
    """
    first, _, rest = name.partition(".")
    return first == "heads" and rest.partition(".")[0].isdigit()


def join(root: str, name: str) -> str:
    """Return the global name of a part of a root; a root without a name adds nothing."""
    return f"{root}.{name}".strip(".")


def plain_name(name: str) -> str:
    """Return a dotted name without the wrappers of modules that `torch.compile` returned.

    >>> plain_name("0._orig_mod.weight")
    '0.weight'
    """
    if WRAPPER not in name:
        return name
    return ".".join(part for part in name.split(".") if part != WRAPPER)


def matrix_name(name: str) -> str:
    """Return the name of the matrix of a factor; other names are returned unchanged."""
    matrix, _, factor = name.rpartition(".")
    return matrix if matrix.endswith(".weight") and factor in FACTOR_NAMES[3] else name
