"""What makes transfers smaller, over whole runs: bytes, identities, what survives a kill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError
from dtrain.syncs.common.compressor import QuantizedMean, slices
from dtrain.syncs.common.node_groups import NodeLeaders
from dtrain.syncs.demo import ChunkedDCT
from dtrain.syncs.int8 import Int8Codec
from dtrain.syncs.powersgd import PowerSGDCompressor
from dtrain.syncs.terngrad import TernaryCodec
from tests.outcome import close, model
from tests.ranks.killed import killed
from tests.ranks.test_local_sgd import replicas
from tests.ranks.test_rounds import FOUR, run, trained

UPDATES = 8  # of the tiny run
SMALLER = ("terngrad", "int8", "powersgd")
INNERS: dict[str, dict[str, Any]] = {
    "every-step": {},
    "local-sgd": {"every": 3},
    "diloco": {"every": 3},
    "daso": {"warmup-epochs": 1, "cooldown-epochs": 0, "max-global-skips": 2, "wait-factor": 2},
}
WIDE: dict[str, Any] = {"model__widths": [40, 30, 20]}
"""Matrices that are worth their factors."""


def around(name: str, inner: str, **fields: Any) -> dict[str, Any]:
    """Return the fields of a sync around another."""
    return {"name": name, "inner": {"name": inner, **INNERS[inner]}, **fields}


def shapes(out: Path) -> list[torch.Size]:
    """Return the shapes of all that a run has trained."""
    return [each.shape for each in model(out).values()]


# ---- bytes: two nodes of two replicas


def coded(out: Path, per_element: float) -> float:
    """Return the bytes of one node's code."""
    return sum(-(-shape.numel() // int(1 / per_element)) + 4 for shape in shapes(out))


def factors(out: Path, rank: int, worth: float = 2.0) -> int:
    """Return the elements of the factors and of all that travels as it is."""
    carrier, count = PowerSGDCompressor(rank, worth, ()), 0
    for shape in shapes(out):
        each = torch.empty(shape)
        thin = rank * (shape[0] + shape[1:].numel())
        count += thin if carrier.is_worth_compressing(each) else each.numel()
    return count


@pytest.mark.parametrize(("inner", "times"), [("every-step", UPDATES), ("local-sgd", 2)])
def test_bytes_between_nodes_are_the_formula(inner: str, times: int, tmp_path: Path) -> None:
    """m (m - 1) codes per mean; of factors 2 (m - 1) times the elements, 8 bytes each."""
    wanted = {
        "terngrad": lambda out: 2 * times * coded(out, 1 / 4),
        "int8": lambda out: 2 * times * coded(out, 1),
        "powersgd": lambda out: 2 * times * 8 * factors(out, 1),
    }
    for name, formula in wanted.items():
        out = tmp_path / name
        told = trained(run(name, sync=around(name, inner), **WIDE), out, FOUR)
        assert told["bytes_inter_node"] == formula(out), name
    plain = trained(run(inner, sync=INNERS[inner], **WIDE), tmp_path / "plain", FOUR)
    assert factors(tmp_path / "powersgd", 1) < plain["bytes_inter_node"] / (2 * times * 8)


def test_bytes_of_demo_are_the_formula(tmp_path: Path) -> None:
    """Six per coefficient, of each replica once to the other node."""
    told = trained(run("demo", sync={"keep": 3, "chunk": 8}, **WIDE), tmp_path, FOUR)
    cut = [ChunkedDCT(shape, 8) for shape in shapes(tmp_path)]
    message = sum(6 * each.count * min(3, each.size) for each in cut)
    assert told["bytes_inter_node"] == UPDATES * 4 * message
    # Inside: to the other of the node, and what the lead was given, by broadcast.
    assert told["bytes_intra_node"] == UPDATES * (4 * message + 2 * 4 * message)


# ---- identities


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("name", SMALLER)
def test_on_one_node_it_is_the_inner_sync(name: str, inner: str, tmp_path: Path) -> None:
    """Movements may be added up where weights were averaged, which rounds otherwise."""
    trained(run(inner, sync=INNERS[inner]), tmp_path / "inner", "aa")
    trained(run(name, sync=around(name, inner)), tmp_path / "outer", "aa")
    close(tmp_path / "inner", tmp_path / "outer", 1e-10)


@pytest.mark.parametrize("inner", INNERS)
def test_whole_factors_are_the_inner_sync(inner: str, tmp_path: Path) -> None:
    """PowerSGD of the smaller side's rank loses nothing."""
    full = around("powersgd", inner, rank=99, **{"min-compression-rate": 1.0})
    trained(run(inner, sync=INNERS[inner]), tmp_path / "inner")
    told = trained(run("powersgd", sync=full), tmp_path / "whole")
    close(tmp_path / "inner", tmp_path / "whole", 1e-9)
    assert told["attempts"] == 1


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("name", SMALLER)
def test_it_is_not_the_inner_sync_between_nodes(name: str, inner: str, tmp_path: Path) -> None:
    """What the identities above would miss."""
    trained(run(inner, sync=INNERS[inner], **WIDE), tmp_path / "inner")
    trained(run(name, sync=around(name, inner), **WIDE), tmp_path / "outer")
    with pytest.raises(AssertionError):
        close(tmp_path / "inner", tmp_path / "outer", 1e-6)


def normals(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_mean_of_low_rank_is_exact_at_once(rank: int) -> None:
    def work(comm: Comm) -> Tensor:
        low = normals((12, rank), comm.rank) @ normals((rank, 9), 7)  # all in one row space
        PowerSGDCompressor(rank, 1.0, ("q",)).mean_(
            comm, own := {"a": low.clone()}, 1 / comm.size, 0
        )
        comm.mean_([low])
        torch.testing.assert_close(own["a"], low, rtol=1e-9, atol=1e-11)
        return own["a"]

    one, two, three = ranks(3, work, hosts=list("abc"))
    assert torch.equal(one, two)
    assert torch.equal(one, three)


def test_what_was_applied_and_what_is_kept_is_all_there_was() -> None:
    """Sum over time of what came, plus the mean of errors, is the sum of the true means."""

    def work(comm: Comm) -> None:
        carrier, applied, true = PowerSGDCompressor(1, 1.0, ("q",)), 0.0, 0.0
        for update in range(5):
            mine = {"a": normals((12, 9), 10 * comm.rank + update)}
            exact = mine["a"].clone()
            comm.mean_([exact])
            carrier.mean_(comm, mine, 1 / comm.size, update)
            applied, true = applied + mine["a"], true + exact
        left = carrier.state()["error/a"].clone()
        comm.mean_([left])
        torch.testing.assert_close(applied + left, true, rtol=1e-12, atol=1e-12)
        assert left.abs().max() > 0.1

    ranks(2, work, hosts=list("ab"))


@pytest.mark.parametrize("code", [TernaryCodec(0.0), Int8Codec("dynamic")])
@pytest.mark.parametrize("hosts", ["ab", "aabb", "abbbc"])
def test_codes_of_nodes_add_up_to_the_mean(code: Any, hosts: str) -> None:
    """Weighted, in the order of nodes, the same bits everywhere; a node's sum is what is coded."""
    size = len(hosts)
    share = [(rank + 1) / sum(range(1, size + 1)) for rank in range(size)]

    def work(comm: Comm) -> dict[str, Tensor]:
        own = {"a": normals((5, 7), comm.rank).float(), "b": normals((3,), 50 + comm.rank).float()}
        QuantizedMean(code, ()).mean_(comm, own, share[comm.rank], 4)
        return own

    found = ranks(size, work, hosts=list(hosts))
    for name, shape, first in (("a", (5, 7), 0), ("b", (3,), 50)):
        assert all(torch.equal(each[name], found[0][name]) for each in found)
        wanted = torch.zeros(shape)
        for host in dict.fromkeys(hosts):
            members = [rank for rank in range(size) if hosts[rank] == host]
            node = sum((share[r] * normals(shape, first + r).float() for r in members), wanted * 0)
            data = code.encode(node.reshape(-1), (name, 4))
            wanted += code.decode(data, node.numel()).view(shape)
        if (
            code.can_reencode and len(set(hosts)) > 2
        ):  # the parts of a tensor have scales of their own
            assert (found[0][name] - wanted).abs().max() < 0.02 * wanted.abs().max()
        else:
            torch.testing.assert_close(found[0][name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hosts", ["abc", "aabbcd", "abcdefgh"])
@pytest.mark.parametrize("sizes", [{"a": (5, 7), "b": (3,)}, {"a": (1,)}, {"a": (2, 40)}])
def test_slices_send_as_little_as_a_mean(hosts: str, sizes: dict[str, tuple[int, ...]]) -> None:
    """2 (m - 1) bytes per number, and four for each part of a tensor; twice within half a step."""
    nodes = len(set(hosts))

    def work(comm: Comm) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        own = {n: normals(s, 9 * comm.rank + len(n)).float() for n, s in sizes.items()}
        exact = {name: each.clone() for name, each in own.items()}
        before = comm.traffic.bytes_inter
        QuantizedMean(Int8Codec("linear"), ()).mean_(comm, own, 1 / comm.size, 4)
        sent = comm.traffic.bytes_inter - before
        comm.mean_(exact)
        return own, exact, sent

    found = ranks(len(hosts), work, hosts=list(hosts))
    for own, exact, _ in found:
        for name, each in own.items():
            assert torch.equal(each, found[0][0][name])
            largest = max(float(t.abs().max()) for _, e, _ in found for t in e.values())
            assert (each - exact[name]).abs().max() <= (nodes + largest) / 127
    cut = slices({n: math.prod(s) for n, s in sizes.items()}, nodes)
    coded = [sum(b - a + 4 for _, a, b in own) for own in cut]
    back = nodes * max(coded)  # of one length
    assert sum(sent for _, _, sent in found) == (nodes - 1) * (sum(coded) + back)


def test_slices_are_all_there_is() -> None:
    sizes = {"a": 7, "b": 1, "c": 30}
    for count in (1, 2, 3, 8, 50):
        cut = slices(sizes, count)
        assert len(cut) == count
        for name, size in sizes.items():
            own = [chunk for part in cut for chunk in part if chunk.name == name]
            assert [i for _, a, b in own for i in range(a, b)] == [*range(size)]
        lengths = [sum(b - a for _, a, b in part) for part in cut]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("hosts", ["a", "aa", "ab", "aab", "abbbc"])
def test_a_hub_gathers_by_node(hosts: str) -> None:
    def work(comm: Comm) -> list[list[int]]:
        data = torch.tensor([comm.rank, 7], dtype=torch.uint8)
        return [each.tolist() for each in NodeLeaders(comm).allgather_bytes(data)]

    order = [r for h in dict.fromkeys(hosts) for r in range(len(hosts)) if hosts[r] == h]
    wanted = [[rank, 7] for rank in order]
    assert ranks(len(hosts), work, hosts=list(hosts)) == [wanted] * len(hosts)


# ---- DeMo


def test_everything_kept_and_no_momentum_is_sign_sgd(tmp_path: Path) -> None:
    """One replica, and Adam without memory, which takes the sign of the gradient, too.

    Without a hidden layer: what has no gradient moves by the sign of the transform's rounding.
    """
    linear = {"model__widths": [], "partition__blocks": 1, "objective__name": "backprop"}
    sgd = {"name": "sgd", "lr": 0.01}
    whole = {"decay": 0.0, "keep": 4096}
    trained(run("demo", sync=whole, optimizer=sgd, **linear), tmp_path / "demo", "a")
    sign = {"name": "adam", "lr": 0.01, "betas": [0.0, 0.0], "eps": 1e-300}
    trained(run("every-step", optimizer=sign, **linear), tmp_path / "sign", "a")
    close(tmp_path / "demo", tmp_path / "sign", 1e-9)


def test_what_is_told_leaves_the_momentum(tmp_path: Path) -> None:
    """Replicas agree on their weights, and keep momenta that differ."""
    trained(run("demo", sync={"keep": 2, "chunk": 8}), tmp_path, "ab")
    one, two = replicas(tmp_path, 2)
    momenta = [name for name in one if "momentum/" in name]
    assert momenta
    assert any(not torch.equal(one[name], two[name]) for name in momenta)
    plain = [name for name in one if name.partition("/")[0] not in ("optimizer", "sync")]
    assert all(torch.equal(one[name], two[name]) for name in plain)


def test_weight_decay_shrinks(tmp_path: Path) -> None:
    """As AdamW does: by the rate times the decay per update."""
    for decay in (0.0, 5.0):
        adamw = {"name": "adamw", "lr": 0.01, "weight-decay": decay}
        trained(run("demo", optimizer=adamw), tmp_path / str(decay), "a")
    norms = [
        sum(float(t.square().sum()) for t in model(tmp_path / str(decay)).values())
        for decay in (0.0, 5.0)
    ]
    assert norms[1] < 0.8 * norms[0]


def test_a_schedule_that_foretells_steps_is_refused() -> None:
    sgd = {"name": "sgd", "lr": 0.01, "momentum": 0.9}
    late = {"name": "pipelined", "compensation": "spike"}
    told = {"objective__name": "backprop", "schedule": late, "micro_batches": 1}
    with pytest.raises(
        DtrainError, match=r"compensation = \"spike\" goes by the rule of the optim"
    ):
        run("demo", optimizer=sgd, **told)


# ---- wrappers


@pytest.mark.parametrize("name", [*SMALLER, "demo", "local-sgd"])
def test_a_warm_up_without_end_is_every_step(name: str, tmp_path: Path) -> None:
    inner = {"inner": {"name": name}, "updates": 99}
    plain = trained(run("every-step"), tmp_path / "plain", FOUR)
    warm = trained(run("warmup", sync=inner), tmp_path / "warm", FOUR)
    assert warm["digest"] == plain["digest"]
    assert warm["bytes_inter_node"] == plain["bytes_inter_node"]


def test_after_the_warm_up_the_inner_sync_begins(tmp_path: Path) -> None:
    """Five of eight updates as they are; a tenth of the run by default."""
    for updates, whole in ((5, 5), (None, 0)):
        out = tmp_path / str(updates)
        left = {} if updates is None else {"updates": updates}
        told = trained(run("warmup", sync={"inner": {"name": "int8"}, **left}, **WIDE), out)
        n = 8 * sum(shape.numel() for shape in shapes(out))
        assert told["bytes_inter_node"] == whole * 2 * n + (UPDATES - whole) * 2 * coded(out, 1)


def test_small_tensors_are_averaged_exactly(tmp_path: Path) -> None:
    """Biases of 40 elements and less; all tensors large is the inner sync."""
    sync = {"inner": {"name": "int8"}, "elements": 41}
    told = trained(run("only-large", sync=sync, **WIDE), tmp_path / "part")
    large = [s.numel() for s in shapes(tmp_path / "part") if s.numel() > 40]
    small = [s.numel() for s in shapes(tmp_path / "part") if s.numel() <= 40]
    assert large
    assert small
    assert told["bytes_inter_node"] == UPDATES * (2 * sum(n + 4 for n in large) + 16 * sum(small))
    whole = trained(run("only-large", sync=sync | {"elements": 1}, **WIDE), tmp_path / "whole")
    inner = trained(run("int8", **WIDE), tmp_path / "inner")
    assert whole["digest"] == inner["digest"]


@pytest.mark.parametrize("inner", ["local-sgd", "diloco", "daso", "demo", "never"])
def test_small_tensors_are_equal_whatever_the_inner_sync(inner: str, tmp_path: Path) -> None:
    fields: Mapping[str, Any] = INNERS.get(inner, {})
    sync = {"inner": {"name": inner, **fields}, "elements": 41}
    trained(run("only-large", sync=sync, epochs=None, updates=7, **WIDE), tmp_path, "ab")
    one, two = replicas(tmp_path, 2)
    own = model(tmp_path)
    assert all(torch.equal(one[n], two[n]) for n in own if own[n].numel() <= 40)


# ---- a kill


CELLS = [
    *(("powersgd", inner) for inner in INNERS),
    ("terngrad", "local-sgd"),
    ("terngrad", "daso"),
    ("int8", "diloco"),
    ("demo", ""),
    ("warmup", "demo"),
    ("only-large", "daso"),
]


@pytest.mark.parametrize(("name", "inner"), CELLS)
def test_killed_and_resumed_is_uninterrupted(name: str, inner: str, tmp_path: Path) -> None:
    """Errors, momenta, draws, and where a round began, in the middle of a round or a flight."""
    told: dict[str, Any] = {"inner": {"name": inner, **INNERS.get(inner, {})}} if inner else {}
    told |= {"updates": 3} if name == "warmup" else {}
    hosts = "aab"
    whole = trained(run(name, sync=told, **WIDE), tmp_path / "whole", hosts)
    often = run(name, sync=told, checkpoint__every=1, **WIDE)
    for until in (2, 5):
        killed(often, tmp_path / "parts", until, hosts)
    again = trained(often, tmp_path / "parts", hosts)
    assert (again["digest"], again["attempts"]) == (whole["digest"], 3)


@pytest.mark.parametrize("name", ["powersgd", "demo"])
def test_another_number_of_replicas_goes_on_from_the_view(name: str, tmp_path: Path) -> None:
    trained(run(name, epochs=1, **WIDE), tmp_path, FOUR)
    told = trained(run(name, epochs=2, **WIDE), tmp_path, "ab")
    assert told["attempts"] == 2
    assert told["updates"] == UPDATES


def test_heat_sends_weights_which_are_not_made_smaller(tmp_path: Path) -> None:
    inner = {"name": "daso", "heat-compatible": True}
    with pytest.raises(DtrainError, match="heat-compatible sends weights"):
        trained(run("int8", sync={"inner": inner}), tmp_path, FOUR)


@pytest.mark.parametrize("inner", ["demo", "never", "int8", "only-large"])
def test_what_could_not_be_made_smaller_is_refused(inner: str) -> None:
    """It would change nothing, and nobody would know."""
    for name in SMALLER:
        with pytest.raises(
            DtrainError, match=rf"'{inner}' sends nothing that another sync can make"
        ):
            run(name, sync={"inner": {"name": inner}})


def test_movements_are_smaller_inside_a_warm_up(tmp_path: Path) -> None:
    """Whichever of the two stands around the other: three means, of one byte per element."""
    local = {"name": "local-sgd", "every": 2}
    whole = {"inner": {"name": "warmup", "updates": 2, "inner": local}}
    told = trained(run("int8", sync=whole, **WIDE), tmp_path, FOUR)
    gradients, means = 2, 3
    assert told["bytes_inter_node"] == (gradients + means) * 2 * coded(tmp_path, 1)


@pytest.mark.parametrize("name", SMALLER)
def test_factors_of_changing_rank_are_carried(name: str, tmp_path: Path) -> None:
    """AB inside, in groups that span nodes: what was kept of other shapes is let go."""
    fields = {"warmup-updates": 1, "every": 3, "full-updates": 1, "cutoff": 0.6}
    told = {"sync": {"inner": {"name": "ab", **fields}}, "epochs": 4, **WIDE}
    smaller = trained(run(name, **told), tmp_path / name, "abab")
    plain = trained(run("ab", sync=fields, epochs=4, **WIDE), tmp_path / "ab", "abab")
    assert smaller["bytes_inter_node"] < plain["bytes_inter_node"]
    assert smaller["updates"] == plain["updates"] == 16
