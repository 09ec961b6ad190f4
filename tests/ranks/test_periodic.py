"""Periodic syncs: QSR, DiLoCo, and local SGD between nodes; identities over whole runs."""

from __future__ import annotations

import dataclasses
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.checkpoint.manifest import read_manifest
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.syncs.qsr import QSR
from dtrain.testing.sync_updates import clock_at, three_matrices
from tests.outcome import close, model
from tests.ranks.sync_runs import FOUR, MOMENTUM, SGD, replica_tensors, sync_run, train_on

# ---- QSR


def round_length(sync: QSR, lr: float, **changes: Any) -> int:
    return sync.round_length(clock_at(0, (1, 1), lr=lr, **changes))


@pytest.mark.parametrize(
    ("lr", "expected"),
    # The paper's ViT-B: alpha 0.0175, H_base 4, a peak rate of 0.008.
    [(0.008, 4), (0.006, 8), (0.004, 19), (0.002, 76), (0.001, 306), (0.0175, 4), (0.0001, 30625)],
)
def test_rounds_are_as_long_as_the_rule_says(lr: float, expected: int) -> None:
    """max(H_base, floor((alpha / lr) ** 2))."""
    sync = QSR(every=4, alpha_over_peak=0.0175 / 0.008)
    # A quotient next to a whole number may round either way.
    assert round_length(sync, lr, base_lr=0.008) in (expected, expected - 1)
    assert expected == max(4, floor((0.0175 / lr) ** 2 + 1e-9))


def test_half_the_rate_makes_four_times_the_round() -> None:
    sync = QSR(every=1, alpha_over_peak=3.0)
    assert [round_length(sync, 0.1 / 2**n) for n in range(5)] == [9, 36, 144, 576, 2304]
    linear = QSR(every=1, alpha_over_peak=3.0, power=1.0)
    assert [round_length(linear, 0.1 / 2**n) for n in range(4)] == [3, 6, 12, 24]


def test_in_the_lr_warmup_and_without_alpha_rounds_have_the_base_length() -> None:
    assert round_length(QSR(), 1e-6, in_lr_warmup=True) == 4
    assert round_length(QSR(every=7, alpha_over_peak=0.0), 1e-6) == 7


def test_a_round_keeps_its_length_and_the_last_ends_the_run() -> None:
    """The rate falls in every update; only the one at the start of a round counts."""
    total = 60

    def work(comm: Comm) -> tuple[list[int], list[int]]:
        sync = QSR(every=2, alpha_over_peak=1.5)
        sync.setup(three_matrices(), comm)
        lengths, ends = [], []
        for update in range(total):
            lr = 0.1 * (1 - update / total)
            clock = clock_at(update, (1,), total_updates=total, lr=lr)
            lengths.append(sync.round_length(clock))
            sync.before_update([], 1.0, clock)
            if sync.is_due(clock):
                ends.append(update)
        return lengths, ends

    [(lengths, ends)] = run_ranks(1, work)
    starts = [0, *(update + 1 for update in ends[:-1])]
    expected = [min(lengths[start], total - start) for start in starts]
    assert [end + 1 - start for start, end in zip(starts, ends, strict=True)] == expected
    assert ends[-1] == total - 1
    assert len(set(expected)) > 3


def test_without_alpha_qsr_is_local_sgd(tmp_path: Path) -> None:
    """Eight updates in rounds of four."""
    local = train_on(sync_run("local-sgd", sync={"every": 4}), tmp_path / "local")
    constant = {"every": 4, "alpha-over-peak": 0}
    qsr = train_on(sync_run("qsr", sync=constant), tmp_path / "qsr")
    assert qsr["digest"] == local["digest"]
    assert qsr["bytes_inter_node"] == local["bytes_inter_node"]


def test_the_learning_rate_of_the_run_makes_its_rounds(tmp_path: Path) -> None:
    """A cosine over eight updates: (1.5 / factor) ** 2 at factors 1, 0.85 and 0.5."""
    cosine = {"lr": {"name": "cosine"}, "optimizer": {"name": "adam", "lr": 0.01}}
    fields = {"every": 1, "alpha-over-peak": 1.5}
    summary = train_on(sync_run("qsr", sync=fields, **cosine), tmp_path)
    lengths = [2, 2, 4]  # the last is capped by the end of the run
    n = 8 * sum(tensor.numel() for tensor in model(tmp_path).values())
    assert summary["bytes_inter_node"] == len(lengths) * 2 * n
    for replica in replica_tensors(tmp_path, 2):
        assert all(torch.equal(tensor, replica[name]) for name, tensor in model(tmp_path).items())


# ---- DiLoCo

NO_OUTER_OPTIMIZER: dict[str, Any] = {"outer-lr": 1.0, "outer-momentum": 0.0}


def test_with_outer_rate_one_and_no_momentum_diloco_is_local_sgd(tmp_path: Path) -> None:
    train_on(sync_run("local-sgd", sync={"every": 4}), tmp_path / "local")
    train_on(sync_run("diloco", sync={"every": 4, **NO_OUTER_OPTIMIZER}), tmp_path / "diloco")
    close(tmp_path / "local", tmp_path / "diloco")


def test_with_those_one_replica_is_the_plain_run(tmp_path: Path) -> None:
    train_on(sync_run("every-step"), tmp_path / "plain", "a")
    train_on(sync_run("diloco", sync={"every": 3, **NO_OUTER_OPTIMIZER}), tmp_path / "diloco", "a")
    close(tmp_path / "plain", tmp_path / "diloco")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rounds_of_one_sgd_step_are_synchronous_nesterov(momentum: float, tmp_path: Path) -> None:
    """With rate 0.7 lr; two replicas have equal parts of every batch."""
    outer = {"every": 1, "outer-lr": 0.7, "outer-momentum": momentum}
    train_on(sync_run("diloco", sync=outer, **SGD), tmp_path / "diloco")
    nesterov = {"name": "sgd", "lr": 0.7 * 0.05, "momentum": momentum, "nesterov": momentum > 0}
    train_on(sync_run("every-step", optimizer=nesterov), tmp_path / "every-step")
    close(tmp_path / "every-step", tmp_path / "diloco")


def test_outer_weights_are_evaluated_inside_a_round(tmp_path: Path) -> None:
    """In rounds of four, update 7 is evaluated as update 4, though replicas differ."""
    changes = {"epochs": None, "updates": 8, "checkpoint__every": 3, "checkpoint__keep": 9}
    train_on(sync_run("diloco", sync={"every": 4}, **changes), tmp_path)
    manifests = {
        folder.name: read_manifest(folder) for folder in (tmp_path / "checkpoints").iterdir()
    }
    inside = manifests["update-00000007"]
    start = manifests["update-00000004"].load_prefix("model/")
    shown = inside.load_prefix("model/")
    assert all(torch.equal(shown[name], tensor) for name, tensor in start.items())
    one, two = (inside.load_prefix(f"replica/{replica}/") for replica in (0, 1))
    assert not torch.equal(one["fc1.weight"], two["fc1.weight"])


# ---- local SGD between nodes


def test_nodes_of_one_replica_are_replicas(tmp_path: Path) -> None:
    plain = train_on(sync_run("local-sgd", sync={"every": 3}), tmp_path / "plain")
    within = sync_run("local-sgd", sync={"every": 3, "within": "node"})
    nodes = train_on(within, tmp_path / "nodes")
    assert nodes["digest"] == plain["digest"]


def test_within_one_node_every_update_is_synchronous(tmp_path: Path) -> None:
    """Replicas never differ, so means of parameters change nothing but last bits."""
    train_on(sync_run("every-step"), tmp_path / "every-step", "aaa")
    within = sync_run("local-sgd", sync={"within": "node", "every": 3})
    train_on(within, tmp_path / "node", "aaa")
    close(tmp_path / "every-step", tmp_path / "node", 1e-11)


def test_between_nodes_it_is_local_sgd_of_larger_replicas(tmp_path: Path) -> None:
    """Two nodes of two are two replicas, with the same parts of every batch."""
    changes = {"batch_size": 25, "epochs": 5}  # nodes of 13 and 12 samples
    train_on(sync_run("local-sgd", sync={"every": 3}, **changes), tmp_path / "two", "ab")
    within = sync_run("local-sgd", sync={"every": 3, "within": "node"}, **changes)
    train_on(within, tmp_path / "four", FOUR)
    close(tmp_path / "two", tmp_path / "four", 1e-11)


def test_momentum_stays_local(tmp_path: Path) -> None:
    """Optimizer states of a node's replicas are the same only where they step together."""
    within = {"within": "node", "every": 4}
    train_on(sync_run("local-sgd", sync=within, **MOMENTUM), tmp_path, FOUR)
    replicas = replica_tensors(tmp_path, 4)
    names = [name for name in replicas[0] if name.endswith("momentum_buffer")]
    assert names
    for name in names:
        assert torch.equal(replicas[0][name], replicas[1][name])
        assert not torch.equal(replicas[0][name], replicas[2][name])


# ---- all of them


@pytest.mark.parametrize("name", ["qsr", "diloco", "local-sgd"])
def test_bytes_are_the_formula(name: str, tmp_path: Path) -> None:
    """Two means of the parameters in eight updates, each 2 (m - 1) times their bytes."""
    summary = train_on(sync_run(name, sync={"every": 4}), tmp_path, FOUR)
    n = 8 * sum(tensor.numel() for tensor in model(tmp_path).values())
    assert summary["bytes_inter_node"] == 2 * 2 * n
    assert summary["bytes_intra_node"] == 2 * 4 * n


@pytest.mark.parametrize(("name", "command"), [("diloco", "evaluate"), ("local-sgd", "epochs=4")])
def test_the_command_that_a_run_suggests_is_legal(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose phases follow its length cannot be continued."""
    run_file = tmp_path / "run-file.toml"
    run_file.touch()
    train_on(dataclasses.replace(sync_run(name), path=run_file), tmp_path / "out")
    assert command in capsys.readouterr().out.splitlines()[-1]
