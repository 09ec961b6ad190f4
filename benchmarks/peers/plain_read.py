"""Peer: read a file from its start to its end, 1 MB at a time. Prints `read_s` as JSON.

python plain_read.py FILE
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    """Measure and print."""
    buffer = bytearray(2**20)
    descriptor = os.open(sys.argv[1], os.O_RDONLY)
    start = time.perf_counter()
    while os.readv(descriptor, [buffer]):
        pass
    print(json.dumps({"read_s": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
