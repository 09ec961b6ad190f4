"""Train until the last rank fails before an update, as if its node was lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.comm.backends.threads import run_ranks
from dtrain.config.run import RunConfig
from dtrain.syncs import SYNCS
from dtrain.syncs.base import UpdateClock
from dtrain.training import train


def killed(run: RunConfig, out: Path, until: int, hosts: Sequence[str]) -> None:
    """Train on one rank per host, up to an update; the run folder stays as it is then."""
    kind = SYNCS[run.sync.name]
    before_update = kind.before_update

    def failing(self: Any, gradients: Any, weight: float, clock: UpdateClock) -> None:
        if clock.update == until and self.replicas.rank == self.replicas.size - 1:
            raise ZeroDivisionError
        before_update(self, gradients, weight, clock)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "before_update", failing)
        patch.setattr("dtrain.session.failure.REPORT_DELAY_S", 0.0)
        with pytest.raises(ZeroDivisionError):
            run_ranks(len(hosts), lambda comm: train(run, comm, out), hosts=hosts)
