"""Compute with one torch thread in test modules that compute little.

Several threads sum convolutions in another order and wait for each other longer than small networks
compute. OpenMP also starts a new team for each rank that is a thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the runs do."""
    import torch  # pytest loads the conftests of all processes, those that run no test too

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
