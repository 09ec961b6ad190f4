"""Fixtures of test modules that compute little: one torch thread, no delay of failed ranks.

Several threads sum convolutions in another order and wait for each other longer than small networks
compute. OpenMP also starts a new team for each rank that is a thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the runs do."""
    import torch  # here, since pytest loads conftests in processes that run no test too

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def no_report_delay() -> Iterator[None]:
    """Skip the delay in which the first error of a job is printed alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dtrain.session.failure.REPORT_DELAY_S", 0.0)
        yield
