"""AB training: phases, groups, merges, optimizer state and traffic, over blocks and whole runs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.ab import AB
from dtrain.syncs.ab.phases import LOWEST_LR_FACTOR, Phases
from dtrain.syncs.common.low_rank import SVD, svd
from dtrain.testing.sync_updates import clock_at, set_random_gradients, three_matrices, update_block
from tests.outcome import close, model
from tests.ranks.killed import killed
from tests.ranks.sync_runs import FOUR, WIDE, sync_run, train_on
from tests.refusals import refuses

FIELDS: dict[str, Any] = {"warmup-updates": 1, "every": 4, "full-updates": 1, "rebound-updates": 2}
MODES = ("with-stale", "only-learned", "full", "only-b")
FULL_RANKS = [5, 4, 6]
"""Of the matrices of `three_matrices`."""


def attach(comm: Comm, mode: str, **fields: Any) -> tuple[AB, Block]:
    """Return a sync with phases of one full-rank and three low-rank updates, and its block."""
    sync = AB(mode=mode, warmup_updates=1, every=4, full_updates=1, **fields)  # type: ignore[arg-type]
    block = three_matrices()
    sync.setup(block, comm)
    return sync, block


def take_step(sync: AB, block: Block, update: int) -> None:
    """Apply an update with gradients of this replica's own."""
    set_random_gradients(block, update, sync.replicas.rank)
    update_block(sync, block, clock_at(update, (1,) * sync.replicas.size))


def factors(block: Block) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies of left and right factor of each matrix."""
    return {
        name: (product.left.detach().clone(), product.right.detach().clone())
        for name, product in block.low_rank_weights.items()
    }


def ranks_of(block: Block) -> list[int]:
    return [product.rank for product in block.low_rank_weights.values()]


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


# ---- phases


def test_phases_are_those_of_the_paper() -> None:
    """Warm-up, low rank up to the next period, then full and low in turns."""

    def kinds(phases: Phases, updates: int) -> str:
        return "".join("l" if phases.is_low_rank(update) else "f" for update in range(updates))

    phases = Phases(6, 5, 2, 0)
    assert kinds(phases, 25) == "ffffff" + "llll" + "fflll" + "fflll" + "fflll"
    assert next(update for update in range(25) if phases.truncates(update)) == 10
    assert kinds(Phases(5, 5, 2, 0), 15) == "fffff" + "lllll" + "fflll"


def test_phases_scale_with_the_run() -> None:
    def phases(sync: AB, updates: int) -> Phases:
        return sync.phases(clock_at(0, (1,), total_updates=updates))

    assert phases(AB(), 300) == Phases(120, 20, 2, 2)
    assert phases(AB(), 30000) == Phases(12000, 2000, 200, 200)
    sync = AB(warmup_updates=0, every=9, full_updates=2, rebound_updates=1)
    assert phases(sync, 100) == Phases(0, 9, 2, 1)


def test_the_learning_rate_rises_again_after_a_change() -> None:
    """The first update is full rank; the change comes after it."""

    def work(comm: Comm) -> list[float]:
        sync, block = attach(comm, "full", rebound_updates=2)
        lr_factors = []
        for update in range(4):
            clock = clock_at(update, (1, 1))
            lr_factors.append(sync.lr_factor(clock))
            take_step(sync, block, update)
        return lr_factors

    middle = LOWEST_LR_FACTOR + (1 - LOWEST_LR_FACTOR) / 2
    assert run_ranks(2, work)[0] == pytest.approx([1, LOWEST_LR_FACTOR, middle, 1])
    long = Phases(0, 20, 2, 4)
    assert [long.lr_factor(since) for since in range(6)] == pytest.approx(
        [LOWEST_LR_FACTOR + (1 - LOWEST_LR_FACTOR) * since / 4 for since in range(4)] + [1, 1]
    )


# ---- groups and merges


class Merged(NamedTuple):
    """One replica's factors around two low-rank updates, and the merge that follows."""

    trains_a: bool
    start: dict[str, tuple[Tensor, Tensor]]
    end: dict[str, tuple[Tensor, Tensor]]
    trained: dict[str, tuple[bool, bool]]
    shown: dict[str, Tensor]
    in_low_rank: bool
    names: list[str]


def merge_after_two_updates(comm: Comm, mode: str) -> Merged:
    sync, block = attach(comm, mode)
    take_step(sync, block, 0)  # full rank; then a factorization without truncation
    start = factors(block)
    trained = {
        name: (product.left.requires_grad, product.right.requires_grad)
        for name, product in block.low_rank_weights.items()
    }
    for update in (1, 2):
        take_step(sync, block, update)
    end, shown = factors(block), sync.evaluation_weights()
    take_step(sync, block, 3)
    names = list(block.parameters)
    return Merged(sync.trains_a, start, end, trained, shown, sync.in_low_rank, names)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_groups_train_one_factor_each_and_merge_as_the_mode_says(mode: str, size: int) -> None:
    replicas = run_ranks(
        size, lambda comm: merge_after_two_updates(comm, mode), hosts=list(FOUR[:size])
    )
    first = replicas[0]
    assert not any(replica.in_low_rank for replica in replicas)
    assert all(replica.names == first.names for replica in replicas)
    trains_a = [rank for rank, replica in enumerate(replicas) if replica.trains_a]
    assert trains_a == ([] if mode == "only-b" else list(range(-(-size // 2))))
    for name, a_is_left in {"tall.weight": True, "wide.weight": False}.items():
        for replica in replicas:
            trains_left = replica.trains_a == a_is_left
            assert replica.trained[name] == (trains_left, not trains_left)
            for side, moves in enumerate(replica.trained[name]):
                equal = torch.equal(replica.start[name][side], replica.end[name][side])
                assert equal != moves
        expected = expected_merge(
            mode, [replica.end[name] for replica in replicas], trains_a, a_is_left
        )
        for replica in replicas:
            torch.testing.assert_close(replica.shown[name], expected, rtol=1e-10, atol=1e-11)
            assert torch.equal(replica.shown[name], first.shown[name])


def expected_merge(
    mode: str, pairs: list[tuple[Tensor, Tensor]], trains_a: list[int], a_is_left: bool
) -> Tensor:
    """Return the matrix that a merge makes of the factors of all replicas."""
    if mode == "full":
        return mean([left @ right for left, right in pairs])
    lefts, rights = [left for left, _ in pairs], [right for _, right in pairs]
    all_a, all_b = (lefts, rights) if a_is_left else (rights, lefts)
    if mode == "with-stale":
        a, b = mean(all_a), mean(all_b)
    elif mode == "only-learned":
        a = mean([all_a[rank] for rank in trains_a])
        b = mean([all_b[rank] for rank in range(len(pairs)) if rank not in trains_a])
    else:
        a, b = all_a[0], mean(all_b)
    return a @ b if a_is_left else b @ a


def test_two_equal_groups_with_stale_move_half_way() -> None:
    """A' = (A1 + A0) / 2."""

    def work(comm: Comm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sync, block = attach(comm, "with-stale")
        take_step(sync, block, 0)
        start, _ = factors(block)["tall.weight"]
        take_step(sync, block, 1)
        left, right = factors(block)["tall.weight"]
        return start, left, right, sync.evaluation_weights()["tall.weight"]

    (a0, a1, b0, shown), (frozen, same, b1, _) = run_ranks(2, work)
    assert torch.equal(frozen, same)
    torch.testing.assert_close(shown, (a0 + a1) / 2 @ ((b0 + b1) / 2), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cutoff", [0.0, 0.5])
def test_all_replicas_truncate_to_the_same_rank(cutoff: float) -> None:
    """At 0 nothing is lost; the first factorization never truncates."""

    def work(comm: Comm) -> list[list[int]]:
        sync, block = attach(comm, "with-stale", cutoff=cutoff)
        history = []
        for update in range(6):
            take_step(sync, block, update)
            history.append(ranks_of(block))
        return history

    first, *others = run_ranks(4, work)
    assert all(history == first for history in others)
    assert first[:3] == [FULL_RANKS] * 3
    assert first[3] == []  # full rank
    assert (first[4] == FULL_RANKS) == (cutoff == 0)
    assert all(rank <= full for rank, full in zip(first[4], FULL_RANKS, strict=True))


# ---- optimizer state


def test_full_rank_is_equal_everywhere_optimizers_included() -> None:
    def work(comm: Comm) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sync, block = attach(comm, "with-stale")
        for update in range(4):
            take_step(sync, block, update)
        assert sync.in_sync
        return copies(block.tensors()), copies(block.optimizer_state())

    first, *others = run_ranks(4, work, hosts=list(FOUR))
    for replica in others:
        for tensors, expected in zip(replica, first, strict=True):
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    moments = first[1]["tall.weight/exp_avg"]
    assert moments.shape == (9, 5)
    assert moments.abs().max() > 0


def test_moments_of_a_matrix_are_kept_while_it_is_factorized() -> None:
    """A merge restores them bit for bit, whatever the factors' own became; no others."""

    def work(comm: Comm) -> list[dict[str, Tensor]]:
        sync, block = attach(comm, "with-stale")
        step, history = block.update, list[dict[str, Tensor]]()

        def update_and_record(optimizer_step: Any = None) -> None:
            step(optimizer_step)
            history.append(copies(block.optimizer_state()))

        block.update = update_and_record  # type: ignore[method-assign]
        for update in range(4):
            take_step(sync, block, update)
        return [history[0], history[3], copies(block.optimizer_state())]

    for before, low_rank, after in run_ranks(2, work):
        assert before.keys() == after.keys()
        assert {"tall.weight/step", "tall.weight/exp_avg", "wide.bias/exp_avg_sq"} <= after.keys()
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]) == (".weight/" in key)
        trained = {key.rpartition("/")[0] for key in low_rank}
        assert len(trained & {"tall.weight.left", "tall.weight.right"}) == 1


def test_the_replicas_of_a_node_share_its_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each matrix is decomposed once per node; factors are equal there even where SVDs are not."""
    shapes_by_rank = defaultdict[int, list[tuple[int, ...]]](list)
    thread = local()

    def counted_svd(weight: Tensor) -> SVD:
        shapes_by_rank[thread.rank].append(tuple(weight.shape))
        u, s, v = svd(weight)
        return u * (1 + thread.rank), s, v

    def work(comm: Comm) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
        thread.rank = comm.rank
        sync, block = attach(comm, "full")
        before = comm.traffic.bytes_intra
        sync.after_update(clock_at(0, (1,) * 4))
        return factors(block), comm.traffic.bytes_intra - before

    monkeypatch.setattr("dtrain.syncs.ab.svd", counted_svd)
    replicas = run_ranks(4, work, hosts=["a", "b", "a", "b"])
    tall, wide, conv = (9, 5), (4, 9), (6, 2, 3, 3)
    assert dict(shapes_by_rank) == {0: [tall, conv], 1: [tall, conv], 2: [wide], 3: [wide]}
    lefts = [{name: left for name, (left, _) in pairs.items()} for pairs, _ in replicas]
    for one, other in ((0, 2), (1, 3)):
        assert all(torch.equal(left, lefts[other][name]) for name, left in lefts[one].items())
    assert not torch.equal(lefts[0]["tall.weight"], lefts[1]["tall.weight"])
    first, second = 8 * (5 * (9 + 5) + 6 * (6 + 18)), 8 * 4 * (4 + 9)
    assert [sent for _, sent in replicas] == [first, first, second, second]


# ---- whole runs


def test_one_replica_is_the_identity_and_groups_need_two(tmp_path: Path) -> None:
    ab = train_on(sync_run("ab", sync=FIELDS), tmp_path / "ab", "a")
    plain = train_on(sync_run("every-step"), tmp_path / "plain", "a")
    assert ab["digest"] == plain["digest"]
    with refuses(ConfigError, "sync.group-size"):
        train_on(sync_run("ab", sync=FIELDS | {"group-size": 4}), tmp_path / "one", FOUR)


def test_nothing_crosses_between_nodes_in_low_rank(tmp_path: Path) -> None:
    """Two groups, a node each: of eight updates one is full rank; the end merges factors, and
    moments of what stayed full rank."""
    sync = FIELDS | {"every": 99, "mode": "with-stale"}
    summary = train_on(sync_run("ab", sync=sync, **WIDE), tmp_path, FOUR)
    shapes = {name: tensor.shape for name, tensor in model(tmp_path).items()}
    total = sum(shape.numel() for shape in shapes.values())
    matrices = [
        shape
        for name, shape in shapes.items()
        if name.endswith("weight")
        and name not in ("fc1.weight", "head.weight")
        and not name.startswith("heads")
    ]
    whole = sum(shape.numel() for shape in matrices)
    merged = total - whole + sum(min(shape) * sum(shape) for shape in matrices)
    # One full update; the merge; two moments, and one step count each from the first replica.
    counts = 4 * (len(shapes) - len(matrices))
    assert summary["bytes_inter_node"] == 2 * 8 * (total + merged + 2 * (total - whole)) + counts
    assert whole < total


def test_killed_in_low_and_in_full_rank_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """Through the files of a checkpoint; `test_sync_laws` resumes after every update."""
    changes = {"sync": FIELDS, "epochs": 3, **WIDE}
    whole = train_on(sync_run("ab", **changes), tmp_path / "whole", "aab")
    run = sync_run("ab", checkpoint__every=1, **changes)
    for until in (3, 5):
        killed(run, tmp_path / "parts", until, "aab")
    resumed = train_on(run, tmp_path / "parts", "aab")
    assert (resumed["digest"], resumed["attempts"]) == (whole["digest"], 3)


def test_another_number_of_replicas_resumes_from_the_evaluation_weights(tmp_path: Path) -> None:
    run = sync_run("ab", sync=FIELDS | {"every": 99}, checkpoint__every=3, epochs=2, **WIDE)
    killed(run, tmp_path, 5, FOUR)
    summary = train_on(run, tmp_path, "ab")
    assert (summary["attempts"], summary["updates"]) == (2, 8)


def test_a_schedule_with_delayed_gradients_is_refused() -> None:
    delayed = {"objective__name": "backprop", "schedule__name": "pipelined", "micro_batches": 1}
    sync_run("every-step", **delayed)
    with pytest.raises(ConfigError):
        sync_run("ab", **delayed)


def test_subsets_of_a_block_are_refused(tmp_path: Path) -> None:
    with refuses(ConfigError, "sync.needs-whole-block"):
        train_on(sync_run("only-large", sync={"inner": {"name": "ab"}}), tmp_path)


@pytest.mark.parametrize(("key", "value"), [("every", 1), ("full-updates", 0), ("cutoff", -1.0)])
def test_numbers_that_are_too_small_are_refused(key: str, value: float) -> None:
    with refuses(ConfigError, "sync.too-small"):
        sync_run("ab", sync={key: value})


def test_the_rebound_acts(tmp_path: Path) -> None:
    train_on(sync_run("ab", sync=FIELDS, **WIDE), tmp_path / "rebound", FOUR)
    at_once = FIELDS | {"rebound-updates": 0}
    train_on(sync_run("ab", sync=at_once, **WIDE), tmp_path / "at-once", FOUR)
    with pytest.raises(AssertionError):
        close(tmp_path / "rebound", tmp_path / "at-once", 1e-6)
