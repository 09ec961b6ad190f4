"""One thread for modules of tests that compute little.

Several add up convolutions in another order; threads wait for each other longer than small networks
compute; and OpenMP makes a team anew for each rank that is a thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the runs do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
