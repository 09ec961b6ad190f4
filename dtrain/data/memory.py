"""Memory: may a split be held by every rank that reads it?

Invariant: the answer decides only how fast samples are read, never which.
"""

from __future__ import annotations

import os
from pathlib import Path

SHARE = 1 / 8
MOST_BYTES = 4 * 2**30


def fits(size_bytes: int) -> bool:
    """Say whether `size_bytes` are at most an eighth of the available memory, and at most 4 GiB.

    An eighth, since several ranks on a host each hold their own copy; 4 GiB, since batch systems
    grant a job less than the host shows.
    """
    return size_bytes <= min(SHARE * available_bytes(), MOST_BYTES)


def available_bytes() -> int:
    """Return the memory that new data can have, by the kernel's estimate; else all there is."""
    table = Path("/proc/meminfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
