"""Conversion of stored numbers to tensors: samples, further inputs and targets.

Invariant: every tensor is new memory, contiguous and aligned as torch aligns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


NUMERIC_KINDS = "biufc"
"""Kinds of numpy dtypes that samples may have: any integers, real and complex numbers."""


def value_range(dtype: Any) -> tuple[float, float] | None:
    """Return the range of `to_float_tensor` for a numpy dtype: 0 ... 1 for bytes, else None."""
    return (0.0, 1.0) if dtype == np.uint8 else None


def to_input_tensor(rows: Array) -> Tensor:
    """Copy a further input to a tensor: integers to int64, bool and real numbers as they are."""
    if rows.dtype.kind == "b":
        return torch.from_numpy(rows.copy())
    return to_int_tensor(rows) if rows.dtype.kind in "iu" else to_float_tensor(rows)


def to_float_tensor(rows: Array) -> Tensor:
    """Copy samples to a tensor of float32 (float64 stays); scale bytes to 0 ... 1.

    Complex numbers stay complex.
    """
    stored = native_dtype(rows.dtype)
    native = rows.astype(stored, copy=False)
    is_kept = stored.kind == "c" or stored == np.float64
    dtype = torch_dtype(stored) if is_kept else torch.float32
    x = torch.from_numpy(native).to(dtype, copy=True, memory_format=torch.contiguous_format)
    return x.div_(255) if rows.dtype == np.uint8 else x


def to_summable(rows: Array) -> Array:
    """Return samples for statistics: integers of at most 16 bits as they are, others as
    `to_float_tensor` has them; copied only where they change."""
    stored = native_dtype(rows.dtype)
    is_small_integer = stored.kind in "iu" and stored.itemsize <= 2
    if is_small_integer or stored.kind == "c" or stored in (np.float32, np.float64):
        return rows.astype(stored, copy=False)
    return to_float_tensor(rows).numpy()


def to_int_tensor(labels: Array) -> Tensor:
    """Copy labels to a tensor of int64."""
    return torch.from_numpy(labels.astype(np.int64))


def to_target_tensor(targets: Array) -> Tensor:
    """Copy targets to a tensor: integers to int64, others to float32 (float64 stays)."""
    return to_float_tensor(targets) if targets.dtype.kind == "f" else to_int_tensor(targets)


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """Return the dtype of torch for a numeric numpy dtype."""
    return torch.from_numpy(np.empty(0, native_dtype(dtype))).dtype


def native_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return a dtype in the byte order of the machine, of at most 64 bits per real number."""
    if dtype.kind == "f" and dtype.itemsize > 8:
        return np.dtype(np.float64)
    if dtype.kind == "c" and dtype.itemsize > 16:
        return np.dtype(np.complex128)
    return dtype.newbyteorder("=")


def target_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """Return the dtype of `to_target_tensor`."""
    return to_target_tensor(np.empty(0, dtype)).dtype


def cast_dtype(dtype: torch.dtype, real: torch.dtype) -> torch.dtype:
    """Return the dtype of numbers in a run whose real numbers have dtype `real`; integers and bool
    stay as they are."""
    if dtype.is_complex:
        return real.to_complex()
    return real if dtype.is_floating_point else dtype


def stores_integers(dtype: torch.dtype) -> bool:
    """Return whether a dtype is one of integers."""
    return not (dtype.is_floating_point or dtype.is_complex)
