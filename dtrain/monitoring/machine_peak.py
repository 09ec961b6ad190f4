"""The measured peak of this process: the speed of a small matrix product.

Invariant: at most `LIMIT_S` seconds after the first product, once per process, device, dtype and
number of threads. It draws no random numbers.
"""

from __future__ import annotations

import statistics
import time
from threading import Lock

import torch

LIMIT_S = 0.06

CPU_SIZE, GPU_SIZE = 384, 4096
"""Rows and columns of the matrices: a product takes milliseconds."""

MAX_PRODUCTS = 30

_LOCK = Lock()
_PEAKS: dict[tuple[str, torch.dtype, int], float] = {}


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a matrix product on a device.

    All ranks of a host should call it at the same time, since they share its memory and its cores.
    """
    key = device.type, dtype, torch.get_num_threads()
    with _LOCK:  # ranks that are threads measure once
        if key not in _PEAKS:
            _PEAKS[key] = _measure(device, dtype)
        return _PEAKS[key]


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device)
    product = torch.empty_like(matrix)
    seconds: list[float] = []
    start = time.perf_counter()
    with torch.no_grad():
        while len(seconds) <= MAX_PRODUCTS and time.perf_counter() - start < LIMIT_S:
            before = time.perf_counter()
            torch.mm(matrix, matrix, out=product)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - before)
    median_s = statistics.median(seconds[1:] or seconds)  # the first one loads the library
    return 2.0 * size**3 / median_s if median_s else 0.0
