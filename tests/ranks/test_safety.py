"""The debug mode over whole runs: it changes no bit, and names a planted fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.block.block import Block
from dtrain.comm.backends.base import Bytes, Request
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.call_order import Call, CollectiveMismatch
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.errors import NumericalError
from dtrain.syncs import SYNCS
from dtrain.syncs.base import Sync, UpdateClock
from dtrain.syncs.every_step import EveryStep
from dtrain.syncs.local_sgd import LocalSGD
from dtrain.syncs.replica_check import bit_sum, check_replicas_equal, checksum
from tests import tiny
from tests.ranks.sync_runs import UPDATES, sync_run, train_on
from tests.refusals import refuses

FAULTY_UPDATE = 5
"""After this update of a run one replica changes a weight."""


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The block and the update of each comparison of replicas while a test runs."""
    recorded: list[tuple[int, int]] = []

    def recording_check(block: Block, replicas: Comm, update: int) -> None:
        if replicas.context.debug_mode:
            recorded.append((block.index, update))
        check_replicas_equal(block, replicas, update)

    monkeypatch.setattr("dtrain.engine.update.check_replicas_equal", recording_check)
    return recorded


@pytest.mark.parametrize("sync", SYNCS)
def test_it_changes_neither_digest_nor_bytes(
    sync: str, tmp_path: Path, checks: list[tuple[int, int]]
) -> None:
    """Two stages of two replicas, with batch sizes that are not divisible by two."""
    results = []
    for debug in (False, True):
        assert not checks
        run = tiny.run(sync={"name": sync}, mesh__stages=2, debug=debug)
        summary = train_on(run, tmp_path / str(debug), "aaaa", seed=int(debug))
        results.append((summary["digest"], summary["bytes_intra_node"]))
    assert results[0] == results[1]
    assert sync != "every-step" or len(checks) == 3 * 2 * UPDATES, "blocks x replicas x updates"


def test_one_replica_compares_nothing(tmp_path: Path) -> None:
    plain = train_on(tiny.run(), tmp_path / "plain", "a")
    assert train_on(tiny.run(debug=True), tmp_path / "debug", "a")["digest"] == plain["digest"]


def test_a_resumed_run_may_switch_it_on(tmp_path: Path) -> None:
    train_on(tiny.run(epochs=1), tmp_path / "out", "aa")
    resumed = train_on(tiny.run(epochs=2, debug=True), tmp_path / "out", "aa")
    whole = train_on(tiny.run(epochs=2), tmp_path / "whole", "aa")
    assert (resumed["digest"], resumed["attempts"]) == (whole["digest"], 2)


def plant_fault(
    kind: type[Sync], name: str, monkeypatch: pytest.MonkeyPatch, at: int = FAULTY_UPDATE
) -> None:
    """Make the last replica of a parameter's block change it after one update."""
    after_update: Callable[[Any, UpdateClock], None] = kind.after_update

    def faulty(self: Sync, clock: UpdateClock) -> None:
        after_update(self, clock)
        is_last = self.replicas.rank == self.replicas.size - 1
        tensors = self.block.tensors()
        if is_last and clock.update == at and name in tensors:
            with torch.no_grad():
                tensors[name].view(-1)[-1] += 1e-9

    monkeypatch.setattr(kind, "after_update", faulty)


@pytest.mark.parametrize(("name", "block"), [("fc2.weight", 1), ("heads.0.1.weight", 0)])
@pytest.mark.parametrize("sync", ["every-step", "local-sgd"])
def test_a_replica_that_differs_is_named_at_once(
    sync: str, name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"every-step": EveryStep, "local-sgd": LocalSGD}[sync]
    fields = {"every": FAULTY_UPDATE + 1} if sync == "local-sgd" else {}
    plant_fault(kind, name, monkeypatch)

    def run(debug: bool) -> RunConfig:
        return sync_run(sync, sync=fields, debug=debug)

    with pytest.raises(NumericalError) as caught:
        train_on(run(True), tmp_path / "debug", "aaa")
    for fact in (f"'{name}'", "replica 2", f"update {FAULTY_UPDATE}", f"action U{block}"):
        assert fact in caught.value.message
    assert train_on(run(False), tmp_path / "plain", "aaa")["status"] == "finished"


def test_a_replica_that_averages_other_tensors_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of a hang, or of wrong numbers."""

    def faulty(
        self: EveryStep, gradients: list[torch.Tensor], weight: float, clock: UpdateClock
    ) -> None:
        some = gradients[1:] if self.replicas.rank and clock.update == 2 else gradients
        self.replicas.mean_(some, weight)

    monkeypatch.setattr(EveryStep, "gradient_group", lambda *_: None)
    monkeypatch.setattr(EveryStep, "before_update", faulty)
    with pytest.raises(CollectiveMismatch) as caught:
        train_on(sync_run("every-step", debug=True), tmp_path, "aa")
    for fact in ("rank 1", "mean_", "0 (13,) float64", "0 (13, 10) float64"):
        assert fact in str(caught.value)


def test_checksums_cover_every_bit() -> None:
    tensor = torch.zeros(3, 5)
    sums = {checksum(tensor), checksum(-tensor), checksum(torch.zeros(3, 6))}
    tensor.view(-1)[7] = 1e-45
    sums |= {checksum(tensor), checksum(tensor.to(torch.bfloat16))}
    assert len(sums) == 5
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous())


def test_a_sum_of_bits_changes_with_every_bit() -> None:
    """Of parameters of an odd number of bytes, complex ones, empty ones and of none."""
    layer, seen = nn.Linear(3, 5, dtype=torch.bfloat16), set()
    layer.register_parameter("phase", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    layer.register_parameter("none", nn.Parameter(torch.ones(0)))
    block = Block(0, {"fc": layer}, None, lambda _: None)  # type: ignore[arg-type, return-value]
    before = bit_sum(block)
    for parameter in block.parameters.values():
        bits = parameter.detach().view(-1).view(torch.uint8) if parameter.numel() else []
        for index in range(len(bits)):
            for bit in range(8):
                bits[index] ^= 1 << bit
                seen.add(bit_sum(block))
                bits[index] ^= 1 << bit
    assert before == bit_sum(block)
    assert before not in seen
    assert bit_sum(Block(0, {"act": nn.ReLU()}, None, lambda _: None)) == 0  # type: ignore[arg-type, return-value]


def test_without_debug_a_collective_sends_no_more_messages() -> None:
    def count_messages(debug: bool) -> int:
        counts: list[int] = []

        def work(comm: Comm) -> None:
            isend = comm.transport.backend.isend

            def counting_isend(data: Bytes, to: int, tag: int) -> Request:
                counts.append(to)
                return isend(data, to, tag)

            comm.transport.backend.isend = counting_isend  # type: ignore[method-assign]
            if debug:
                comm.context.debug()
            comm.allgather_object(None)

        run_ranks(3, work)
        return len(counts)

    assert count_messages(False) == 2 * 2 + 2 * 2, "two to rank 0, then two down the tree"
    assert count_messages(True) == count_messages(False) + 3 * 2 * 2


def test_a_mismatch_names_the_first_tensor_that_differs() -> None:
    ours = Call(3, "mean_", ["tensor 0 (2,) float32", "tensor 1 (3,) float32"])
    place = "mean_ (collective 3 of g)"
    fewer = ours._replace(tensors=ours.tensors[:1])
    texts = ours.describe_mismatch(fewer, "g")
    assert texts == (f"{place} with {ours.tensors[1]}", "it with no tensor 1")
    later = ours._replace(number=4)
    assert ours.describe_mismatch(later, "g") == (place, "mean_ (collective 4 of g)")


@pytest.mark.parametrize(
    ("sync", "every", "fault", "found"),
    [("every-step", 3, 3, 6), ("every-step", 100, 3, 8), ("local-sgd", 3, 7, 8)],
)
def test_a_check_every_few_updates_names_block_and_ranks(
    sync: str, every: int, fault: int, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first update that is due and at which the sync keeps replicas equal, and after the
    last one. Without a fault it changes nothing."""
    kind = {"every-step": EveryStep, "local-sgd": LocalSGD}[sync]
    fields = {"every": 4} if sync == "local-sgd" else {}
    checked = {"numerics": {"check-replicas": every}}
    results = [
        train_on(sync_run(sync, sync=fields, **changes), tmp_path / f"{len(changes)}", "aab")
        for changes in ({}, checked)
    ]
    assert results[0]["digest"] == results[1]["digest"]
    assert results[0]["bytes_inter_node"] == results[1]["bytes_inter_node"]
    plant_fault(kind, "fc2.weight", monkeypatch, at=fault)
    with refuses(NumericalError, "sync.replicas-differ") as caught:
        train_on(sync_run(sync, sync=fields, **checked), tmp_path / "out", "aab")
    message = caught.value.message
    for fact in ("'fc2.weight'", "replica 2 (rank 2 on b)", "replica 0 (rank 0 on a)", "block 1"):
        assert fact in message
    assert f"after update {found - 1} " in message
