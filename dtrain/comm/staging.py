"""Staging: how tensors reach memory that a backend can read or write, which is on the host.

Invariant: a tensor from `to_host` is dense, contiguous and on the host, and has the bits that a
user of the original sees. A tensor that cannot be staged is refused before anything is sent.

    rank on a CPU             tensor -- (a copy, if strided) --> send --> aligned memory = tensor
    rank on an accelerator    tensor --> pinned memory --------> send --> pinned memory --> tensor
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from dtrain.comm.buffers import aligned_empty, describe_tensor

Message = Tensor | tuple[Tensor, ...]
"""One tensor, or several that are sent and received as one message."""


Allocator = Callable[[Sequence[int], torch.dtype], Tensor]
"""Returns uninitialised memory on the host, of a shape and dtype."""


class Staging(ABC):
    """Copies tensors of one rank to and from memory that a backend can use."""

    @abstractmethod
    def to_host(self, tensor: Tensor) -> Tensor:
        """Return the tensor's content, contiguous and on the host: a view if it already is."""

    @abstractmethod
    def recv_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory on the host that can receive a message."""

    @abstractmethod
    def to_device(self, buffer: Tensor) -> Tensor:
        """Return the content of a receive buffer on the device of this rank; the caller owns it."""


@final
class Host(Staging):
    """Staging of a rank that computes on the CPU."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a view of the tensor, or a copy if it is strided."""
        if tensor.device.type != "cpu":
            raise TypeError(
                f"a tensor on {tensor.device}, {describe_tensor(tensor)}: this rank computes on "
                f"the CPU; move the tensor there, or call `Comm.set_device`"
            )
        return tensor.detach().resolve_conj().resolve_neg().contiguous()

    def recv_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory that starts on a 64-byte boundary."""
        return aligned_empty(shape, dtype)

    def to_device(self, buffer: Tensor) -> Tensor:
        """Return the buffer itself."""
        return buffer


@final
class Pinned(Staging):
    """Staging of a rank that computes on an accelerator; tensors on the CPU pass as in `Host`.

    Every copy waits for the device's current stream, so that the backend never reads memory that
    is still being written. Untested on hardware.

    Parameters
    ----------
    device : torch.device
        Device of this rank, with its index (`cuda:0`).
    allocate : Allocator, optional
        Default: `pinned_empty`.
    """

    def __init__(self, device: torch.device, allocate: Allocator | None = None) -> None:
        if device.type != "cpu" and device.index is None:
            raise ValueError(f"device '{device}' has no index: use '{device}:0'")
        self.device = device
        self._allocate = allocate or pinned_empty
        self._host = Host()

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a copy in staging memory."""
        if tensor.device != self.device:
            return self._host.to_host(tensor)
        return self._allocate(tensor.shape, tensor.dtype).copy_(tensor.detach())

    def recv_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return staging memory."""
        return self._allocate(shape, dtype)

    def to_device(self, buffer: Tensor) -> Tensor:
        """Return a copy on the device."""
        return torch.empty_like(buffer, device=self.device, pin_memory=False).copy_(buffer)


def pinned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return page-locked memory if CUDA is available: a device copies from it at full speed."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=torch.cuda.is_available())


def copy_back(tensor: Tensor, buffer: Tensor) -> None:
    """Copy a received `to_host` buffer back into its tensor, unless it is the same memory."""
    if buffer.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(buffer.view(tensor.shape))


def require_dense(tensor: Tensor, operation: str, number: int = 0) -> None:
    """Refuse tensors without dense memory: sparse, quantised, nested, meta.

    Raises
    ------
    TypeError
        The message names the operation, the number of the tensor and its kind.
    """
    if tensor.layout == torch.strided and not (
        tensor.is_meta or tensor.is_quantized or tensor.is_nested
    ):
        return
    if tensor.is_meta:
        kind, advice = "meta", "it has no content"
    elif tensor.is_quantized:
        kind, advice = "quantised", "dequantise it first"
    elif tensor.is_nested:
        kind, advice = "nested", "send its parts as a tuple"
    else:
        kind = str(tensor.layout).removeprefix("torch.")
        advice = "make it dense first (`to_dense`)"
    shape = "nested" if tensor.is_nested else describe_tensor(tensor)
    raise TypeError(f"{operation} of a {kind} tensor (tensor {number}, {shape}): {advice}")


def require_disjoint(tensors: Sequence[Tensor], operation: str) -> None:
    """Refuse tensors to be overwritten in which elements, or two tensors, share memory.

    Raises
    ------
    ValueError
        The message names the operation and the tensors.
    """
    for number, tensor in enumerate(tensors):
        if not tensor.is_contiguous() and _overlaps_itself(tensor):
            raise ValueError(
                f"{operation} in place of tensor {number}, shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}: its elements share memory (`expand`?); pass a `clone`"
            )
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, number)
        for number, tensor in enumerate(tensors)
        if tensor.is_contiguous() and tensor.numel()
    )
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end and tensors[first].device == tensors[second].device:
            raise ValueError(
                f"{operation} in place of tensors {first} and {second}, which share memory: pass "
                "only one of them"
            )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether elements may share memory: a stride is within the span of smaller ones."""
    if not tensor.numel():
        return False
    extent = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= extent:
                return True
            extent += stride * (size - 1)
    return False
