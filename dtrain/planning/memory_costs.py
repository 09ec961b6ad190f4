"""MemoryCosts: planned bytes of any block of consecutive layers, fast enough to compare all cuts.

An approximation of `block_memory`, which runs a block on fake tensors: here every layer and every
head is measured once by itself, and a block is the sum.

::

    bytes(i, j) = parameters, gradients, optimizer state of layers i .. j-1 and of the head
                + rows x (input of layer i + activations of layers i .. j-1 + output + head)

Invariant: one micro-batch is live, with the rows that it has on one replica. So the costs depend on
the run alone, and not on the number of ranks, the schedule or the places.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import accumulate
from typing import final

import torch
from torch import nn

from dtrain.block.optimizer import NamedParameter, OptimizerSettings
from dtrain.config.run import RunConfig
from dtrain.planning.block_costs import BlockCosts, build_meta_head
from dtrain.planning.block_memory import optimizer_bytes
from dtrain.planning.layer_list import activation_bytes, output_bytes, unkept_output_bytes
from dtrain.planning.lazy_modules import is_lazy

TRAINED_COPIES = 4
"""Copies of a parameter's bytes where its module cannot be made: itself, its gradient and two
moments."""


@final
class MemoryCosts:
    """Bytes of a block of layers ``i .. j-1``.

    Parameters
    ----------
    run : RunConfig
        Decides the optimizer and the rows of a micro-batch.
    block_costs : BlockCosts
        The layers and their heads.
    """

    def __init__(self, run: RunConfig, block_costs: BlockCosts) -> None:
        settings, profiles = run.settings, block_costs.layer_specs
        samples = min(settings.batch_size, block_costs.data_spec.train_samples)
        self.rows = max(1, -(-samples // settings.micro_batches))
        self.block_costs = block_costs
        self.optimizer = run.optimizer_settings()
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        layers = block_costs.model.meta_layers(self._dtype)
        fixed = [
            self._fixed_bytes(modules, profile.parameters)
            for modules, profile in zip(layers, profiles, strict=True)
        ]
        self._fixed_sums = [0, *accumulate(fixed)]
        self._kept_sums = [0, *accumulate(activation_bytes(profiles))]
        self._unkept = unkept_output_bytes(profiles)
        input_dtype = block_costs.data_spec.sample_dtype(self._dtype)
        first = math.prod(profiles[0].input_shape) * input_dtype.itemsize
        self._inputs = [first, *map(output_bytes, profiles[:-1])]
        self._head_bytes = cache(self._measure_head)

    def __call__(self, i: int, j: int) -> int:
        """Return the bytes of the block."""
        fixed = self._fixed_sums[j] - self._fixed_sums[i]
        kept = self._kept_sums[j] - self._kept_sums[i] + self._inputs[i] + self._unkept[j - 1]
        passes, head = self._head_bytes(j)
        return fixed + self.rows * kept * passes + head

    def _measure_head(self, j: int) -> tuple[int, int]:
        """Return forward passes and the head's bytes of a block that ends before layer j."""
        spec, profile = self.block_costs.provisional_head(j)
        passes = self.block_costs.objective.forward_passes(spec)
        if profile is None:
            return passes, 0
        head = build_meta_head(self.block_costs.objective, spec)
        modules = {} if head is None else {profile.name: head}
        live = profile.saved.inner + output_bytes(profile)
        return passes, self._fixed_bytes(modules, profile.parameters) + self.rows * live

    def _fixed_bytes(self, modules: Mapping[str, nn.Module] | None, parameters: int) -> int:
        """Return bytes of parameters, buffers, gradients and optimizer state of modules."""
        if modules is None or is_lazy(modules.values()):
            return TRAINED_COPIES * parameters * self._dtype.itemsize
        return module_bytes(modules, self.optimizer)


def module_bytes(modules: Mapping[str, nn.Module], optimizer: OptimizerSettings) -> int:
    """Return bytes of parameters, buffers, gradients and optimizer state of modules by name."""
    tensors = [t for m in modules.values() for t in (*m.parameters(), *m.buffers())]
    trained = list(_named_parameters(modules))
    gradients = sum(named.parameter.nbytes for named in trained)
    return sum(t.nbytes for t in tensors) + gradients + optimizer_bytes(optimizer, trained)


def _named_parameters(modules: Mapping[str, nn.Module]) -> Iterable[NamedParameter]:
    """Yield the trained parameters of modules by name."""
    for root, module in modules.items():
        for path, owner in module.named_modules(prefix=root):
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield NamedParameter(f"{path}.{name}", parameter, type(owner).__name__)
