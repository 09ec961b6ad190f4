"""Random numbers that depend on names and counts, never on the layout.

Invariant: the same key gives the same numbers on every rank, machine and number of ranks, and
torch's process-wide generator is left as it was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all `parts` and is the same in every process."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(*parts: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Run the body with torch's generators seeded by `parts`; restore their states afterwards.

    The CPU's generator, and that of `device` where it is an accelerator (untested on hardware).
    """
    far = device if device is not None and device.type == "cuda" else None
    state = torch.get_rng_state()
    held = None if far is None else torch.cuda.get_rng_state(far)
    torch.default_generator.manual_seed(derive_seed(*parts))
    if far is not None:
        torch.cuda.default_generators[far.index].manual_seed(derive_seed(*parts))
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if far is not None and held is not None:
            torch.cuda.set_rng_state(held, far)
