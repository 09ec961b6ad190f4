"""Dock: where tensors meet the wire, which reads and writes memory of the host alone.

Invariant: what a dock hands to the wire is dense, contiguous, on the host, and has the bits that a
user of the tensor sees; whatever cannot be that is refused in words before anything is sent.

    rank on a CPU             tensor -- (a copy, if strided) --> wire --> aligned memory = tensor
    rank on an accelerator    tensor --> pinned memory --------> wire --> pinned memory --> tensor
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
"""What is sent and received as one."""


Allocator = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes uninitialised memory on the host."""


class Staging(ABC):
    """How tensors of one rank reach memory that a wire can read, and come from there."""

    @abstractmethod
    def to_host(self, tensor: Tensor) -> Tensor:
        """Return its content, contiguous and on the host: the same memory where it is that."""

    @abstractmethod
    def recv_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory on the host into which a message may come."""

    @abstractmethod
    def to_device(self, buffer: Tensor) -> Tensor:
        """Return what has come, where this rank computes; it is the caller's."""


@final
class Host(Staging):
    """A rank that computes on the host."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself, or a copy where it is strided."""
        if tensor.device.type != "cpu":
            raise TypeError(
                f"a tensor on {tensor.device}, {describe_tensor(tensor)}: this rank computes on the CPU; "
                f"move the tensor there, or give the Comm its device with `onto`"
            )
        return tensor.detach().resolve_conj().resolve_neg().contiguous()

    def recv_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory that starts on a 64-byte boundary."""
        return aligned_empty(shape, dtype)

    def to_device(self, buffer: Tensor) -> Tensor:
        """Return the memory itself."""
        return buffer


@final
class Pinned(Staging):
    """A rank that computes on an accelerator; tensors on the CPU pass as on `Host`.

    Every copy waits for the device's current stream, so that the wire never reads memory that is
    still being written. Untested on hardware.

    Parameters
    ----------
    device : torch.device
        Where this rank computes, with its index (`cuda:0`).
    empty : callable, optional
        Makes staging memory of a shape and dtype; default: pinned where CUDA is.
    """

    def __init__(self, device: torch.device, allocate: Allocator | None = None) -> None:
        if device.type != "cpu" and device.index is None:
            raise ValueError(f"device '{device}' names no device of its kind: say '{device}:0'")
        self.device = device
        self._allocate = allocate or pinned_empty
        self._host = Host()

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a copy in staging memory."""
        if tensor.device != self.device:
            return self._host.to_host(tensor)
        copy = self._allocate(tensor.shape, tensor.dtype)
        return copy.copy_(tensor.detach())

    def recv_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return staging memory."""
        return self._allocate(shape, dtype)

    def to_device(self, buffer: Tensor) -> Tensor:
        """Return a copy on the device."""
        return torch.empty_like(buffer, device=self.device, pin_memory=False).copy_(buffer)


def pinned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return page-locked memory, which a CUDA device copies from at full speed."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=torch.cuda.is_available())


def copy_back(tensor: Tensor, buffer: Tensor) -> None:
    """Put what `lower` gave and the wire has changed back into its tensor."""
    if buffer.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(buffer.view(tensor.shape))


def require_dense(tensor: Tensor, operation: str, number: int = 0) -> None:
    """Refuse tensors that have no plain memory: sparse, quantised, nested, meta.

    Raises
    ------
    TypeError
        Names the verb, the tensor's place among its arguments, and what it is.
    """
    if tensor.layout == torch.strided and not (
        tensor.is_meta or tensor.is_quantized or tensor.is_nested
    ):
        return
    if tensor.is_meta:
        what, advice = "meta", "it has no content"
    elif tensor.is_quantized:
        what, advice = "quantised", "dequantise it first"
    elif tensor.is_nested:
        what, advice = "nested", "send its parts as a tuple"
    else:
        what = str(tensor.layout).removeprefix("torch.")
        advice = "make it dense first (`to_dense`)"
    shape = "nested" if tensor.is_nested else describe_tensor(tensor)
    raise TypeError(f"{operation} of a {what} tensor (tensor {number}, {shape}): {advice}")


def require_disjoint(tensors: Sequence[Tensor], operation: str) -> None:
    """Refuse to write in place to memory in which elements, or tensors, lie over each other.

    Raises
    ------
    ValueError
        Names the verb and the tensors.
    """
    for number, tensor in enumerate(tensors):
        if not tensor.is_contiguous() and _overlaps_itself(tensor):
            raise ValueError(
                f"{operation} in place of tensor {number}, shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}: its elements share memory (`expand`?); give a `clone`"
            )
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, number)
        for number, tensor in enumerate(tensors)
        if tensor.is_contiguous() and tensor.numel()
    )
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end and tensors[first].device == tensors[second].device:
            raise ValueError(
                f"{operation} in place of tensors {first} and {second}, which share memory: name one"
            )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether elements may share memory: a stride does not step over what is inside it."""
    reach = 0
    if not tensor.numel():
        return False
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
