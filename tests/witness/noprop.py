"""NoProp: Li, Teh and Pascanu 2025, arXiv 2503.24322 (discrete time, mean squared error).

    train     every block alone:  z = sqrt(a_t) y + sqrt(1 - a_t) noise,   û = f_t(x, z) -> y
    predict   z_0 = 0 -> z_1 = f_1(x, z_0) -> ... -> z_T = scores

It needs blocks fed from the data alone, layers of its own, and noise that no layout changes.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import mse_loss, one_hot

from dtrain.objectives.base import ACTIVATION, Objective, forward_routes, scaled_loss_pair


@dataclass(frozen=True)
class NoProp(Objective):
    """Blocks that denoise a label, each at its own level of noise."""

    default_schedule = "stream"
    hidden: int = 16

    def replacement_layers(self, spec):
        fuse = partial(nn.Linear, *self.block_input_shape(spec), self.hidden)
        return [("fuse", fuse), ("out", partial(nn.Linear, self.hidden, spec.classes))]

    def block_input_shape(self, spec):
        return (math.prod(spec.sample_shape) + spec.classes,)

    def needs_samples(self, spec, mode):
        return True

    def routes(self, blocks, mode):
        return forward_routes(blocks) if mode == "predict" else ()

    def make_input(self, spec, block, micro_batch):
        x = micro_batch.samples.flatten(1)
        z = micro_batch.received.get(ACTIVATION, x.new_zeros(len(x), spec.classes))
        if micro_batch.training:
            clean = spec.index / spec.blocks
            noise = micro_batch.row_random.generate(
                "noise", lambda n, g: torch.randn(n, spec.classes, generator=g, dtype=x.dtype)
            )
            z = clean**0.5 * one_hot(micro_batch.targets, spec.classes) + (1 - clean) ** 0.5 * noise
        return torch.cat([x, z], 1)

    def backward_pairs(self, spec, block, micro_batch):
        loss = mse_loss(
            micro_batch.y, one_hot(micro_batch.targets, spec.classes).to(micro_batch.y.dtype)
        )
        return [scaled_loss_pair(micro_batch, loss)]

    def predict(self, spec, block, micro_batch):
        return micro_batch.y
