"""WireFormat: tensors between blocks are sent unchanged, or quantised to one byte per number.

Invariant: each sample is quantised by itself, so neither micro-batches nor replicas change a
received tensor. Tensors between two blocks of one rank are quantised too, so no layout changes the
trained weights.

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
from dtrain.comm.int8_codec import dequantize, quantize
from dtrain.schedules.actions import SKIP_PREFIX, Route

Compression = Literal["exact", "int8"]


SCALE_BYTES = 4
"""A row ends with its largest magnitude, a float32."""


@final
@dataclass(frozen=True)
class WireFormat:
    """How tensors between blocks are encoded.

    Attributes
    ----------
    compression : "exact" or "int8"
        "int8" quantises the per-sample floating-point tensors (activations, gradients, errors).
    """

    compression: Compression

    def is_encoded(self, route: Route, spec: TensorSpec) -> bool:
        """Return whether a tensor of a route is quantised; weights, labels and skips are not."""
        shape, dtype = spec
        return (
            self.compression == "int8"
            and not (route.once_per_update or route.name.startswith(SKIP_PREFIX))
            and len(shape) > 1
            and dtype.is_floating_point
        )

    def encoded_spec(self, route: Route, spec: TensorSpec) -> TensorSpec:
        """Return shape and dtype of the tensor that `encode` returns."""
        if not self.is_encoded(route, spec):
            return spec
        rows, *rest = spec[0]
        return (rows, math.prod(rest) + SCALE_BYTES), torch.uint8

    def encode(self, route: Route, tensor: Tensor) -> Tensor:
        """Return the tensor to send: `tensor` itself, or (rows, bytes) uint8."""
        if not self.is_encoded(route, (tuple(tensor.shape), tensor.dtype)):
            return tensor
        rows = tensor.reshape(len(tensor), -1).to(torch.float32)
        scale = rows.abs().amax(1, keepdim=True)
        unit = torch.where(scale > 0, rows / scale, 0)
        codes = quantize(unit.view(-1), "dynamic").view(rows.shape)
        return torch.cat([codes, scale.view(torch.uint8)], 1)

    def decode(self, route: Route, data: Tensor, spec: TensorSpec) -> Tensor:
        """Return the tensor of shape and dtype `spec` that `encode` made `data` from."""
        if not self.is_encoded(route, spec):
            return data
        shape, dtype = spec
        codes = data[:, :-SCALE_BYTES]
        scale = data[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        unit = dequantize(codes.reshape(-1), "dynamic").view(codes.shape)
        return (unit * scale.view(torch.float32)).to(dtype).view(shape)


EXACT = WireFormat("exact")
"""Sends every tensor unchanged."""
