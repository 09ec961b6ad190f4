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

from dtrain.block.low_rank import FACTOR_NAMES, FACTORS_MODULE, LowRankWeight, is_factorizable

OptimizerFactory = Callable[[Iterable[nn.Parameter]], optim.Optimizer]


class BlockParameters:
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
        make_optimizer: OptimizerFactory,
        model_ends: tuple[bool, bool] = (False, False),
    ) -> None:
        self.roots, self.model_ends, self._make_optimizer = dict(roots), model_ends, make_optimizer
        self.low_rank_weights: dict[str, LowRankWeight] = {}
        self.parametrisation_version = 0
        self._initial_order: dict[str, int] = {}
        self._build_optimizer()

    def _collect_parameters(self) -> None:
        """Find the parameters, in the order that they had at first."""
        found = {
            self._global_name(f"{root}.{name}"): tensor
            for root, module in self.roots.items()
            for name, tensor in module.named_parameters()
        }
        self._initial_order = self._initial_order or {
            name: place for place, name in enumerate(found)
        }
        names = sorted(found, key=lambda name: (self._initial_order[matrix_name(name)], name))
        self.parameters = {name: found[name] for name in names}

    def _global_name(self, name: str) -> str:
        """Return the global name of a parameter that torch calls so."""
        layer, _, factor = name.rpartition(f".{FACTORS_MODULE}.")
        matrix = f"{layer}.weight"
        return f"{matrix}.{factor}" if matrix in self.low_rank_weights else name

    def _build_optimizer(self) -> None:
        self._collect_parameters()
        self.trainable_parameters = [p for p in self.parameters.values() if p.requires_grad]
        self.optimizer = (
            self._make_optimizer(self.trainable_parameters) if self.trainable_parameters else None
        )
        groups = self.optimizer.param_groups if self.optimizer else []
        self.base_lrs = [float(group["lr"]) for group in groups]
        self.base_lr = self.base_lrs[0] if self.base_lrs else 0.0

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers under their global names, looked up anew: a layer may rebind its own."""
        return {
            f"{root}.{name}": tensor
            for root, module in self.roots.items()
            for name, tensor in module.named_buffers()
        }

    @property
    def unsynced_buffers(self) -> dict[str, Tensor]:
        """The buffers in which replicas may differ, such as batch statistics: all but those that
        their module names in an attribute ``alike``."""
        alike = {
            ".".join(filter(None, (root, path, name)))
            for root, module in self.roots.items()
            for path, each in module.named_modules()
            for name in getattr(each, "identical_buffers", ())
        }
        return {name: buffer for name, buffer in self.buffers.items() if name not in alike}

    # ---- the optimizer

    @property
    def lr(self) -> float:
        """The optimizer's present learning rate, 0 where there is nothing to train."""
        return float(self.optimizer.param_groups[0].get("lr", 0)) if self.optimizer else 0.0

    def set_lr_factor(self, lr_factor: float) -> None:
        """Set every group's learning rate to `factor` times the one that it was made with."""
        if self.optimizer is not None:
            for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = rate * lr_factor

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all trained parameters, zeros where no sample gave one."""
        for parameter in self.trainable_parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.trainable_parameters if p.grad is not None]

    # ---- matrices that are products

    def factorizable_weights(self, include_first: bool = False) -> list[str]:
        """Return the names of the weights that learn and may become products: those of linear maps
        and convolutions, heads and the last of the model excepted, and its first unless asked."""
        found = [
            f"{name}.weight"
            for name, module in self.modules().items()
            if is_factorizable(module) and self.parameters[f"{name}.weight"].requires_grad
        ]
        own = [name for name in found if not name.startswith("heads.")]
        begins, ends = self.model_ends
        return own[begins and not include_first : len(own) - ends]

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Return rows and columns of a weight seen as a matrix."""
        own = self.low_rank_weights.get(name)
        shape = self.parameters[name].shape if own is None else own.shape
        return shape[0], shape[1:].numel()

    def factorize(self, name: str, *factors: Tensor) -> LowRankWeight:
        """Put a product in the place of a weight, or of another; `reform` must follow.

        Its factors are `sides`, from left to right; see `Factors`.
        """
        if name in self.low_rank_weights:
            self.low_rank_weights[name].set_factors(*factors)
        else:
            module = self.modules()[name.removesuffix(".weight")]
            self.low_rank_weights[name] = LowRankWeight(module, *factors)
        self._collect_parameters()
        return self.low_rank_weights[name]

    def merge_factors(self, name: str) -> None:
        """Put a weight, the product, in the place of its factors; `reform` must follow."""
        self.low_rank_weights.pop(name).merge()
        self._collect_parameters()

    def rebuild_optimizer(self, optimizer_state: Mapping[str, Tensor]) -> None:
        """Let the optimizer move what learns now, with this state."""
        self._build_optimizer()
        self.parametrisation_version += 1
        self.load_optimizer_state(optimizer_state)

    # ---- state

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers under their global names, detached, not copied."""
        return {name: t.detach() for name, t in {**self.parameters, **self.buffers}.items()}

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return what of them is trained, likewise, in the order of `trained`."""
        return {name: p.detach() for name, p in self.parameters.items() if p.requires_grad}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers, products in the place of factors; detached."""
        own = {
            name: t
            for name, t in self.tensors().items()
            if matrix_name(name) not in self.low_rank_weights
        }
        return own | {n: f.product().detach() for n, f in self.low_rank_weights.items()}

    def name_gradients(self, gradients: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return one tensor for each of `values` under their names, such as `gradients()`."""
        return dict(zip(self.trainable_tensors(), gradients, strict=True))

    @contextmanager
    def swap_tensors(self, replacements: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold the tensors of `view` instead of its own ones while the body runs."""
        own = {n: t for n, t in {**self.parameters, **self.buffers}.items() if n in replacements}
        kept = [(tensor, tensor.data) for tensor in own.values()]
        for name, tensor in own.items():
            tensor.data = replacements[name]
        for name, product in self.low_rank_weights.items():
            product.show(replacements[name])
        try:
            yield
        finally:
            for tensor, data in kept:
                tensor.data = data
            for product in self.low_rank_weights.values():
                product.show()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state as ``<parameter>/<key>``: tensors, scalars as 0-dim."""
        if self.optimizer is None:
            return {}
        return {
            f"{name}/{entry}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for entry, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }

    def load_optimizer_state(self, optimizer_state: Mapping[str, Tensor]) -> None:
        """Restore the optimizer's state from what `memory()` once returned."""
        if self.optimizer is None:
            return
        place = {
            id(parameter): number for number, parameter in enumerate(self.trainable_parameters)
        }
        state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in optimizer_state.items():
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


def matrix_name(name: str) -> str:
    """Return the name of the matrix that a factor is of, other names as they are."""
    root, _, side = name.rpartition(".")
    return root if root.endswith(".weight") and side in FACTOR_NAMES[3] else name
