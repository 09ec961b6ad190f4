"""OIALR: bases that rest, ranks that fall, and what survives, over blocks and over whole runs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from dtrain.block.block import Block
from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError
from dtrain.syncs.base import UpdateClock
from dtrain.syncs.oialr import OIALR
from tests import tiny
from tests.outcome import close, model
from tests.ranks.killed import killed
from tests.ranks.test_laws import trained as laid
from tests.ranks.test_rounds import FOUR, run, trained

CLOCK = UpdateClock(0, 0, 100, 100, 0.1, 0.1, False, (1,))
WIDE: dict[str, Any] = {"model__widths": [40, 30, 20]}
FIELDS: dict[str, Any] = {"delay-updates": 1, "every": 2, "cutoff": 0.3, "share": 0.5}
NAMES = ("tall.weight", "wide.weight", "conv.weight")


def made(comm: Comm, **fields: Any) -> tuple[OIALR, Block]:
    """Return a sync opened over a block of three matrices, tall, wide and a convolution."""
    torch.manual_seed(0)
    layers = {"tall": nn.Linear(5, 9), "wide": nn.Linear(9, 4), "conv": nn.Conv2d(2, 6, 3)}
    block = Block(0, {n: m.double() for n, m in layers.items()}, None, partial(optim.Adam, lr=0.1))
    told: dict[str, Any] = {"delay_updates": 1, "every": 1, "share": 1.0}
    sync = OIALR(**told | fields)
    sync.setup(block, comm)
    return sync, block


def stepped(sync: OIALR, block: Block, update: int) -> None:
    """Take a step with a mean gradient of draws of each replica's own."""
    size = sync.replicas.size
    clock = replace(CLOCK, update=update, rows_per_replica=(1,) * size)
    for number, parameter in enumerate(block.trainable_parameters):
        generator = torch.Generator().manual_seed(1000 * update + 10 * number + sync.replicas.rank)
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    group = sync.gradient_group(1 / size, clock)
    assert group is not None
    group.comm.mean_(block.gradients(), group.weight)
    block.update()
    sync.after_update(clock)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in tensors.items()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_only_the_core_learns_in_orthonormal_bases_that_are_equal_everywhere(size: int) -> None:
    def work(comm: Comm) -> dict[str, Any]:
        sync, block = made(comm, every=9)
        before = copied(block.tensors())
        stepped(sync, block, 0)
        after = copied(sync.evaluation_weights())
        sides = {
            n: [s.detach().clone() for s in f.factors] for n, f in block.low_rank_weights.items()
        }
        stepped(sync, block, 1)
        for name, (left, core, right) in sides.items():
            own = block.low_rank_weights[name].factors
            assert torch.equal(own[0], left)
            assert torch.equal(own[2], right)
            assert not torch.equal(own[1], core)
            torch.testing.assert_close(left.T @ left, torch.eye(len(core)).to(left))
            torch.testing.assert_close(right @ right.T, torch.eye(len(core)).to(left))
        assert not torch.equal(before["tall.bias"], after["tall.bias"])
        return {"after": after, "sides": sides, "end": copied(block.tensors())}

    found = ranks(size, work, hosts=list("aabb"[:size]))
    assert set(found[0]["sides"]) == set(NAMES)
    for each in found[1:]:
        for name, tensor in found[0]["end"].items():
            assert torch.equal(each["end"][name], tensor)


def test_a_split_and_a_cut_of_nothing_keep_the_matrix() -> None:
    """W = U S V' at the start; singular values of zero go, and the matrix stays."""

    def work(comm: Comm) -> None:
        sync, block = made(comm, cutoff=1e-9)
        weights = {name: block.parameters[name].detach().clone() for name in NAMES}
        sync._factorize_all()
        for name, weight in weights.items():
            torch.testing.assert_close(
                sync.evaluation_weights()[name], weight, rtol=1e-12, atol=1e-13
            )
        made_of = block.low_rank_weights["wide.weight"]
        core = made_of.factors[1]
        drawn = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        core.data = drawn[0, :, :2] @ drawn[1, :2]  # of rank 2, in no basis of its own
        shown = sync.evaluation_weights()["wide.weight"].clone()
        sync._truncate_round(1)
        assert made_of.rank == 2
        assert torch.equal(made_of.factors[1], made_of.factors[1].diag().diag())
        torch.testing.assert_close(
            sync.evaluation_weights()["wide.weight"], shown, rtol=1e-10, atol=1e-12
        )

    ranks(2, work)


@pytest.mark.parametrize("cutoff", [0.0, 0.5, 5.0])
def test_ranks_fall_by_half_at_most_and_stop_at_a_hundredth(cutoff: float) -> None:
    """At 0 nothing goes."""

    def work(comm: Comm) -> list[list[int]]:
        sync, block = made(comm, cutoff=cutoff)
        told = []
        for update in range(8):
            stepped(sync, block, update)
            told.append([block.low_rank_weights[name].rank for name in NAMES])
        return told

    told, *others = ranks(2, work)
    assert others == [told]
    assert told[0] == [5, 4, 6]
    for before, after in itertools.pairwise(told):
        assert all(-(-a // 2) <= b <= a for a, b in zip(before, after, strict=True))
    assert (told[-1] == told[0]) == (cutoff == 0)
    if cutoff > 1:  # everything would go
        assert told[1] == [3, 2, 3]
        assert told[-1] == [1, 1, 1]


def test_the_last_matrices_are_tested_first_and_rest_after_a_cut() -> None:
    def work(comm: Comm) -> list[list[int]]:
        sync, block = made(comm, cutoff=5.0, share=0.33, rest_rounds=2)
        told = []
        for update in range(6):
            stepped(sync, block, update)
            told.append([block.low_rank_weights[name].rank for name in NAMES])
        return told

    told = ranks(2, work)[0]
    assert told == [[5, 4, 6], [5, 4, 3], [5, 2, 3], [3, 2, 3], [3, 2, 2], [3, 1, 2]]


def test_a_start_at_a_part_of_the_rank() -> None:
    def work(comm: Comm) -> list[int]:
        sync, block = made(comm, first_rank=0.5)
        stepped(sync, block, 0)
        return [each.rank for each in block.low_rank_weights.values()]

    assert ranks(2, work)[0] == [3, 2, 3]


def test_moments_of_the_core_begin_anew_and_those_of_others_go_on() -> None:
    def work(comm: Comm) -> None:
        sync, block = made(comm, cutoff=5.0)
        stepped(sync, block, 0)
        memory = block.optimizer_state()
        assert not any(key.startswith("tall.weight") for key in memory)
        assert memory["tall.bias/exp_avg"].abs().max() > 0
        stepped(sync, block, 1)
        assert block.optimizer_state()["tall.weight.core/exp_avg"].shape == (3, 3)

    ranks(2, work)


# ---- whole runs


def test_many_replicas_train_what_one_does(tmp_path: Path) -> None:
    told = {"sync": FIELDS, **WIDE}
    one = trained(run("oialr", **told), tmp_path / "one", "a")
    trained(run("oialr", **told), tmp_path / "four", FOUR)
    close(tmp_path / "one", tmp_path / "four", 1e-9)
    plain = trained(run("every-step", **WIDE), tmp_path / "plain", "a")
    assert plain["digest"] != one["digest"]


def test_a_delay_without_end_is_every_step(tmp_path: Path) -> None:
    told = trained(run("oialr", sync={"delay-updates": 99}), tmp_path / "oialr", FOUR)
    plain = trained(run("every-step"), tmp_path / "plain", FOUR)
    assert told["digest"] == plain["digest"]
    assert told["bytes_inter_node"] == plain["bytes_inter_node"]
    assert told["low_rank"] == {}
    assert told["traffic_saved"] == 0


def test_bytes_are_those_of_cores_and_splits(tmp_path: Path) -> None:
    """Two nodes: one full update of eight, then k^2 for each matrix, and one split of all."""
    told = trained(run("oialr", sync=FIELDS | {"every": 99}, **WIDE), tmp_path, FOUR)
    shapes = {name: each.shape for name, each in model(tmp_path).items()}
    total = sum(shape.numel() for shape in shapes.values())
    matrices = {
        name: shape
        for name, shape in shapes.items()
        if name in told["low_rank"] and name not in ("fc1.weight", "head.weight")
    }
    assert set(told["low_rank"]) == set(matrices) == {"fc2.weight", "fc3.weight"}
    ranks_ = {name: min(shape) for name, shape in matrices.items()}
    cores = sum(rank**2 for rank in ranks_.values())
    whole = sum(shape.numel() for shape in matrices.values())
    splits = sum(rank * (sum(matrices[name]) + 1) for name, rank in ranks_.items())
    sent = 2 * (total + 7 * (total - whole + cores)) + splits
    assert told["bytes_inter_node"] == 8 * sent
    assert told["traffic_saved"] == pytest.approx(1 - sent / (2 * 8 * total), abs=1e-12)
    for name, row in told["low_rank"].items():
        numbers, rank = matrices[name].numel(), ranks_[name]
        mine = 2 * (numbers + 7 * rank**2) + rank * (sum(matrices[name]) + 1)
        assert row["rank"] == rank
        assert row["compression"] == 1  # at full rank the matrix itself is smaller
        assert row["traffic_saved"] == pytest.approx(1 - mine / (2 * 8 * numbers), abs=1e-12)


def test_killed_at_any_time_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    sync = {"delay-updates": 3, "every": 2, "cutoff": 0.6, "share": 1.0}
    told = {"sync": sync, "epochs": 3, **WIDE}
    whole = trained(run("oialr", **told), tmp_path / "whole", "aab")
    often = run("oialr", checkpoint__every=1, **told)
    for until in (2, 3, 5, 8):
        killed(often, tmp_path / "parts", until, "aab")
    again = trained(often, tmp_path / "parts", "aab")
    assert (again["digest"], again["attempts"]) == (whole["digest"], 5)
    assert again["low_rank"] == whole["low_rank"]
    assert again["traffic_saved"] == whole["traffic_saved"]
    assert all(row["compression"] > 1 for row in whole["low_rank"].values())


def test_another_number_of_replicas_goes_on_in_low_rank(tmp_path: Path) -> None:
    """All hold the same factors, so any of them can."""
    told = {"sync": FIELDS, "epochs": 2, **WIDE}
    trained(run("oialr", **told), tmp_path / "whole", FOUR)
    often = run("oialr", checkpoint__every=3, **told)
    killed(often, tmp_path / "parts", 5, FOUR)
    found = trained(often, tmp_path / "parts", "ab")
    assert (found["attempts"], found["updates"]) == (2, 8)
    close(tmp_path / "whole", tmp_path / "parts", 1e-9)


def test_any_number_of_stages_trains_the_same_bits(tmp_path: Path) -> None:
    told = {"sync": FIELDS | {"name": "oialr"}, "objective__name": "mono-forward", **WIDE}
    digests = {
        laid(tiny.run(mesh__stages=n, **told), tmp_path / str(n), n, 2, seed=n)["digest"]
        for n in (1, 2, 3)
    }
    assert len(digests) == 1


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    late = {"objective__name": "backprop", "schedule__name": "pipelined", "micro_batches": 1}
    with pytest.raises(DtrainError, match=r"'pipelined' learns late with weights that \[sync\]"):
        run("oialr", **late)
    with pytest.raises(DtrainError, match="'oialr' needs whole blocks"):
        trained(run("only-large", sync={"inner": {"name": "oialr"}}), tmp_path)
    for key in ("delay-updates", "every"):
        with pytest.raises(DtrainError, match=f"{key} = 0 is too small: give at least 1"):
            run("oialr", sync={key: 0})
    with pytest.raises(DtrainError, match=r"first-rank = 1\.5 is no part: give at most 1"):
        run("oialr", sync={"first-rank": 1.5})
    for key, low in {"every": 2, "full-updates": 1}.items():
        with pytest.raises(DtrainError, match=f"{key} = 0 is too small: give at least {low}"):
            run("ab", sync={key: 0})


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
        stepped(sync, block, 0)
        assert sync.low_rank_stats()["one.scale"]["held"] == 1
        return [*block.low_rank_weights]

    assert ranks(2, work) == [["one.linear.weight"]] * 2


def test_debug_mode_changes_no_bit_and_codes_go_around_it(tmp_path: Path) -> None:
    plain = trained(run("oialr", sync=FIELDS, **WIDE), tmp_path / "plain", FOUR)
    debug = trained(run("oialr", sync=FIELDS, debug=True, **WIDE), tmp_path / "debug", FOUR)
    assert debug["digest"] == plain["digest"]
    inner = {"inner": {"name": "oialr", **FIELDS}}
    coded = trained(run("int8", sync=inner, debug=True, **WIDE), tmp_path / "coded", FOUR)
    assert coded["bytes_inter_node"] < 0.45 * plain["bytes_inter_node"]
