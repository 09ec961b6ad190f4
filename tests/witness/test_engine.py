"""Awkward orders and an awkward sync, run by the engine: the laws that they must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.schedules import SCHEDULES
from dtrain.train import train
from tests import tiny
from tests.witness.fold import Fold
from tests.witness.interleaved import Interleaved
from tests.witness.split import Split

ORDERS = {"split": Split, "fold": Fold, "interleaved": Interleaved}
NETS = {
    "mlp": {"name": "mlp", "widths": [13, 11, 7, 6]},
    "dropping": {"name": "tests.tiny:dropping"},
    "normalised": {"name": "tests.tiny:normalised"},
    "writing": {"name": "tests.tiny:writing"},
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let run files name the witnesses."""
    for name, kind in ORDERS.items():
        monkeypatch.setitem(SCHEDULES, name, kind)


def trained(out: Path, stages: int = 1, replicas: int = 1, **told: Any) -> dict[str, Any]:
    """Train the tiny run in four blocks by backpropagation on `stages` x `replicas` threads."""
    named = {"partition__blocks": 4, "mesh__stages": stages, "objective__name": "backprop"}

    def work(comm: Comm) -> dict[str, Any]:
        return train(tiny.run(**{**named, **told}), comm, out)

    return ranks(stages * replicas, work, seed=stages)[0]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("schedule", ORDERS)
def test_every_synchronous_order_trains_the_same_bits(
    schedule: str, net: str, tmp_path: Path
) -> None:
    """Chunks on a loop, a V with the loss on the first rank, a backward in two halves."""
    told = {"model": NETS[net]}
    wanted = trained(tmp_path / "1f1b", 2, schedule__name="1f1b", **told)["digest"]
    for stages in (1, 2, 4):
        out = tmp_path / str(stages)
        assert trained(out, stages, schedule__name=schedule, **told)["digest"] == wanted


@pytest.mark.parametrize("objective", ["mono-forward", "backprop"])
@pytest.mark.parametrize("schedule", ["1f1b", "split"])
def test_what_is_computed_again_is_the_same(objective: str, schedule: str, tmp_path: Path) -> None:
    """Activation recomputation changes no bit, not even of batch statistics or dropout."""
    for net in NETS:
        told = {"model": NETS[net], "schedule__name": schedule, "objective__name": objective}
        one = trained(tmp_path / net / "kept", 2, **told)
        two = trained(tmp_path / net / "again", 2, partition__recompute=True, **told)
        some = trained(tmp_path / net / "some", 2, partition__recompute=[1], **told)
        assert one["digest"] == two["digest"] == some["digest"]


@pytest.mark.parametrize("net", ["mlp", "writing", "dropping"])
def test_pipelined_is_the_same_on_any_number_of_ranks(net: str, tmp_path: Path) -> None:
    """Delays count blocks, not ranks: one rank with four blocks is the delay simulator."""
    told = {"schedule__name": "pipelined", "micro_batches": 1, "batch_size": 5, "model": NETS[net]}
    summaries = [trained(tmp_path / str(n), n, **told) for n in (1, 2, 4)]
    assert len({each["digest"] for each in summaries}) == 1
    assert summaries[2]["staleness"] == [6, 4, 2, 0]
