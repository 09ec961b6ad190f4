"""A parameter without a gradient in an update is left alone by the optimizer, as in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import user_nets
from tests.harness import assert_close_model, assert_same_model, train_in_threads
from tests.outcome import model
from tests.ranks.sync_runs import replica_tensors
from tests.single import one_thread  # noqa: F401

NETS = ("unused", "sometimes", "layer_drop")


@pytest.mark.parametrize("net", ["unused", "sometimes"])
def test_one_rank_is_a_plain_loop_of_torch(net: str, tmp_path: Path) -> None:
    run = user_nets.run(net, data={"normalise": False}, epochs=1, micro_batches=1)
    train_in_threads(run, tmp_path / "run")
    torch.manual_seed(1)
    plain = getattr(user_nets, net)((8,), 4)
    user_nets.train_plainly(plain, "adamw", lr=0.01, weight_decay=0.1)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model(tmp_path / "run")[name], tensor, rtol=1e-10, atol=1e-12)


def test_weight_decay_leaves_an_unused_parameter(tmp_path: Path) -> None:
    for replicas in (1, 2, 3):
        out = tmp_path / str(replicas)
        train_in_threads(user_nets.run("unused"), out, replicas=replicas)
        assert torch.equal(model(out)["0.spare"], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("net", NETS)
def test_any_number_of_stages_trains_the_same_bits(net: str, tmp_path: Path) -> None:
    run = user_nets.run(net, partition={"blocks": 3})
    for stages in (1, 2, 3):
        train_in_threads(run, tmp_path / str(stages), stages=stages)
    assert_same_model(tmp_path / "1", tmp_path / "2")
    assert_same_model(tmp_path / "1", tmp_path / "3")


SYNCS: list[dict[str, Any]] = [
    {"name": "every-step"},
    {"name": "demo"},
    {"name": "int8"},
    {"name": "only-large", "elements": 20},
    {"name": "warmup", "updates": 2, "inner": {"name": "int8"}},
    {"name": "daso", "warmup-epochs": 9},
    {"name": "daso", "warmup-epochs": 0, "cooldown-epochs": 0},
    {"name": "ab", "warmup-updates": 1, "every": 4, "full-updates": 1},
    {"name": "oialr", "delay-updates": 1, "every": 1},
    {"name": "local-sgd", "every": 2},
]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("sync", SYNCS, ids=lambda sync: sync["name"])
def test_replicas_agree_on_the_parameters_without_a_gradient(
    sync: dict[str, Any], net: str, tmp_path: Path
) -> None:
    """The debug mode compares the replicas after every update; the last batch has one row."""
    tables: dict[str, Any] = {"sync": sync, "mesh": {"stages": 1}, "batch_size": 19}
    train_in_threads(
        user_nets.run(net, debug=True, **tables), tmp_path, replicas=2, hosts=["a", "b"]
    )


def test_two_replicas_train_what_one_trains(tmp_path: Path) -> None:
    """A replica without the gradient of a parameter takes the other's."""
    run = user_nets.run("sometimes", batch_size=19, micro_batches=1)
    train_in_threads(run, tmp_path / "one")
    train_in_threads(run, tmp_path / "two", replicas=2)
    assert_close_model(tmp_path / "one", tmp_path / "two")


def test_local_updates_leave_it_alone_on_each_replica(tmp_path: Path) -> None:
    sync = {"name": "local-sgd", "every": 1000}
    run = user_nets.run("unused", sync=sync, mesh={"stages": 1})
    train_in_threads(run, tmp_path, replicas=2)
    for tensors in replica_tensors(tmp_path, 2):
        assert torch.equal(tensors["0.spare"], torch.ones(3, dtype=torch.float64))
