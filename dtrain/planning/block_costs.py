"""What any block of consecutive layers costs, its objective's helper included: analytic counts.

Invariant: pure in the layers' specs and the objective, the same on every machine. What a helper
costs depends on its task alone, so equal ones are counted once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import nn

from dtrain.models.layers import LayerStack
from dtrain.models.shape_inference import LayerSpec, profile_module
from dtrain.objectives.base import GRADIENT, Objective
from dtrain.objectives.block_spec import BlockSpec, DownstreamLayer


class BlockCosts:
    """Costs of blocks of the layers ``i .. j-1``, for one sample.

    Parameters
    ----------
    specs : tuple of Spec
        The model's layers.
    objective : Objective
        Whose helpers and feedback are counted.
    model : Model
        Whose layers they are.
    about : Task
        What is the same for all blocks: classes, and what is known of the data.
    seed : int
        Of the layers that an objective makes anew.
    """

    def __init__(
        self,
        layer_specs: tuple[LayerSpec, ...],
        objective: Objective,
        model: LayerStack,
        data_spec: BlockSpec,
        seed: int = 0,
    ) -> None:
        self.layer_specs, self.objective, self.model, self.data_spec = (
            layer_specs,
            objective,
            model,
            data_spec,
        )
        self.seed = seed
        totals = (
            spec.forward_macs + spec.weight_gradient_macs + spec.input_gradient_macs
            for spec in layer_specs
        )
        self._mac_sums = [0, *accumulate(totals)]
        self._parameter_sums = [0, *accumulate(spec.parameters for spec in layer_specs)]
        self._head_specs: dict[BlockSpec, LayerSpec | None] = {}
        self._sends_gradients = any(r.name == GRADIENT for r in objective.routes(2, "train"))

    def flops(self, i: int, j: int) -> int:
        """Return multiply-adds, forward and backward, of a block that is still being balanced."""
        task = self._provisional_spec(j)
        return self.layer_macs(i, j) * self.objective.forward_passes(task) + total_macs(
            self.head_spec(task)
        )

    def parameters(self, i: int, j: int) -> int:
        """Return elements of the layers' and the helper's parameters, likewise."""
        helper = self.head_spec(self._provisional_spec(j))
        return self.layer_parameters(i, j) + (helper.parameters if helper else 0)

    def layer_macs(self, i: int, j: int) -> int:
        """Return multiply-adds, forward and backward, of the layers alone."""
        asked = self._sends_gradients and i > 0
        return self._mac_sums[j] - self._mac_sums[i] - (0 if asked else self._skippable_macs(i, j))

    def layer_parameters(self, i: int, j: int) -> int:
        """Return elements of the layers' parameters."""
        return self._parameter_sums[j] - self._parameter_sums[i]

    def block_spec(self, block: int, blocks: int, i: int, j: int) -> BlockSpec:
        """Return the task of a block of the layers ``i .. j-1``; the next block is one layer."""
        first, last = self.layer_specs[i], self.layer_specs[j - 1]
        above = self.layer_specs[j].output_shape if j < len(self.layer_specs) else ()
        return replace(
            self.data_spec,
            index=block,
            blocks=blocks,
            input_shape=first.input_shape,
            output_shape=last.output_shape,
            dtype=last.dtype,
            next_output_shape=above,
            feature_shape=last.input_shape,
            last_layer=self._downstream_layers(j - 1)[0]
            if self.objective.needs_downstream_layers
            else None,
            downstream_layers=self._downstream_layers(j)
            if self.objective.needs_downstream_layers
            else (),
        )

    def _downstream_layers(self, j: int) -> tuple[DownstreamLayer, ...]:
        """Return the layers from j on, as an objective may make them anew."""
        layers = enumerate(self.layer_specs[j:], start=j)
        dtype = self.layer_specs[0].dtype
        return tuple(
            DownstreamLayer(
                spec.name,
                spec.output_shape,
                spec.parameters,
                partial(self.model.rebuild_layer, i, self.seed, dtype),
            )
            for i, spec in layers
        )

    def _skippable_macs(self, i: int, j: int) -> int:
        """Return what autograd saves where nobody asks for the gradient of the block's input.

        It starts at the first layer that has parameters, with their gradients alone.
        """
        saved = 0
        for spec in self.layer_specs[i:j]:
            saved += spec.skippable_macs
            if spec.parameters:
                break
        return saved

    def _provisional_spec(self, j: int) -> BlockSpec:
        """Return a task that ends before layer j, for a helper that cuts are balanced with."""
        return self.block_spec(1 if j == len(self.layer_specs) else 0, 2, 0, j)

    def head_spec(self, block_spec: BlockSpec) -> LayerSpec | None:
        """Return the spec of a block's helper, without memory; None where there is none."""
        if block_spec not in self._head_specs:
            self._head_specs[block_spec] = self._profile_head(block_spec)
        return self._head_specs[block_spec]

    def _profile_head(self, block_spec: BlockSpec) -> LayerSpec | None:
        with torch.device("meta"):
            helper: nn.Module | None = self.objective.build_head(block_spec)
        if helper is None:
            return None
        shape, name = self.objective.head_input_shape(block_spec), f"heads.{block_spec.index}"
        if shape is not None:
            return profile_module(helper.to(block_spec.dtype), shape, block_spec.dtype, name)
        elements = sum(each.numel() for each in helper.parameters())
        norms = nn.modules.batchnorm._BatchNorm
        couples = any(isinstance(each, norms) for each in helper.modules())
        return LayerSpec(name, (), (), block_spec.dtype, 0, 0, 0, elements, couples)


def total_macs(spec: LayerSpec | None) -> int:
    """Return a module's multiply-adds, forward and whole backward; 0 where there is none."""
    return (
        0
        if spec is None
        else spec.forward_macs + spec.weight_gradient_macs + spec.input_gradient_macs
    )
