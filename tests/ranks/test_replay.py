"""`stream-replay`: exact where no rank is late; otherwise old inputs with their own targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.build import RankJob
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.engine.replay import ReplayReceiver, ReplaySender, Source
from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.mono_forward import MonoForward
from dtrain.planning.plan import make_plan
from dtrain.testing.small_run import train
from tests import tiny
from tests.harness import train_in_threads
from tests.refusals import refuses


def make_run(**changes: Any) -> Any:
    """Return a run of three blocks in updates of two micro-batches."""
    return tiny.run(**{"micro_batches": 2, "schedule": {"name": "stream-replay"}, **changes})


def test_without_a_late_rank_it_trains_the_bits_of_stream(tmp_path: Path) -> None:
    """Also resumed at the end of a segment, and with blocks of one rank in between."""
    changes = {"partition__blocks": 4, "checkpoint__every": 3, "epochs": None}
    stream = make_run(**changes, updates=7, schedule={"name": "stream"})
    digest = train_in_threads(stream, tmp_path / "stream")["digest"]
    for updates in (3, 7):
        resumed = train_in_threads(make_run(**changes, updates=updates), tmp_path / "replay", 3)
    assert resumed["digest"] == digest
    assert resumed["staleness"] == [0, 0, 0]


SEEN: list[tuple[int, Tensor, Tensor, Tensor]] = []


class Recording(MonoForward):
    """Mono-Forward that records input, targets and positions of every micro-batch of block 1."""

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        x = super().make_input(spec, block, micro_batch)
        if spec.index == 1 and micro_batch.training:
            update = micro_batch.rng_key[0]
            SEEN.append((update, x.clone(), micro_batch.targets, micro_batch.indices))
        return x


def flat() -> nn.Sequential:
    """Return a net whose first block changes no number."""
    return nn.Sequential(nn.Flatten(), nn.Linear(10, 6), nn.Linear(6, 3))


def test_a_late_input_is_replaced_by_an_earlier_one_with_its_targets() -> None:
    """Without patience, rank 0 ends the segment before rank 1 begins."""
    SEEN.clear()
    run = make_run(
        objective={"name": "tests.ranks.test_replay:Recording"},
        model={"name": "tests.ranks.test_replay:flat"},
        partition={"cuts": [1, 2]},
        schedule={"name": "stream-replay", "patience-s": 0.0, "buffer": 3},
        epochs=1,
    )
    jobs: list[RankJob] = []
    outcome = train(run, stages=3, prepare=jobs.append)
    samples = make_plan(run, 1).data.train
    assert len(SEEN) == 8  # as many as in the plan
    for _, x, targets, indices in SEEN:
        assert torch.equal(x, samples.inputs(indices.numpy()).double().flatten(1))
        assert torch.equal(targets, samples.targets(indices.numpy()))
    inputs = {tuple(indices.tolist()) for _, _, _, indices in SEEN}
    assert 1 <= len(inputs) < 8
    staleness = {job.position.stage: job.engine.metric_sums.metrics for job in jobs}
    assert staleness[1][1]["staleness"] > 0
    assert staleness[0][0]["left_out"] == 50 - sum(map(len, inputs))
    assert all(torch.isfinite(weight).all() for weight in outcome.weights[0].values())


@pytest.mark.parametrize("buffer", [2, 3])
def test_the_least_used_input_is_replayed_the_newest_of_equals(buffer: int) -> None:
    """A buffer keeps the last inputs alone."""
    spec = ((2, 1), torch.float64)

    def work(comm: Comm) -> list[int]:
        if comm.rank == 0:
            sender = ReplaySender(comm, 1, 0, spec, patience_s=60.0)
            for number in range(3):
                tensor = torch.full((2, 1), number, dtype=torch.float64)
                assert sender.send(tensor, Source(number, 0))
            sender.end()
            comm.flush()
            return []
        receiver = ReplayReceiver(comm, 0, 0, spec, buffer, patience_s=60.0)
        inputs = [receiver.receive() for _ in range(3 + 2 * buffer)]
        assert all(tensor[0, 0] == source.update for tensor, source in inputs)
        receiver.drain()
        assert receiver.peak_bytes == buffer * 16
        return [source.update for _, source in inputs]

    newest = list(range(3))[: -buffer - 1 : -1]
    assert run_ranks(2, work)[1] == [0, 1, 2, *newest, *newest]


def test_outputs_are_left_out_without_a_credit() -> None:
    """The sender does not wait for a rank that takes nothing."""
    spec = ((2, 1), torch.float64)

    def work(comm: Comm) -> int:
        if comm.rank == 1:
            receiver = ReplayReceiver(comm, 0, 0, spec, 1, patience_s=0.0)
            tensor, source = receiver.receive()
            receiver.drain()
            return int((source.update, len(tensor)) == (0, 1))
        sender = ReplaySender(comm, 1, 0, spec, patience_s=0.0)
        tensor = torch.zeros(1, 1, dtype=torch.float64)
        sent = [sender.send(tensor, Source(number, 0)) for number in range(comm.credits + 4)]
        assert sum(sent) <= comm.credits + 1  # one may be with the receiver
        assert sent == sorted(sent, reverse=True)
        sender.end()
        comm.flush()
        return 1

    assert run_ranks(2, work) == [1, 1]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"schedule": {"name": "stream-replay", "buffer": 0}}, "schedule.replay-out-of-range"),
        ({"objective__name": "infopro"}, "schedule.replay-needs-samples"),
        ({"objective__name": "backprop"}, "schedule.route-unsupported"),
        ({"partition__activation_compression": "int8"}, "schedule.replay-compressed"),
    ],
)
def test_runs_that_cannot_replay_are_refused(changes: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        make_plan(make_run(**changes), 3)
