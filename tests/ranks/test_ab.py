"""AB training: phases, groups, merges and what survives, over blocks and over whole runs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import local
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from dtrain.block.block import Block
from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError
from dtrain.syncs.ab import AB
from dtrain.syncs.ab.phases import LOWEST_LR_FACTOR, Phases
from dtrain.syncs.base import UpdateClock
from dtrain.syncs.common.low_rank import SVD, svd
from tests import tiny
from tests.outcome import close, model
from tests.ranks.killed import killed
from tests.ranks.test_laws import trained as laid
from tests.ranks.test_rounds import FOUR, run, trained


def mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(0)


CLOCK = UpdateClock(0, 0, 100, 100, 0.1, 0.1, False, (1, 1, 1, 1))
WIDE: dict[str, Any] = {"model__widths": [40, 30, 20]}
FIELDS: dict[str, Any] = {"warmup-updates": 1, "every": 4, "full-updates": 1, "rebound-updates": 2}
MODES = ("with-stale", "only-learned", "full", "only-b")


def test_phases_are_those_of_the_paper() -> None:
    """Warm-up, low rank up to the next period, then full and low in turns."""
    kinds = "".join("l" if Phases(6, 5, 2, 0).is_low_rank(update) else "f" for update in range(25))
    assert kinds == "ffffff" + "llll" + "fflll" + "fflll" + "fflll"
    assert next(update for update in range(25) if Phases(6, 5, 2, 0).truncates(update)) == 10
    aligned = "".join(
        "l" if Phases(5, 5, 2, 0).is_low_rank(update) else "f" for update in range(15)
    )
    assert aligned == "fffff" + "lllll" + "fflll"


def test_phases_scale_with_the_run() -> None:
    sync = AB()
    assert sync.phases(replace(CLOCK, total_updates=300)) == Phases(120, 20, 2, 2)
    assert sync.phases(replace(CLOCK, total_updates=30000)) == Phases(12000, 2000, 200, 200)
    assert AB(warmup_updates=0, every=9, full_updates=2, rebound_updates=1).phases(CLOCK) == (
        Phases(0, 9, 2, 1)
    )


def test_the_rate_comes_back() -> None:
    sync = AB(every=20, rebound_updates=4)
    assert sync.lr_factor(CLOCK) == 1
    sync._last_change = 7
    found = [sync.lr_factor(replace(CLOCK, update=update)) for update in range(7, 13)]
    assert found == pytest.approx(
        [LOWEST_LR_FACTOR + (1 - LOWEST_LR_FACTOR) * j / 4 for j in range(4)] + [1, 1]
    )


def made(comm: Comm, mode: str, **fields: Any) -> tuple[AB, Block]:
    """Return a sync opened over a block of three matrices, tall, wide and a convolution."""
    torch.manual_seed(0)
    layers = {
        "tall": nn.Linear(5, 9),
        "wide": nn.Linear(9, 4),
        "conv": nn.Conv2d(2, 6, 3),
    }
    block = Block(0, {n: m.double() for n, m in layers.items()}, None, partial(optim.Adam, lr=0.1))
    sync = AB(mode=mode, warmup_updates=1, every=4, full_updates=1, **fields)  # type: ignore[arg-type]
    sync.setup(block, comm)
    return sync, block


def stepped(sync: AB, block: Block, update: int) -> None:
    """Take a step with a gradient of each replica's own, averaged where it is to be."""
    clock = replace(CLOCK, update=update, rows_per_replica=(1,) * sync.replicas.size)
    for number, parameter in enumerate(block.trainable_parameters):
        seed = 1000 * update + 10 * number + sync.replicas.rank
        generator = torch.Generator().manual_seed(seed)
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    group = sync.gradient_group(1 / sync.replicas.size, clock)
    if group is not None:
        group.comm.mean_(block.gradients(), group.weight)
    block.update()
    sync.after_update(clock)


def product(left: Tensor, right: Tensor, shape: Any) -> Tensor:
    return (left @ right).view(shape).detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_groups_train_one_factor_each_and_merge_as_the_mode_says(mode: str, size: int) -> None:
    def work(comm: Comm) -> dict[str, Any]:
        sync, block = made(comm, mode)
        stepped(sync, block, 0)  # full rank; then split, uncut
        whole = {n: product(f.left, f.right, f.shape) for n, f in block.low_rank_weights.items()}
        start = {
            n: (f.left.detach().clone(), f.right.detach().clone())
            for n, f in block.low_rank_weights.items()
        }
        learns = {
            n: (f.left.requires_grad, f.right.requires_grad)
            for n, f in block.low_rank_weights.items()
        }
        for update in (1, 2):
            stepped(sync, block, update)
        end = {
            n: (f.left.detach().clone(), f.right.detach().clone())
            for n, f in block.low_rank_weights.items()
        }
        shown = sync.evaluation_weights()
        stepped(sync, block, 3)
        return {
            "whole": whole, "start": start, "end": end, "learns": learns, "shown": shown,
            "a": sync.trains_a, "low": sync.in_low_rank, "names": list(block.parameters),
        }  # fmt: skip

    found = ranks(size, work, hosts=list("aabb"[:size]))
    first = found[0]
    assert [each["low"] for each in found] == [False] * size
    assert all(each["names"] == first["names"] for each in found)
    learners = [rank for rank, each in enumerate(found) if each["a"]]
    half = [] if mode == "only-b" else list(range(-(-size // 2)))
    assert learners == half
    for name, (rows, columns) in {"tall.weight": (9, 5), "wide.weight": (4, 9)}.items():
        tall = rows >= columns  # A is the tall factor
        for each in found:
            assert each["learns"][name] == (
                (each["a"], not each["a"]) if tall else (not each["a"], each["a"])
            )
            for side, moves in enumerate(each["learns"][name]):
                assert torch.equal(each["start"][name][side], each["end"][name][side]) != moves
        lefts = [each["end"][name][0] for each in found]
        rights = [each["end"][name][1] for each in found]
        a, b = (lefts, rights) if tall else (rights, lefts)
        if mode == "full":
            wanted = mean([left @ right for left, right in zip(lefts, rights, strict=True)])
        else:
            those = {
                "with-stale": (mean(a), mean(b)),
                "only-learned": (
                    mean([a[r] for r in learners] or a),
                    mean([b[r] for r in range(size) if r not in learners]),
                ),
                "only-b": (a[0], mean(b)),
            }[mode]
            wanted = those[0] @ those[1] if tall else those[1] @ those[0]
        for each in found:
            torch.testing.assert_close(each["shown"][name], wanted, rtol=1e-10, atol=1e-11)
            assert torch.equal(each["shown"][name], first["shown"][name])


def test_two_equal_groups_with_stale_move_half_way() -> None:
    """A' = (A1 + A0) / 2."""

    def work(comm: Comm) -> tuple[Tensor, Tensor, Tensor]:
        sync, block = made(comm, "with-stale")
        stepped(sync, block, 0)
        begun = block.low_rank_weights["tall.weight"].left.detach().clone()
        stepped(sync, block, 1)
        moved = block.low_rank_weights["tall.weight"].left.detach().clone()
        right = block.low_rank_weights["tall.weight"].right.detach().clone()
        return begun, moved, right, sync.evaluation_weights()["tall.weight"]  # type: ignore[return-value]

    (a0, a1, b0, shown), (rested, same, b1, _) = ranks(2, work)  # type: ignore[misc]
    assert torch.equal(rested, same)
    torch.testing.assert_close(shown, (a0 + a1) / 2 @ ((b0 + b1) / 2), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cutoff", [0.0, 0.5])
def test_all_replicas_cut_at_the_same_rank(cutoff: float) -> None:
    """At 0 nothing is lost; the first split never cuts."""

    def work(comm: Comm) -> list[list[int]]:
        sync, block = made(comm, "with-stale", cutoff=cutoff)
        told = []
        for update in range(6):
            stepped(sync, block, update)
            told.append([each.rank for each in block.low_rank_weights.values()])
        return told

    found = ranks(4, work)
    assert all(each == found[0] for each in found)
    whole = [5, 4, 6]
    assert found[0][:3] == [whole] * 3
    assert found[0][3] == []  # full rank
    assert (found[0][4] == whole) == (cutoff == 0)
    assert all(a <= b for a, b in zip(found[0][4], whole, strict=True))


def test_full_rank_is_equal_everywhere_optimizers_included() -> None:
    def work(comm: Comm) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sync, block = made(comm, "with-stale")
        for update in range(4):
            stepped(sync, block, update)
        assert sync.in_sync
        tensors = {name: each.clone() for name, each in block.tensors().items()}
        return tensors, {name: each.clone() for name, each in block.optimizer_state().items()}

    found = ranks(4, work, hosts=list("aabb"))
    for each in found[1:]:
        for mine, first in zip(each, found[0], strict=True):
            assert mine.keys() == first.keys()
            assert all(torch.equal(tensor, first[name]) for name, tensor in mine.items())
    memory = found[0][1]
    assert memory["tall.weight/exp_avg"].shape == (9, 5)
    assert memory["tall.weight/exp_avg"].abs().max() > 0


def test_moments_of_a_matrix_rest_while_it_is_a_product() -> None:
    """A merge gives them back, bit for bit, whatever the factors' own became; no others."""

    def work(comm: Comm) -> list[dict[str, Tensor]]:
        sync, block = made(comm, "with-stale")
        whole, told = block.update, list[dict[str, Tensor]]()

        def update() -> None:
            whole()
            told.append({name: each.clone() for name, each in block.optimizer_state().items()})

        block.update = update  # type: ignore[method-assign]
        for number in range(4):
            stepped(sync, block, number)
        return [told[0], told[3], {n: each.clone() for n, each in block.optimizer_state().items()}]

    for before, low, after in ranks(2, work):
        assert before.keys() == after.keys()
        assert {"tall.weight/step", "tall.weight/exp_avg", "wide.bias/exp_avg_sq"} <= after.keys()
        for name, each in before.items():
            assert torch.equal(each, after[name]) == (".weight/" in name)
        sides = {name.rpartition("/")[0] for name in low}
        assert len(sides & {"tall.weight.left", "tall.weight.right"}) == 1


def test_the_replicas_of_a_node_share_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each matrix is split once per node; factors are equal there even where SVDs are not."""
    made_by = defaultdict[int, list[tuple[int, ...]]](list)
    here = local()

    def counted(weight: Tensor) -> SVD:
        made_by[here.rank].append(tuple(weight.shape))
        u, s, v = svd(weight)
        return u * (1 + here.rank), s, v

    def work(comm: Comm) -> tuple[dict[str, Tensor], int]:
        here.rank = comm.rank
        sync, block = made(comm, "full")
        before = comm.traffic.bytes_intra
        sync.after_update(replace(CLOCK, update=0))
        sides = {n: f.left.detach().clone() for n, f in block.low_rank_weights.items()}
        return sides, comm.traffic.bytes_intra - before

    monkeypatch.setattr("dtrain.syncs.ab.svd", counted)
    found = ranks(4, work, hosts=["a", "b", "a", "b"])
    tall, wide, conv = (9, 5), (4, 9), (6, 2, 3, 3)
    assert dict(made_by) == {0: [tall, conv], 1: [tall, conv], 2: [wide], 3: [wide]}
    for one, other in ((0, 2), (1, 3)):
        for name, left in found[one][0].items():
            assert torch.equal(left, found[other][0][name])
    assert not torch.equal(found[0][0]["tall.weight"], found[1][0]["tall.weight"])
    first, second = 8 * (5 * (9 + 5) + 6 * (6 + 18)), 8 * 4 * (4 + 9)
    assert [sent for _, sent in found] == [first, first, second, second]


# ---- whole runs


def test_one_replica_is_the_identity_and_groups_need_two(tmp_path: Path) -> None:
    told = trained(run("ab", sync=FIELDS), tmp_path / "ab", "a")
    plain = trained(run("every-step"), tmp_path / "plain", "a")
    assert told["digest"] == plain["digest"]
    with pytest.raises(DtrainError, match=r"group-size = 4 puts all 4 replicas into one group"):
        trained(run("ab", sync=FIELDS | {"group-size": 4}), tmp_path / "one", FOUR)


def test_a_warm_up_without_end_is_every_step(tmp_path: Path) -> None:
    told = trained(run("ab", sync={"warmup-updates": 99}), tmp_path / "ab", FOUR)
    plain = trained(run("every-step"), tmp_path / "plain", FOUR)
    assert told["digest"] == plain["digest"]
    assert told["bytes_inter_node"] == plain["bytes_inter_node"]


def test_nothing_crosses_between_nodes_in_low_rank(tmp_path: Path) -> None:
    """Two groups, a node each: of eight updates one is full; the end merges, and moments of what
    stayed whole."""
    sync = FIELDS | {"every": 99, "mode": "with-stale"}
    told = trained(run("ab", sync=sync, **WIDE), tmp_path, FOUR)
    shapes = {name: each.shape for name, each in model(tmp_path).items()}
    total = sum(shape.numel() for shape in shapes.values())
    first, last = "fc1.weight", "head.weight"
    matrices = [
        shape
        for name, shape in shapes.items()
        if name.endswith("weight") and name not in (first, last) and not name.startswith("heads")
    ]
    whole = sum(shape.numel() for shape in matrices)
    factors = sum(min(shape) * sum(shape) for shape in matrices)
    merged = total - whole + factors
    # One full update; the merge; two moments, and one step count each from the first.
    counts = 4 * (len(shapes) - len(matrices))
    assert told["bytes_inter_node"] == 2 * 8 * (total + merged + 2 * (total - whole)) + counts
    assert whole < total


@pytest.mark.parametrize("mode", MODES)
def test_killed_in_any_phase_and_resumed_is_uninterrupted(mode: str, tmp_path: Path) -> None:
    sync = FIELDS | {"mode": mode}
    told = {"checkpoint__every": 1, "epochs": 3, **WIDE}
    whole = trained(run("ab", sync=sync, epochs=3, **WIDE), tmp_path / "whole", "aab")
    often = run("ab", sync=sync, **told)
    for until in (1, 3, 5, 7):
        killed(often, tmp_path / "parts", until, "aab")
    again = trained(often, tmp_path / "parts", "aab")
    assert (again["digest"], again["attempts"]) == (whole["digest"], 5)


def test_another_number_of_replicas_goes_on_from_the_view(tmp_path: Path) -> None:
    sync = FIELDS | {"every": 99}
    told = {"checkpoint__every": 3, "epochs": 2, **WIDE}
    killed(run("ab", sync=sync, **told), tmp_path, 5, FOUR)
    found = trained(run("ab", sync=sync, **told), tmp_path, "ab")
    assert (found["attempts"], found["updates"]) == (2, 8)


def test_any_number_of_stages_trains_the_same_bits(tmp_path: Path) -> None:
    """Factors are of one block, whoever holds it."""
    told = {"sync": FIELDS | {"name": "ab"}, "objective__name": "mono-forward", **WIDE}
    digests = {
        laid(tiny.run(mesh__stages=n, **told), tmp_path / str(n), n, 2, seed=n)["digest"]
        for n in (1, 2, 3)
    }
    assert len(digests) == 1


def test_a_late_schedule_is_refused() -> None:
    late = {"objective__name": "backprop", "schedule__name": "pipelined", "micro_batches": 1}
    with pytest.raises(
        DtrainError, match=r"'pipelined' learns late with weights that \[sync\] 'ab'"
    ):
        run("ab", **late)


def test_parts_of_a_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match="'ab' needs whole blocks"):
        trained(run("only-large", sync={"inner": {"name": "ab"}}), tmp_path)


def test_the_rebound_and_the_debug_mode_change_no_bit(tmp_path: Path) -> None:
    plain = trained(run("ab", sync=FIELDS, **WIDE), tmp_path / "plain", FOUR)
    debug = trained(run("ab", sync=FIELDS, debug=True, **WIDE), tmp_path / "debug", FOUR)
    assert debug["digest"] == plain["digest"]
    other = FIELDS | {"rebound-updates": 0}
    trained(run("ab", sync=other, **WIDE), tmp_path / "other", FOUR)
    with pytest.raises(AssertionError):
        close(tmp_path / "plain", tmp_path / "other", 1e-6)
