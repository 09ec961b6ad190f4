"""The device of a rank, the CPU or an accelerator of its host, and the memory of its process.

Invariant: the ranks of one host take its accelerators in turn, so none is idle while another is
shared. This has not run on accelerators yet: see `docs/comm.md`.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

from dtrain.errors import ConfigError


def select_device(device: str, local_rank: int, host: str) -> torch.device:
    """Return the device of a rank; its number is the local rank modulo the number of devices.

    Parameters
    ----------
    device : "auto", "cpu" or "cuda"
        "auto" is CUDA where torch sees a device, otherwise the CPU.
    local_rank : int
        Position among the ranks of the host.
    host : str
        Name of the host.

    Raises
    ------
    ConfigError
        "cuda" where torch sees no device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not count:
        raise ConfigError(
            "device.no-cuda",
            f'device = "cuda", but torch {torch.__version__} sees no CUDA device on {host}: '
            'set device = "auto", or install a torch that fits the driver',
        )
    if device == "cpu" or not count:
        return torch.device("cpu")
    return torch.device("cuda", local_rank % count)


MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -3, -1, -8
"""Parameters of `mallopt` in glibc."""


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for this process; return whether it accepted.

    Gradients are allocated anew in every update. By default glibc returns blocks of megabytes to
    the kernel in between, and each 4 KiB of a new block is a page fault: some 3,000 in an update of
    4 M weights, 4 to 6 % of its time. The cost is that the process keeps its peak memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    mallopt(ARENA_MAX, 2)  # each thread that reads would have one of its own and keep its peak
    threshold = 4 * 1024 * 1024 * ctypes.sizeof(ctypes.c_long)  # the largest that glibc accepts
    return bool(mallopt(MMAP_THRESHOLD, threshold) and mallopt(TRIM_THRESHOLD, 2**30))


def release_freed_memory() -> None:
    """Return the memory that is free now to the kernel, although `keep_freed_memory` keeps it.

    For use after work that is done once, as a read of all data: its buffers are not used again.
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
