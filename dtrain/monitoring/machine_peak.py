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
"""Rows and columns of the matrices: a product takes milliseconds. float64 on a GPU has half as
many."""

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
    size = CPU_SIZE
    if device.type == "cuda":
        size = GPU_SIZE // 2 if dtype == torch.float64 else GPU_SIZE
    matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device)
    product = torch.empty_like(matrix)

    def multiply_s() -> float:
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.no_grad():
        multiply_s()  # loads the library
        seconds: list[float] = []
        while len(seconds) < MAX_PRODUCTS and sum(seconds) < LIMIT_S:
            seconds.append(multiply_s())
    median_s = statistics.median(seconds)
    return 2.0 * size**3 / median_s if median_s else 0.0
