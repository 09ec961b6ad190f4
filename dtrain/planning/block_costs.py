"""Analytic costs of any block of consecutive layers, its local head included.

Invariant: costs depend on the layers' specs and the objective alone and are the same on every
machine. Heads of equal structure are measured once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate

import torch
from torch import nn

from dtrain.errors import ConfigError
from dtrain.models.layers import LayerCopy, LayerStack, cast_module
from dtrain.models.shape_inference import LayerProfile, profile_module
from dtrain.objectives.base import Objective, input_gradient_blocks
from dtrain.objectives.block_spec import BlockSpec, DownstreamLayer
from dtrain.planning.structure_cache import StructureCache, module_key
from dtrain.rng import fixed_random_numbers

_PROFILES: StructureCache[LayerProfile] = StructureCache()
"""Specs of heads by structure, input shape and dtype."""


UNFIT_HEADS = (
    "task.head-positions",
    "objective.decoder-shape",
    "objective.decoder-without-layers",
)
"""Keys of the errors of a head that does not fit where a block ends."""


class BlockCosts:
    """Costs of a block of layers ``i .. j-1``, for one sample.

    Parameters
    ----------
    layer_specs : tuple of LayerProfile
        The model's layers.
    objective : Objective
        Decides the head of a block, and whether the gradient of its input is computed.
    model : LayerStack
        The layers themselves, for objectives that copy some of them.
    data_spec : BlockSpec
        Fields that are the same for all blocks: classes, and the shape and number of samples.
    seed : int
        Seed of the layers that an objective copies.
    """

    def __init__(
        self,
        layer_specs: tuple[LayerProfile, ...],
        objective: Objective,
        model: LayerStack,
        data_spec: BlockSpec,
        seed: int = 0,
    ) -> None:
        self.layer_specs = layer_specs
        self.objective = objective
        self.model = model
        self.data_spec = data_spec
        self.seed = seed
        self._mac_sums = [0, *accumulate(map(total_macs, layer_specs))]
        self._parameter_sums = [0, *accumulate(spec.parameters for spec in layer_specs)]
        self._sends_gradients = bool(input_gradient_blocks(objective.routes(2, "train")))
        self.provisional_head: Callable[[int], tuple[BlockSpec, LayerProfile | None]]
        self.provisional_head = cache(self._provisional_head)

    def flops(self, i: int, j: int) -> int:
        """Return multiply-adds, forward and backward, of a block while cuts are being chosen."""
        spec, head = self.provisional_head(j)
        return self.layer_macs(i, j) * self.objective.forward_passes(spec) + total_macs(head)

    def parameters(self, i: int, j: int) -> int:
        """Return parameter elements, the head's included, of a block while cuts are being
        chosen."""
        _, head = self.provisional_head(j)
        return self.layer_parameters(i, j) + (head.parameters if head else 0)

    def layer_macs(self, i: int, j: int) -> int:
        """Return multiply-adds, forward and backward, of the layers alone."""
        needs_input_gradient = self._sends_gradients and i > 0
        skipped = 0 if needs_input_gradient else self._skippable_macs(i, j)
        return self._mac_sums[j] - self._mac_sums[i] - skipped

    def layer_parameters(self, i: int, j: int) -> int:
        """Return parameter elements of the layers alone."""
        return self._parameter_sums[j] - self._parameter_sums[i]

    def block_spec(self, block: int, blocks: int, i: int, j: int) -> BlockSpec:
        """Return the spec of a block of layers ``i .. j-1``; the next block is taken to be one
        layer."""
        first, last = self.layer_specs[i], self.layer_specs[j - 1]
        following = self.layer_specs[j].output_shape if j < len(self.layer_specs) else ()
        needs_later = self.objective.needs_downstream_layers
        copied = self._copied_layers(j - 1, len(self.layer_specs)) if needs_later else ()
        needs_own = self.objective.needs_block_layers or self.objective.needs_layers
        return replace(
            self.data_spec,
            index=block,
            blocks=blocks,
            input_shape=first.input_shape,
            output_shape=last.output_shape,
            dtype=last.dtype,
            next_output_shape=following,
            feature_shape=last.input_shape,
            first_layer=self._copied_layers(0, 1)[0] if self.objective.needs_block_layers else None,
            own_layers=self._copied_layers(i, j) if needs_own else (),
            last_layer=copied[0] if copied else None,
            downstream_layers=copied[1:],
        )

    def _copied_layers(self, i: int, j: int) -> tuple[DownstreamLayer, ...]:
        """Return layers ``i .. j-1``, each with a factory of its copy."""
        layers = enumerate(self.layer_specs[i:j], start=i)
        dtype = self.layer_specs[0].dtype
        return tuple(
            DownstreamLayer(
                spec.name,
                spec.output_shape,
                spec.parameters,
                LayerCopy(self.model, index, self.seed, dtype),
                partial(self.model.rebuild_layer, index, dtype=dtype),
            )
            for index, spec in layers
        )

    def _skippable_macs(self, i: int, j: int) -> int:
        """Return the multiply-adds that autograd skips where no gradient of the block's input is
        needed: those before the first layer with parameters, and that layer's input gradient."""
        skipped = 0
        for spec in self.layer_specs[i:j]:
            skipped += spec.skippable_macs
            if spec.parameters:
                break
        return skipped

    def head_spec(self, block_spec: BlockSpec) -> LayerProfile | None:
        """Return the spec of a block's head, None where it has none."""
        return profile_head(self.objective, block_spec)

    def _provisional_head(self, j: int) -> tuple[BlockSpec, LayerProfile | None]:
        """Return spec and head of a block that ends before layer j, wherever it starts."""
        spec = self.block_spec(1 if j == len(self.layer_specs) else 0, 2, 0, j)
        if self.objective.needs_layers:
            spec = replace(spec, own_layers=spec.own_layers[-1:])
        try:
            return spec, self.head_spec(spec)
        except ConfigError as error:
            if error.key not in UNFIT_HEADS:
                raise
            return spec, None  # a trial: a block may end elsewhere


def build_meta_head(objective: Objective, block_spec: BlockSpec) -> nn.Module | None:
    """Return a block's head on the meta device, None where it has none."""
    with torch.device("meta"):
        head = objective.make_head(block_spec)
    return None if head is None else cast_module(head, block_spec.dtype)


def profile_head(objective: Objective, block_spec: BlockSpec) -> LayerProfile | None:
    """Return the spec of a block's head, None where it has none.

    A head that is not run sample by sample has parameters and no multiply-adds.
    """
    head = build_meta_head(objective, block_spec)
    if head is None:
        return None
    shape, dtype = objective.head_input_shape(block_spec), block_spec.dtype
    name = f"heads.{block_spec.index}"
    if shape is not None:
        structure = module_key(head)
        key = None if structure is None else (structure, tuple(shape), dtype)
        with fixed_random_numbers(0):
            spec = _PROFILES.get(key, lambda: profile_module(head, shape, dtype, name))
        return replace(spec, name=name)
    elements = sum(parameter.numel() for parameter in head.parameters())
    norms = nn.modules.batchnorm._BatchNorm
    couples_samples = any(isinstance(module, norms) for module in head.modules())
    return LayerProfile(name, (), (), dtype, 0, 0, 0, elements, couples_samples)


def total_macs(spec: LayerProfile | None) -> int:
    """Return a module's multiply-adds, forward and whole backward; 0 where there is none."""
    if spec is None:
        return 0
    return spec.forward_macs + spec.weight_gradient_macs + spec.input_gradient_macs
