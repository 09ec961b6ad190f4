"""Where a rank computes, the CPU or its own accelerator of this host, and with what memory.

Invariant: ranks of one host take its accelerators in turn, so that none is left over while another
is shared. No accelerator has confirmed this yet: see `docs/comm.md`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from dtrain.errors import ConfigError


def select_device(device: str, rank: int, hosts: Sequence[str]) -> torch.device:
    """Return the device of `rank`: number = position among the ranks of its host, modulo devices.

    Parameters
    ----------
    asked : "auto", "cpu" or "cuda"
        "auto" is CUDA where torch sees a device, else the CPU.
    hosts : sequence of str
        Host of each rank.

    Raises
    ------
    DtrainError
        "cuda" where torch sees none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not count:
        raise ConfigError(
            "todo.key",
            f'device = "cuda", but torch {torch.__version__} sees no CUDA device on {hosts[rank]}: '
            'set device = "auto", or install a torch that fits the driver',
        )
    if device == "cpu" or not count:
        return torch.device("cpu")
    near = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    return torch.device("cuda", near.index(rank) % count)


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Of `mallopt` in glibc."""


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for this process; return whether it could be told.

    Gradients are made anew in every update. glibc would give blocks of megabytes back to the
    kernel in between and take a page fault for every 4 KiB of them: some 3,000 in an update of 4 M
    weights, 4 to 6 % of its time. The price is that what was used once stays with the process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    largest = 4 * 1024 * 1024 * ctypes.sizeof(ctypes.c_long)  # what glibc accepts at most
    return bool(mallopt(MMAP_THRESHOLD, largest) and mallopt(TRIM_THRESHOLD, 2**30))
