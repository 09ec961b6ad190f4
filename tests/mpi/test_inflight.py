"""All-reduces in flight at the end of every update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.comm.communicator import Comm
from dtrain.syncs.never import Never
from dtrain.training import train
from tests import tiny
from tests.outcome import summary
from tests.system.user import inflight


@pytest.mark.mpi(min_size=4)
def test_checkpoints_evaluation_and_the_end_have_nothing_in_flight(
    comm: Comm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`finish_pending` completes it, with and without debug mode."""
    monkeypatch.setattr(Never, "after_update", inflight.start_mean)
    monkeypatch.setattr(Never, "finish_pending", inflight.complete_means)
    out = Path(comm.allgather_object(str(tmp_path / "out"))[0])
    for debug, epochs in ((False, 1), (True, 3)):
        run = tiny.run(mesh__stages=2, sync__name="never", epochs=epochs)
        train(replace(run, settings=replace(run.settings, debug=debug)), comm, out)
        comm.allgather_object(None)  # the summary is written
        assert summary(out)["updates"] == 4 * epochs
        assert inflight.IN_FLIGHT == []
