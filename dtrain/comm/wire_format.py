"""Parcel: how tensors travel between blocks: as they are, or in a byte per number.

Invariant: a sample is coded by itself, so neither micro-batches nor replicas change what arrives,
and what a block hands to one on the same rank is coded too: no layout changes what is trained.

::

    int8    (rows, ...) float  ->  rows x (a byte per number, the row's largest magnitude) uint8

Source: Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from dtrain.comm.buffers import TensorSpec
from dtrain.comm.quantize import dequantize, quantize
from dtrain.schedules.actions import Route

Compression = Literal["exact", "int8"]


SCALE_BYTES = 4
"""Of a row's largest magnitude, a float32."""


@final
@dataclass(frozen=True)
class WireFormat:
    """What becomes of tensors under way.

    Attributes
    ----------
    wire : "exact" or "int8"
        "int8" codes what the blocks tell each other of samples, where those are real numbers.
    """

    compression: Compression

    def is_encoded(self, route: Route, spec: TensorSpec) -> bool:
        """Say whether what travels on a route is coded; weights and labels are not."""
        shape, dtype = spec
        return (
            self.compression == "int8"
            and not route.once_per_update
            and len(shape) > 1
            and dtype.is_floating_point
        )

    def encoded_spec(self, route: Route, spec: TensorSpec) -> TensorSpec:
        """Return shape and dtype of what is sent in the place of a tensor."""
        if not self.is_encoded(route, spec):
            return spec
        rows, *rest = spec[0]
        return (rows, math.prod(rest) + SCALE_BYTES), torch.uint8

    def encode(self, route: Route, tensor: Tensor) -> Tensor:
        """Return what is sent in the place of a tensor, maybe itself."""
        if not self.is_encoded(route, (tuple(tensor.shape), tensor.dtype)):
            return tensor
        rows = tensor.reshape(len(tensor), -1).to(torch.float32)
        most = rows.abs().amax(1, keepdim=True)
        unit = torch.where(most > 0, rows / most, 0)
        codes = quantize(unit.view(-1), "dynamic").view(rows.shape)
        return torch.cat([codes, most.view(torch.uint8)], 1)

    def decode(self, route: Route, data: Tensor, spec: TensorSpec) -> Tensor:
        """Return the tensor of `spec` that was sent as `data`, maybe itself."""
        if not self.is_encoded(route, spec):
            return data
        shape, dtype = spec
        codes = data[:, :-SCALE_BYTES]
        most = data[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        unit = dequantize(codes.reshape(-1), "dynamic").view(codes.shape)
        return (unit * most.view(torch.float32)).to(dtype).view(shape)


EXACT = WireFormat("exact")
