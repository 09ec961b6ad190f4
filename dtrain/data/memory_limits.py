"""Memory that this process may use for samples."""

from __future__ import annotations

import os
from pathlib import Path

MEMORY_FRACTION = 1 / 8


MAX_BYTES = 4 * 2**30


def fits_in_memory(size_bytes: int) -> bool:
    """Return whether `size_bytes` are at most an eighth of the available memory and 4 GiB.

    An eighth, because each rank of a host holds a copy of its own. At most 4 GiB, because batch
    systems may grant a job less memory than the host reports as available.
    """
    return size_bytes <= min(MEMORY_FRACTION * available_bytes(), MAX_BYTES)


def available_bytes() -> int:
    """Return the kernel's estimate of the available memory; without one, the host's memory."""
    table = Path("/proc/meminfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
