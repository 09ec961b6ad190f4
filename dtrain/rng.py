"""Random numbers that depend on names and counts, never on the layout.

Invariant: the same parts give the same numbers on every rank and machine, with any number of ranks,
and the state of torch's global generators is restored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all `parts` and is the same in every process."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(*parts: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Run the body with torch's generators seeded by `parts`; restore their states afterwards.

    This seeds the generator of the CPU, and of `device` if that is a CUDA device (untested on
    hardware).
    """
    cuda = device if device is not None and device.type == "cuda" else None
    cpu_state = torch.get_rng_state()
    cuda_state = None if cuda is None else torch.cuda.get_rng_state(cuda)
    torch.default_generator.manual_seed(derive_seed(*parts))
    if cuda is not None:
        torch.cuda.default_generators[cuda.index].manual_seed(derive_seed(*parts))
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if cuda is not None and cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, cuda)


@contextmanager
def fixed_random_numbers(number: int) -> Iterator[Callable[[], bool]]:
    """Run the body with the global generators of torch, numpy and Python seeded by a number.

    Their states are restored afterwards. Yields a function that says whether any has been used.
    """
    states = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    torch.default_generator.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    start = generator_states()
    try:
        yield lambda: generator_states() != start
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def generator_states() -> tuple[bytes, bytes, object]:
    """Return the states of the global generators of torch, numpy and Python, to compare them."""
    numpy_state = np.random.get_state(legacy=False)["state"]
    numpy_bytes = numpy_state["key"].tobytes() + bytes(str(numpy_state["pos"]), "ascii")
    return torch.get_rng_state().numpy().tobytes(), numpy_bytes, random.getstate()
