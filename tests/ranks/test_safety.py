"""The debug mode over whole runs: what is trained stays the same, and a planted fault is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.block.block import Block
from dtrain.comm.backends import threads
from dtrain.comm.backends.base import Bytes, Request
from dtrain.comm.call_order import Call, CollectiveMismatch
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.errors import DtrainError, NumericalError
from dtrain.syncs import SYNCS
from dtrain.syncs.base import Sync, UpdateClock
from dtrain.syncs.every_step import EveryStep
from dtrain.syncs.local_sgd import LocalSGD
from dtrain.syncs.replica_check import check_replicas_equal, checksum
from tests import tiny
from tests.ranks.test_laws import trained

UPDATE = 5
"""After which a weight is moved, of the 8 of a run."""


@pytest.fixture
def rolls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What each comparison of replicas was of, while a test runs."""
    seen: list[object] = []

    def counted(block: Block, replicas: Comm, update: int) -> None:
        if replicas.context.debug_mode:
            seen.append((block.index, update))
        check_replicas_equal(block, replicas, update)

    monkeypatch.setattr("dtrain.engine.update.check_replicas_equal", counted)
    return seen


@pytest.mark.parametrize("sync", SYNCS)
def test_the_digest_is_that_of_a_run_without(
    sync: str, tmp_path: Path, rolls: list[object]
) -> None:
    """Two stages of two replicas, with batch sizes that leave one of them less to do."""
    digests = []
    for debug in (False, True):
        assert not rolls
        run = tiny.run(sync={"name": sync}, mesh__stages=2, debug=debug)
        summary = trained(run, tmp_path / str(debug), 2, 2, seed=debug)
        digests.append((summary["digest"], summary["bytes_intra_node"]))
    assert digests[0] == digests[1]
    assert sync != "every-step" or len(rolls) == 3 * 2 * 8, "blocks x replicas x updates"


def test_one_replica_compares_nothing(tmp_path: Path) -> None:
    plain = trained(tiny.run(), tmp_path / "plain")
    assert trained(tiny.run(debug=True), tmp_path / "debug")["digest"] == plain["digest"]


def test_it_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    trained(tiny.run(epochs=1), tmp_path / "out", 1, 2)
    on = trained(tiny.run(epochs=2, debug=True), tmp_path / "out", 1, 2)
    assert on["digest"] == trained(tiny.run(epochs=2), tmp_path / "straight", 1, 2)["digest"]
    assert on["attempts"] == 2


def planted(kind: type[Sync], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last replica of the block that has a parameter move it after one update."""
    after: Callable[[Any, UpdateClock], None] = kind.after_update

    def moved(self: Sync, clock: UpdateClock) -> None:
        after(self, clock)
        last = self.replicas.rank == self.replicas.size - 1
        if last and clock.update == UPDATE and name in self.block.parameters:
            with torch.no_grad():
                self.block.parameters[name].view(-1)[-1] += 1e-9

    monkeypatch.setattr(kind, "after_update", moved)


SYNCED = {"every-step": EveryStep, "local-sgd": LocalSGD}


@pytest.mark.parametrize(("name", "block"), [("fc2.weight", 1), ("heads.0.1.weight", 0)])
@pytest.mark.parametrize("sync", SYNCED)
def test_a_replica_that_strays_is_named_at_once(
    sync: str, name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(SYNCED[sync], name, monkeypatch)
    fields = {"every": UPDATE + 1} if sync == "local-sgd" else {}

    def run(debug: bool) -> RunConfig:
        return tiny.run(sync={"name": sync, **fields}, mesh__stages=1, debug=debug)

    with pytest.raises(DtrainError) as caught:
        trained(run(True), tmp_path / "debug", 1, 3)
    told = rf"replica 2 holds another '{name}' than replica 0 after update {UPDATE} (block {block};"
    assert told in caught.value.message
    assert f"| update {UPDATE} | action U{block}" in caught.value.message
    assert caught.value.code == NumericalError.code
    assert trained(run(False), tmp_path / "plain", 1, 3)["status"] == "finished"


def test_a_replica_that_averages_something_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a hang, and not numbers that belong to something else."""

    def wrong(
        self: EveryStep, gradients: list[torch.Tensor], weight: float, clock: UpdateClock
    ) -> None:
        some = gradients[1:] if self.replicas.rank and clock.update == 2 else gradients
        self.replicas.mean_(some, weight)

    monkeypatch.setattr(EveryStep, "gradient_group", lambda *_: None)
    monkeypatch.setattr(EveryStep, "before_update", wrong)
    told = r"rank 1 of replicas .world rank 1. calls mean_ .collective \d+ of replicas. with tensor"
    with pytest.raises(
        CollectiveMismatch, match=told + r" 0 \(13,\) float64, .* 0 \(13, 10\) float64"
    ):
        trained(tiny.run(mesh__stages=1, debug=True), tmp_path, 1, 2)


def test_checksums_see_every_bit() -> None:
    tensor = torch.zeros(3, 5)
    sums = {checksum(tensor), checksum(-tensor), checksum(torch.zeros(3, 6))}
    tensor.view(-1)[7] = 1e-45
    sums |= {checksum(tensor), checksum(tensor.to(torch.bfloat16))}
    assert len(sums) == 5
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous())


def test_without_debug_a_collective_sends_no_more_messages() -> None:
    def sent(debug: bool) -> int:
        counts: list[int] = []

        def work(comm: Comm) -> None:
            push = comm.transport.backend.isend

            def counted(data: Bytes, to: int, tag: int) -> Request:
                counts.append(to)
                return push(data, to, tag)

            comm.transport.backend.isend = counted  # type: ignore[method-assign]
            if debug:
                comm.context.debug()
            comm.allgather_object(None)

        threads.run_ranks(3, work)
        return len(counts)

    assert sent(False) == 2 * 2 + 2 * 2, "two to rank 0, then two down the tree"
    assert sent(True) == sent(False) + 3 * 2 * 2


def test_the_first_difference_is_told() -> None:
    mine = Call(3, "mean_", ["tensor 0 (2,) float32", "tensor 1 (3,) float32"])
    other = mine._replace(tensors=mine.tensors[:1])
    place = "mean_ (collective 3 of g)"
    assert mine.describe_mismatch(other, "g") == (
        f"{place} with {mine.tensors[1]}",
        "it with no tensor 1",
    )
    other = mine._replace(number=4)
    assert mine.describe_mismatch(other, "g") == (place, "mean_ (collective 4 of g)")
