"""OIALR: frozen bases, falling ranks, optimizer state and traffic, over blocks and whole runs."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn, optim

from dtrain.block.block import Block
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.oialr import OIALR
from dtrain.testing.sync_updates import clock_at, set_random_gradients, three_matrices, update_block
from tests.outcome import close, model
from tests.ranks.killed import killed
from tests.ranks.sync_runs import FOUR, WIDE, sync_run, train_on
from tests.refusals import refuses

FIELDS: dict[str, Any] = {"delay-updates": 1, "every": 2, "cutoff": 0.3, "share": 0.5}
MATRICES = ("tall.weight", "wide.weight", "conv.weight")
FULL_RANKS = [5, 4, 6]


def attach(comm: Comm, **fields: Any) -> tuple[OIALR, Block]:
    """Return a sync with one full-rank update and a round after each other one, and its block."""
    defaults: dict[str, Any] = {"delay_updates": 1, "every": 1, "share": 1.0}
    sync, block = OIALR(**defaults | fields), three_matrices()
    sync.setup(block, comm)
    return sync, block


def take_step(sync: OIALR, block: Block, update: int) -> None:
    """Apply an update with gradients of this replica's own."""
    set_random_gradients(block, update, sync.replicas.rank)
    update_block(sync, block, clock_at(update, (1,) * sync.replicas.size))


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def ranks_after_updates(comm: Comm, updates: int, **fields: Any) -> list[list[int]]:
    """Return the ranks of the matrices after each update."""
    sync, block = attach(comm, **fields)
    history = []
    for update in range(updates):
        take_step(sync, block, update)
        history.append([block.low_rank_weights[name].rank for name in MATRICES])
    return history


class Trained(NamedTuple):
    """One replica's tensors before and after the factorization, its factors, and the end."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    factors: dict[str, list[Tensor]]
    end: dict[str, Tensor]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_only_the_core_is_trained_in_orthonormal_bases_equal_everywhere(size: int) -> None:
    def work(comm: Comm) -> Trained:
        sync, block = attach(comm, every=9)
        before = copies(block.tensors())
        take_step(sync, block, 0)
        after = copies(sync.evaluation_weights())
        factors = {
            name: [factor.detach().clone() for factor in product.factors]
            for name, product in block.low_rank_weights.items()
        }
        take_step(sync, block, 1)
        for name, (left, core, right) in factors.items():
            now = block.low_rank_weights[name].factors
            assert torch.equal(now[0], left)
            assert torch.equal(now[2], right)
            assert not torch.equal(now[1], core)
            identity = torch.eye(len(core)).to(left)
            torch.testing.assert_close(left.T @ left, identity)
            torch.testing.assert_close(right @ right.T, identity)
        return Trained(before, after, factors, copies(block.tensors()))

    first, *others = run_ranks(size, work, hosts=list(FOUR[:size]))
    assert set(first.factors) == set(MATRICES)
    assert not torch.equal(first.before["tall.bias"], first.after["tall.bias"])
    for replica in others:
        assert all(torch.equal(replica.end[name], tensor) for name, tensor in first.end.items())


def test_a_factorization_and_a_round_that_removes_zeros_keep_the_matrix() -> None:
    """W = U S V' at the start; singular values of zero are removed."""

    def work(comm: Comm) -> None:
        sync, block = attach(comm, cutoff=1e-9)
        weights = copies({name: block.parameters[name].detach() for name in MATRICES})
        sync.after_update(clock_at(0, (1, 1)))
        for name, weight in weights.items():
            shown = sync.evaluation_weights()[name]
            torch.testing.assert_close(shown, weight, rtol=1e-12, atol=1e-13)
        product = block.low_rank_weights["wide.weight"]
        core = product.factors[1]
        random = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        core.data = random[0, :, :2] @ random[1, :2]  # of rank 2, in no basis of its own
        before = sync.evaluation_weights()["wide.weight"].clone()
        sync.after_update(clock_at(1, (1, 1)))
        assert product.rank == 2
        assert torch.equal(product.factors[1], product.factors[1].diag().diag())
        after = sync.evaluation_weights()["wide.weight"]
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)

    run_ranks(2, work)


@pytest.mark.parametrize("cutoff", [0.0, 0.5, 5.0])
def test_ranks_fall_by_half_at_most_and_stop_at_a_hundredth(cutoff: float) -> None:
    """At 0 nothing is removed."""
    history, *others = run_ranks(2, lambda comm: ranks_after_updates(comm, 8, cutoff=cutoff))
    assert others == [history]
    assert history[0] == FULL_RANKS
    for before, after in itertools.pairwise(history):
        assert all(-(-a // 2) <= b <= a for a, b in zip(before, after, strict=True))
    assert (history[-1] == history[0]) == (cutoff == 0)
    if cutoff > 1:  # all singular values are below the cutoff
        assert history[1] == [3, 2, 3]
        assert history[-1] == [1, 1, 1]


def test_the_last_matrices_are_tested_first_and_skip_rounds_after_a_truncation() -> None:
    fields = {"cutoff": 5.0, "share": 0.33, "rest_rounds": 2}
    history = run_ranks(2, lambda comm: ranks_after_updates(comm, 6, **fields))[0]
    assert history == [[5, 4, 6], [5, 4, 3], [5, 2, 3], [3, 2, 3], [3, 2, 2], [3, 1, 2]]


def test_a_start_at_a_part_of_the_rank() -> None:
    assert run_ranks(2, lambda comm: ranks_after_updates(comm, 1, first_rank=0.5))[0] == [[3, 2, 3]]


def test_moments_of_the_core_start_anew_and_those_of_others_continue() -> None:
    def work(comm: Comm) -> None:
        sync, block = attach(comm, cutoff=5.0)
        take_step(sync, block, 0)
        state = block.optimizer_state()
        assert not any(key.startswith("tall.weight") for key in state)
        assert state["tall.bias/exp_avg"].abs().max() > 0
        take_step(sync, block, 1)
        assert block.optimizer_state()["tall.weight.core/exp_avg"].shape == (3, 3)

    run_ranks(2, work)


class Scaled(nn.Module):
    """A layer with a parameter that has no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.linear = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.scale * x)


def test_a_parameter_without_dimension_stays_as_it_is() -> None:
    def work(comm: Comm) -> list[str]:
        block = Block(0, {"one": Scaled()}, None, partial(optim.Adam, lr=0.1))
        sync = OIALR(delay_updates=1, every=1)
        sync.setup(block, comm)
        take_step(sync, block, 0)
        assert sync.low_rank_stats()["one.scale"]["held"] == 1
        return [*block.low_rank_weights]

    assert run_ranks(2, work) == [["one.linear.weight"]] * 2


# ---- whole runs


def test_many_replicas_train_what_one_does(tmp_path: Path) -> None:
    one = train_on(sync_run("oialr", sync=FIELDS, **WIDE), tmp_path / "one", "a")
    train_on(sync_run("oialr", sync=FIELDS, **WIDE), tmp_path / "four", FOUR)
    close(tmp_path / "one", tmp_path / "four", 1e-9)
    plain = train_on(sync_run("every-step", **WIDE), tmp_path / "plain", "a")
    assert plain["digest"] != one["digest"]


def test_a_delay_without_end_factorizes_nothing(tmp_path: Path) -> None:
    summary = train_on(sync_run("oialr", sync={"delay-updates": 99}), tmp_path, FOUR)
    assert (summary["low_rank"], summary["traffic_saved"]) == ({}, 0)


def test_bytes_are_those_of_cores_and_factorizations(tmp_path: Path) -> None:
    """Two nodes: one full update of eight, then k^2 for each matrix, and one factorization."""
    summary = train_on(sync_run("oialr", sync=FIELDS | {"every": 99}, **WIDE), tmp_path, FOUR)
    shapes = {name: tensor.shape for name, tensor in model(tmp_path).items()}
    total = sum(shape.numel() for shape in shapes.values())
    matrices = {name: shapes[name] for name in ("fc2.weight", "fc3.weight")}
    assert set(summary["low_rank"]) == set(matrices)
    ranks = {name: min(shape) for name, shape in matrices.items()}
    cores = sum(rank**2 for rank in ranks.values())
    whole = sum(shape.numel() for shape in matrices.values())
    factors = sum(rank * (sum(matrices[name]) + 1) for name, rank in ranks.items())
    sent = 2 * (total + 7 * (total - whole + cores)) + factors
    assert summary["bytes_inter_node"] == 8 * sent
    assert summary["traffic_saved"] == pytest.approx(1 - sent / (2 * 8 * total), abs=1e-12)
    for name, stats in summary["low_rank"].items():
        numbers, rank = matrices[name].numel(), ranks[name]
        sent = 2 * (numbers + 7 * rank**2) + rank * (sum(matrices[name]) + 1)
        assert stats["rank"] == rank
        assert stats["compression"] == 1  # at full rank the matrix itself is smaller
        saved = 1 - sent / (2 * 8 * numbers)
        assert stats["traffic_saved"] == pytest.approx(saved, abs=1e-12)


def test_killed_and_resumed_it_counts_what_an_uninterrupted_run_does(tmp_path: Path) -> None:
    """Through the files of a checkpoint; `test_sync_laws` resumes after every update."""
    sync = {"delay-updates": 3, "every": 2, "cutoff": 0.6, "share": 1.0}
    changes = {"sync": sync, "epochs": 3, **WIDE}
    whole = train_on(sync_run("oialr", **changes), tmp_path / "whole", "aab")
    run = sync_run("oialr", checkpoint__every=1, **changes)
    for until in (2, 5):
        killed(run, tmp_path / "parts", until, "aab")
    resumed = train_on(run, tmp_path / "parts", "aab")
    for key in ("digest", "low_rank", "traffic_saved"):
        assert resumed[key] == whole[key], key
    assert resumed["attempts"] == 3
    assert all(stats["compression"] > 1 for stats in whole["low_rank"].values())


def test_another_number_of_replicas_resumes_in_low_rank(tmp_path: Path) -> None:
    """All hold the same factors, so any of them can."""
    changes = {"sync": FIELDS, "epochs": 2, **WIDE}
    train_on(sync_run("oialr", **changes), tmp_path / "whole", FOUR)
    run = sync_run("oialr", checkpoint__every=3, **changes)
    killed(run, tmp_path / "parts", 5, FOUR)
    summary = train_on(run, tmp_path / "parts", "ab")
    assert (summary["attempts"], summary["updates"]) == (2, 8)
    close(tmp_path / "whole", tmp_path / "parts", 1e-9)


def test_int8_around_it_compresses_cores(tmp_path: Path) -> None:
    plain = train_on(sync_run("oialr", sync=FIELDS, **WIDE), tmp_path / "plain", FOUR)
    inner = {"inner": {"name": "oialr", **FIELDS}}
    coded = train_on(sync_run("int8", sync=inner, debug=True, **WIDE), tmp_path / "coded", FOUR)
    assert coded["bytes_inter_node"] < 0.45 * plain["bytes_inter_node"]


def test_a_schedule_with_delayed_gradients_is_refused() -> None:
    delayed = {"objective__name": "backprop", "schedule__name": "pipelined", "micro_batches": 1}
    with pytest.raises(ConfigError):
        sync_run("oialr", **delayed)


def test_subsets_of_a_block_are_refused(tmp_path: Path) -> None:
    with refuses(ConfigError, "sync.needs-whole-block"):
        train_on(sync_run("only-large", sync={"inner": {"name": "oialr"}}), tmp_path)


@pytest.mark.parametrize("key", ["delay-updates", "every"])
def test_numbers_that_are_too_small_are_refused(key: str) -> None:
    with refuses(ConfigError, "sync.too-small"):
        sync_run("oialr", sync={key: 0})


def test_a_first_rank_above_1_is_refused() -> None:
    with refuses(ConfigError, "sync.first-rank"):
        sync_run("oialr", sync={"first-rank": 1.5})
