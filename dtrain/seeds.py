"""Random numbers that depend on names and counts, never on the layout.

Invariant: the same key gives the same numbers on every rank, machine and number of ranks, and
torch's process-wide generator is left as it was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def key(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all `parts` and is the same in every process."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Run the body with torch's CPU generator seeded by `parts`; restore its state afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(key(*parts))
    try:
        yield
    finally:
        torch.set_rng_state(state)
