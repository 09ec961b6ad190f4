"""Compressing syncs, DeMo and the wrappers: bytes, identities and error feedback."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.common.compressor import Codec, QuantizedMean, slices
from dtrain.syncs.common.node_groups import NodeLeaders
from dtrain.syncs.demo import ChunkedDCT
from dtrain.syncs.int8 import Int8Codec
from dtrain.syncs.powersgd import PowerSGDCompressor
from dtrain.syncs.terngrad import TernaryCodec
from tests.harness import FULL
from tests.outcome import close, model
from tests.ranks.killed import killed
from tests.ranks.sync_runs import FOUR, UPDATES, WIDE, replica_tensors, sync_run, train_on
from tests.refusals import refuses

COMPRESSED = ("terngrad", "int8", "powersgd")
INNERS: dict[str, dict[str, Any]] = {
    "every-step": {},
    "local-sgd": {"every": 3},
    "diloco": {"every": 3},
    "daso": {"warmup-epochs": 1, "cooldown-epochs": 0, "max-global-skips": 2, "wait-factor": 2},
}


def around(inner: str, **fields: Any) -> dict[str, Any]:
    """Return the fields of a wrapper around an inner sync."""
    return {"inner": {"name": inner, **INNERS[inner]}, **fields}


def shapes(out: Path) -> list[torch.Size]:
    """Return the shapes of all trained tensors of a run."""
    return [tensor.shape for tensor in model(out).values()]


# ---- bytes: two nodes of two replicas


def code_bytes(out: Path, bytes_per_element: float) -> int:
    """Return the bytes of one node's code, with a scale for each tensor."""
    per_byte = int(1 / bytes_per_element)
    return sum(-(-shape.numel() // per_byte) + 4 for shape in shapes(out))


def powersgd_elements(out: Path, rank: int) -> int:
    """Return the elements of the factors and of all tensors that are not compressed."""
    compressor, count = PowerSGDCompressor(rank, 2.0, ()), 0
    for shape in shapes(out):
        tensor = torch.empty(shape)
        factors = rank * (shape[0] + shape[1:].numel())
        count += factors if compressor.is_worth_compressing(tensor) else tensor.numel()
    return count


@pytest.mark.parametrize(("inner", "means"), [("every-step", UPDATES), ("local-sgd", 2)])
def test_bytes_between_nodes_are_the_formula(inner: str, means: int, tmp_path: Path) -> None:
    """m (m - 1) codes per mean; for PowerSGD 2 (m - 1) times the elements, 8 bytes each."""
    inter = {}
    for name in COMPRESSED:
        run = sync_run(name, sync=around(inner), **WIDE)
        inter[name] = train_on(run, tmp_path / name, FOUR)["bytes_inter_node"]
    elements = powersgd_elements(tmp_path / "powersgd", 1)
    assert inter == {
        "terngrad": 2 * means * code_bytes(tmp_path / "terngrad", 1 / 4),
        "int8": 2 * means * code_bytes(tmp_path / "int8", 1),
        "powersgd": 2 * means * 8 * elements,
    }
    plain = train_on(sync_run(inner, sync=INNERS[inner], **WIDE), tmp_path / "plain", FOUR)
    assert elements < plain["bytes_inter_node"] / (2 * means * 8)


def test_bytes_of_demo_are_the_formula(tmp_path: Path) -> None:
    """Six per coefficient, of each replica once to the other node."""
    summary = train_on(sync_run("demo", sync={"keep": 3, "chunk": 8}, **WIDE), tmp_path, FOUR)
    chunked = [ChunkedDCT(shape, 8) for shape in shapes(tmp_path)]
    message = sum(6 * dct.count * min(3, dct.size) for dct in chunked)
    assert summary["bytes_inter_node"] == UPDATES * 4 * message
    # Inside: to the other replica of the node, and the broadcast of what the leader received.
    assert summary["bytes_intra_node"] == UPDATES * (4 * message + 2 * 4 * message)


# ---- identities


@pytest.fixture(scope="module")
def inner_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a run under an inner sync alone, which is trained once."""

    @cache
    def trained_folder(inner: str, hosts: str, wide: bool = False) -> Path:
        out = tmp_path_factory.mktemp("inner")
        train_on(sync_run(inner, sync=INNERS[inner], **(WIDE if wide else {})), out, hosts)
        return out

    return trained_folder


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("name", COMPRESSED)
def test_on_one_node_it_is_the_inner_sync(
    name: str, inner: str, inner_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Deltas may be added up where weights were averaged, which rounds otherwise."""
    train_on(sync_run(name, sync=around(inner)), tmp_path, "aa")
    close(inner_run(inner, "aa"), tmp_path, 1e-10)


@pytest.mark.parametrize("inner", INNERS)
def test_factors_of_full_rank_are_the_inner_sync(
    inner: str, inner_run: Callable[..., Path], tmp_path: Path
) -> None:
    """PowerSGD of the smaller side's rank loses nothing."""
    full = around(inner, rank=99, **{"min-compression-rate": 1.0})
    train_on(sync_run("powersgd", sync=full), tmp_path)
    close(inner_run(inner, "ab"), tmp_path, 1e-9)


@pytest.mark.parametrize("inner", INNERS if FULL else ["every-step", "diloco"])
@pytest.mark.parametrize("name", COMPRESSED)
def test_it_is_not_the_inner_sync_between_nodes(
    name: str, inner: str, inner_run: Callable[..., Path], tmp_path: Path
) -> None:
    """The identities above could not fail otherwise, for means of gradients and of deltas."""
    train_on(sync_run(name, sync=around(inner), **WIDE), tmp_path, "ab")
    with pytest.raises(AssertionError):
        close(inner_run(inner, "ab", wide=True), tmp_path, 1e-6)


# ---- compressors


def normals(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_mean_of_low_rank_is_exact_at_once(rank: int) -> None:
    def work(comm: Comm) -> Tensor:
        exact = normals((12, rank), comm.rank) @ normals((rank, 9), 7)  # all in one row space
        tensors = {"a": exact.clone()}
        PowerSGDCompressor(rank, 1.0, ("q",)).mean_(comm, tensors, 1 / comm.size, 0)
        comm.mean_([exact])
        torch.testing.assert_close(tensors["a"], exact, rtol=1e-9, atol=1e-11)
        return tensors["a"]

    first, *others = run_ranks(3, work, hosts=list("abc"))
    assert all(torch.equal(first, other) for other in others)


def test_what_was_applied_and_what_is_kept_is_all_there_was() -> None:
    """The sum over time of results, plus the mean error, is the sum of the exact means."""

    def work(comm: Comm) -> None:
        compressor, applied, exact_sum = PowerSGDCompressor(1, 1.0, ("q",)), 0.0, 0.0
        for update in range(5):
            tensors = {"a": normals((12, 9), 10 * comm.rank + update)}
            exact = tensors["a"].clone()
            comm.mean_([exact])
            compressor.mean_(comm, tensors, 1 / comm.size, update)
            applied, exact_sum = applied + tensors["a"], exact_sum + exact
        error = compressor.state()["error/a"].clone()
        comm.mean_([error])
        torch.testing.assert_close(applied + error, exact_sum, rtol=1e-12, atol=1e-12)
        assert error.abs().max() > 0.1

    run_ranks(2, work, hosts=list("ab"))


@pytest.mark.parametrize("codec", [TernaryCodec(0.0), Int8Codec("dynamic")])
@pytest.mark.parametrize("hosts", ["ab", "aabb", "abbbc"])
def test_codes_of_nodes_add_up_to_the_mean(codec: Codec, hosts: str) -> None:
    """Weighted, in the order of nodes, the same bits everywhere; a node's sum is encoded."""
    size = len(hosts)
    weights = [(rank + 1) / sum(range(1, size + 1)) for rank in range(size)]
    tensors = {"a": ((5, 7), 0), "b": ((3,), 50)}  # shape and first seed

    def work(comm: Comm) -> dict[str, Tensor]:
        local = {
            n: normals(shape, seed + comm.rank).float() for n, (shape, seed) in tensors.items()
        }
        QuantizedMean(codec, ()).mean_(comm, local, weights[comm.rank], 4)
        return local

    results = run_ranks(size, work, hosts=list(hosts))
    for name, (shape, seed) in tensors.items():
        assert all(torch.equal(result[name], results[0][name]) for result in results)
        expected = torch.zeros(shape)
        for host in dict.fromkeys(hosts):
            node = torch.zeros(shape)
            for rank in range(size):
                if hosts[rank] == host:
                    node += weights[rank] * normals(shape, seed + rank).float()
            data = codec.encode(node.reshape(-1), (name, 4))
            expected += codec.decode(data, node.numel()).view(shape)
        if codec.can_reencode and len(set(hosts)) > 2:  # slices have scales of their own
            error = (results[0][name] - expected).abs().max()
            assert error < 0.02 * expected.abs().max()
        else:
            torch.testing.assert_close(results[0][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hosts", ["abc", "aabbcd", "abcdefgh"])
@pytest.mark.parametrize("sizes", [{"a": (5, 7), "b": (3,)}, {"a": (1,)}, {"a": (2, 40)}])
def test_slices_send_as_little_as_a_mean(hosts: str, sizes: dict[str, tuple[int, ...]]) -> None:
    """2 (m - 1) bytes per number, and four for each part of a tensor; twice within half a step."""
    nodes = len(set(hosts))

    def work(comm: Comm) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        tensors = {
            name: normals(shape, 9 * comm.rank + len(name)).float() for name, shape in sizes.items()
        }
        exact = {name: tensor.clone() for name, tensor in tensors.items()}
        before = comm.traffic.bytes_inter
        QuantizedMean(Int8Codec("linear"), ()).mean_(comm, tensors, 1 / comm.size, 4)
        sent = comm.traffic.bytes_inter - before
        comm.mean_(exact)
        return tensors, exact, sent

    results = run_ranks(len(hosts), work, hosts=list(hosts))
    for tensors, exact, _ in results:
        for name, tensor in tensors.items():
            assert torch.equal(tensor, results[0][0][name])
            largest = max(float(t.abs().max()) for _, means, _ in results for t in means.values())
            assert (tensor - exact[name]).abs().max() <= (nodes + largest) / 127
    elements = {name: math.prod(shape) for name, shape in sizes.items()}
    slice_bytes = [
        sum(stop - start + 4 for _, start, stop in chunks) for chunks in slices(elements, nodes)
    ]
    returned = nodes * max(slice_bytes)  # all messages have one length
    assert sum(sent for _, _, sent in results) == (nodes - 1) * (sum(slice_bytes) + returned)


def test_slices_hold_every_element_once() -> None:
    sizes = {"a": 7, "b": 1, "c": 30}
    for count in (1, 2, 3, 8, 50):
        parts = slices(sizes, count)
        assert len(parts) == count
        for name, size in sizes.items():
            chunks = [chunk for part in parts for chunk in part if chunk.name == name]
            assert [i for _, start, stop in chunks for i in range(start, stop)] == [*range(size)]
        lengths = [sum(stop - start for _, start, stop in part) for part in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("hosts", ["a", "aa", "ab", "aab", "abbbc"])
def test_leaders_gather_by_node(hosts: str) -> None:
    def work(comm: Comm) -> list[list[int]]:
        data = torch.tensor([comm.rank, 7], dtype=torch.uint8)
        return [part.tolist() for part in NodeLeaders(comm).allgather_bytes(data)]

    order = [r for host in dict.fromkeys(hosts) for r in range(len(hosts)) if hosts[r] == host]
    expected = [[rank, 7] for rank in order]
    assert run_ranks(len(hosts), work, hosts=list(hosts)) == [expected] * len(hosts)


# ---- DeMo


def test_with_all_coefficients_and_no_momentum_demo_is_sign_sgd(tmp_path: Path) -> None:
    """One replica, and Adam without memory, whose step is the sign of the gradient, too.

    Without a hidden layer: weights without gradient move by the sign of the transform's rounding.
    """
    linear = {"model__widths": [], "partition__blocks": 1, "objective__name": "backprop"}
    sgd = {"name": "sgd", "lr": 0.01}
    whole = {"decay": 0.0, "keep": 4096}
    train_on(sync_run("demo", sync=whole, optimizer=sgd, **linear), tmp_path / "demo", "a")
    sign = {"name": "adam", "lr": 0.01, "betas": [0.0, 0.0], "eps": 1e-300}
    train_on(sync_run("every-step", optimizer=sign, **linear), tmp_path / "sign", "a")
    close(tmp_path / "demo", tmp_path / "sign", 1e-9)


def test_replicas_of_demo_have_equal_weights_and_other_momenta(tmp_path: Path) -> None:
    train_on(sync_run("demo", sync={"keep": 2, "chunk": 8}), tmp_path, "ab")
    one, two = replica_tensors(tmp_path, 2)
    momenta = [name for name in one if "momentum/" in name]
    assert momenta
    assert any(not torch.equal(one[name], two[name]) for name in momenta)
    weights = [name for name in one if name.partition("/")[0] not in ("optimizer", "sync")]
    assert all(torch.equal(one[name], two[name]) for name in weights)


def test_weight_decay_of_demo_shrinks_weights(tmp_path: Path) -> None:
    """As AdamW does: by the rate times the decay per update."""
    norms = []
    for decay in (0.0, 5.0):
        adamw = {"name": "adamw", "lr": 0.01, "weight-decay": decay}
        train_on(sync_run("demo", optimizer=adamw), tmp_path / str(decay), "a")
        weights = model(tmp_path / str(decay)).values()
        norms.append(sum(float(weight.square().sum()) for weight in weights))
    assert norms[1] < 0.8 * norms[0]


def test_a_schedule_that_relies_on_the_optimizers_step_is_refused() -> None:
    changes: dict[str, Any] = {
        "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
        "schedule": {"name": "pipelined", "compensation": "spike"},
        "objective__name": "backprop",
        "micro_batches": 1,
    }
    sync_run("every-step", **changes)
    with pytest.raises(ConfigError):
        sync_run("demo", **changes)


# ---- wrappers


def test_after_the_warm_up_the_inner_sync_starts(tmp_path: Path) -> None:
    """Five of eight updates are exact; by default a tenth of the run, which is none here."""
    for fields, exact in (({"updates": 5}, 5), ({}, 0)):
        out = tmp_path / str(exact)
        run = sync_run("warmup", sync={"inner": {"name": "int8"}, **fields}, **WIDE)
        n = train_on(run, out)["bytes_inter_node"]
        exact_bytes = 2 * 8 * sum(shape.numel() for shape in shapes(out))
        assert n == exact * exact_bytes + (UPDATES - exact) * 2 * code_bytes(out, 1)


def test_small_tensors_are_averaged_exactly(tmp_path: Path) -> None:
    """Biases of 40 elements and less; if all tensors are large it is the inner sync."""
    sync = {"inner": {"name": "int8"}, "elements": 41}
    summary = train_on(sync_run("only-large", sync=sync, **WIDE), tmp_path / "part")
    sizes = [shape.numel() for shape in shapes(tmp_path / "part")]
    large = [size for size in sizes if size > 40]
    small = [size for size in sizes if size <= 40]
    assert large
    assert small
    per_update = 2 * sum(size + 4 for size in large) + 2 * 8 * sum(small)
    assert summary["bytes_inter_node"] == UPDATES * per_update
    all_large = sync_run("only-large", sync=sync | {"elements": 1}, **WIDE)
    whole = train_on(all_large, tmp_path / "whole")
    inner = train_on(sync_run("int8", **WIDE), tmp_path / "inner")
    assert whole["digest"] == inner["digest"]


@pytest.mark.parametrize("inner", ["local-sgd", "diloco", "daso", "demo", "never"])
def test_small_tensors_are_equal_whatever_the_inner_sync(inner: str, tmp_path: Path) -> None:
    fields: Mapping[str, Any] = INNERS.get(inner, {})
    sync = {"inner": {"name": inner, **fields}, "elements": 41}
    train_on(sync_run("only-large", sync=sync, epochs=None, updates=7, **WIDE), tmp_path, "ab")
    one, two = replica_tensors(tmp_path, 2)
    for name, tensor in model(tmp_path).items():
        assert tensor.numel() > 40 or torch.equal(one[name], two[name]), name


def test_deltas_are_compressed_inside_a_warm_up(tmp_path: Path) -> None:
    """Gradients of two updates and three means of deltas, each of one byte per element."""
    local = {"name": "local-sgd", "every": 2}
    sync = {"inner": {"name": "warmup", "updates": 2, "inner": local}}
    summary = train_on(sync_run("int8", sync=sync, **WIDE), tmp_path, FOUR)
    assert summary["bytes_inter_node"] == (2 + 3) * 2 * code_bytes(tmp_path, 1)


def test_factors_of_changing_rank_are_compressed(tmp_path: Path) -> None:
    """AB inside, in groups that span nodes: errors of other shapes are dropped."""
    ab = {"warmup-updates": 1, "every": 3, "full-updates": 1, "cutoff": 0.6}
    changes = {"epochs": 4, **WIDE}
    plain = train_on(sync_run("ab", sync=ab, **changes), tmp_path / "ab", "abab")
    for name in COMPRESSED:
        outer = sync_run(name, sync={"inner": {"name": "ab", **ab}}, **changes)
        compressed = train_on(outer, tmp_path / name, "abab")
        assert compressed["bytes_inter_node"] < plain["bytes_inter_node"], name
        assert compressed["updates"] == plain["updates"] == 16


@pytest.mark.parametrize("inner", ["demo", "never", "int8", "only-large"])
def test_an_inner_sync_without_compressible_transfers_is_refused(inner: str) -> None:
    """The wrapper would change nothing, unnoticed."""
    for name in COMPRESSED:
        with refuses(ConfigError, "sync.inner-not-compressible"):
            sync_run(name, sync={"inner": {"name": inner}})


# ---- restarts


def test_killed_with_a_mean_in_flight_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """Through the files of a checkpoint; `test_sync_laws` resumes after every update."""
    sync, hosts = around("daso"), "aab"
    whole = train_on(sync_run("powersgd", sync=sync, **WIDE), tmp_path / "whole", hosts)
    run = sync_run("powersgd", sync=sync, checkpoint__every=1, **WIDE)
    for until in (2, 5):
        killed(run, tmp_path / "parts", until, hosts)
    resumed = train_on(run, tmp_path / "parts", hosts)
    assert (resumed["digest"], resumed["attempts"]) == (whole["digest"], 3)


@pytest.mark.parametrize("name", ["powersgd", "demo"])
def test_another_number_of_replicas_resumes(name: str, tmp_path: Path) -> None:
    """Without the errors or momenta of the others."""
    train_on(sync_run(name, epochs=1, **WIDE), tmp_path, FOUR)
    summary = train_on(sync_run(name, epochs=2, **WIDE), tmp_path, "ab")
    assert (summary["attempts"], summary["updates"]) == (2, UPDATES)
