"""The contract of Comm on the wires inside one process, and what only those promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dtrain.comm.allreduce import MIN_PIECE_BYTES, PIECE_BYTES, SUM_DTYPES, cut_pieces
from dtrain.comm.backends import threads
from dtrain.comm.backends.base import Bytes, CommTimeout, Request
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.buffers import BufferPool, aligned_empty
from dtrain.comm.communicator import Comm
from dtrain.comm.node_topology import NodeTopology
from dtrain.comm.staging import Host, Pinned
from dtrain.comm.tree import tree_neighbours
from tests.ranks.contract import CASES, FLOATS, bits, exact, looking, normal, same, weights

named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


@named
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_threads(case: Callable[[Comm], None], n: int, seed: int) -> None:
    hosts = [f"node{rank // 2}" for rank in range(n)]
    threads.run_ranks(n, case, seed=seed, hosts=hosts, timeout_s=30)


@named
def test_seven_ranks(case: Callable[[Comm], None]) -> None:
    threads.run_ranks(7, case, hosts=list("abcabca"), timeout_s=60)


def test_a_mean_of_more_ranks_than_lanes() -> None:
    def work(comm: Comm) -> bool:
        tensor = torch.full((1 << 19,), float(comm.rank))
        comm.mean_([tensor])
        return bool(tensor.sub(34.5).abs().max() < 1e-4)

    assert all(threads.run_ranks(70, work, timeout_s=60))


@named
def test_self(case: Callable[[Comm], None]) -> None:
    case(Comm(SingleBackend()))


class Copies:
    """Staging memory of a pretended accelerator: counts, and is told from other memory."""

    def __init__(self) -> None:
        self.made = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.made += 1
        return aligned_empty(shape, dtype)


@named
@pytest.mark.parametrize("n", [1, 3])
def test_an_accelerator_is_staged(case: Callable[[Comm], None], n: int) -> None:
    """The contract holds where every tensor is copied on its way to and from the wire.

    The accelerator is pretended: this shows where copies are made, not that a real device works.
    """
    staging = Copies()

    def work(comm: Comm) -> None:
        comm.context.staging = Pinned(torch.device("cpu"), staging.empty)
        case(comm)

    threads.run_ranks(n, work, hosts=["a", "b", "a"][:n])


def test_staging_is_used_and_memory_of_the_wire_is_not_given_away() -> None:
    staging = Copies()
    comm = Comm(SingleBackend())
    comm.context.staging = Pinned(torch.device("cpu"), staging.empty)
    sent, other = torch.arange(6.0).view(2, 3), torch.ones(3)
    comm.post_recv(
        0, 1, [((2, 3), torch.float32), (((2, 3), torch.float32), ((3,), torch.float32))]
    )
    comm.isend(sent, 0, 1)
    copy = sent.clone()
    sent.zero_()  # it was copied when it was sent
    landed = comm._recv_channels[0, 1]._posted.tensors[0]
    got = comm.recv(0, 1)
    assert got.equal(copy)
    assert got.data_ptr() != landed.data_ptr()
    comm.isend((sent, other), 0, 1)
    assert [part.shape for part in comm.recv(0, 1)] == [(2, 3), (3,)]
    comm.flush()
    assert staging.made == 1 + 1 + 2 + 2
    comm.mean_([other], 0.5)
    comm.broadcast_([other])
    assert staging.made == 6 + 1 + 1
    assert other.eq(0.5).all()


def test_where_a_rank_computes_is_stated_once_for_the_family() -> None:
    comm = Comm(SingleBackend())
    twin = comm.dup()
    comm.set_device(torch.device("cuda", 1))
    dock = twin.context.staging
    assert isinstance(dock, Pinned)
    assert dock.device == torch.device("cuda", 1)
    here = torch.ones(2)
    assert dock.to_host(here).data_ptr() == here.data_ptr(), "what is on the host passes as ever"
    with pytest.raises(ValueError, match="'cuda' names no device of its kind: say 'cuda:0'"):
        comm.set_device(torch.device("cuda"))
    comm.set_device(torch.device("cpu"))
    assert isinstance(twin.context.staging, Host)


NODES = ["ab", "aab", "abc", "abab", "aaabb", "aaaabccc", "abcbacbaa", "aaaaaaaaab"]
"""Hosts of the ranks: even and uneven nodes, one of them alone, in any order."""


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_mean_over_nodes_is_as_promised(nodes: str, dtype: torch.dtype) -> None:
    """Node by node, in rank order: these bits, on all ranks, in every repetition."""
    n, shapes = len(nodes), [(100_003,), (7,), (300, 70), (0,)]
    scales = weights(n)
    parts = [[normal(shape, dtype, 9 * rank + len(shape)) for shape in shapes] for rank in range(n)]
    want = [exact([part[i] for part in parts], scales, nodes) for i in range(len(shapes))]

    def work(comm: Comm) -> None:
        for _ in range(2):
            mine = [part.clone() for part in parts[comm.rank]]
            comm.mean_(mine, scales[comm.rank])
            assert [bits(tensor) for tensor in mine] == [bits(tensor) for tensor in want]
        assert same(comm, mine)

    threads.run_ranks(n, work, hosts=list(nodes), seed=n)


@pytest.mark.parametrize("nodes", NODES)
def test_a_mean_over_nodes_is_the_mean_of_the_replicas(nodes: str) -> None:
    n = len(nodes)
    parts = [normal((50_001,), torch.float64, rank) for rank in range(n)]
    want = torch.stack(parts).mean(0)

    def work(comm: Comm) -> float:
        mine = parts[comm.rank].clone()
        comm.mean_([mine])
        return float((mine - want).abs().max())

    assert max(threads.run_ranks(n, work, hosts=list(nodes))) < 1e-12


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_crosses_between_nodes_does_not_depend_on_their_ranks(
    nodes: str, dtype: torch.dtype
) -> None:
    """2 (m - 1) payloads between m nodes, as wide sums from nodes of several ranks; balanced."""
    n, m = len(nodes), len(set(nodes))
    pieces = NodeTopology(nodes, 0).pieces_per_round
    tensor = torch.zeros(pieces * 20_000, dtype=dtype)
    assert len(cut_pieces([tensor], pieces)) == pieces

    def work(comm: Comm) -> tuple[int, int]:
        comm.mean_([tensor.clone()])
        return comm.traffic.bytes_intra, comm.traffic.bytes_inter

    sent = threads.run_ranks(n, work, hosts=list(nodes))
    tiers, size = NodeTopology(nodes, 0), tensor.nbytes // pieces
    wide = SUM_DTYPES[dtype].itemsize // dtype.itemsize
    widths = [wide if len(ranks) > 1 else 1 for ranks in tiers.nodes]
    up = sum(w for k in range(pieces) for i, w in enumerate(widths) if i != tiers.owner_node(k))
    assert sum(inter for _, inter in sent) == (up + pieces * (m - 1)) * size
    assert sum(intra for intra, _ in sent) == 2 * (n - m) * tensor.nbytes
    if dtype != torch.bfloat16:
        for ranks in tiers.nodes:
            assert sum(sent[rank][1] for rank in ranks) == 2 * (m - 1) * tensor.nbytes // m


def test_messages_of_a_large_group_stay_few() -> None:
    """64 ranks on 8 nodes and 40 MB: 64 pieces, 126 messages per rank, besides the weights."""
    count = len(
        cut_pieces(
            [torch.empty(10_000_000, device="meta")],
            NodeTopology([*range(8)] * 8, 0).pieces_per_round,
        )
    )
    assert count == 64
    counts: Counter[int] = Counter()

    def work(comm: Comm) -> None:
        push = comm.transport.backend.isend

        def counted(data: Bytes, to: int, tag: int) -> Request:
            counts[data.size > 8] += 1
            return push(data, to, tag)

        comm.transport.backend.isend = counted  # type: ignore[method-assign]
        comm.mean_([torch.zeros(64 * 5000)])

    threads.run_ranks(64, work, hosts=[f"n{rank % 8}" for rank in range(64)])
    assert counts == {True: 64 * 126, False: 64 * 7}


def test_a_group_of_one_copies_nothing() -> None:
    comm = Comm(SingleBackend())
    strided = torch.ones(4, 6).t()
    version = strided._version
    handle = comm.imean_([strided])
    assert handle.test()
    assert strided._version == version
    with pytest.raises(TypeError, match=r"mean_ of torch.int64 .tensor 0"):
        comm.mean_([torch.ones(2, dtype=torch.int64)])


@pytest.mark.parametrize("nodes", [*NODES, "a" * 5, "abcde"])
@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 16, 40])
def test_weights_go_where_they_multiply(nodes: str, pieces: int) -> None:
    """Who multiplies, by the drawing of a piece, is who is told; nobody else is."""
    all_ = [NodeTopology(nodes, rank) for rank in range(len(nodes))]
    for rank, tiers in enumerate(all_):
        owners = {tiers.leader(k, tiers.owner_node(k)) for k in range(pieces)}
        leads = {tiers.leader(k, tiers.node_index) for k in range(pieces)}
        told = owners if len(tiers.node_ranks) == 1 else leads
        assert tiers.weight_receivers(rank, pieces) == told - {rank}
        for other in all_:
            speaks = rank in other.weight_senders(pieces)
            assert speaks == (other.rank in tiers.weight_receivers(rank, pieces))


def test_results_come_in_rank_order() -> None:
    assert threads.run_ranks(5, lambda comm: (comm.rank, comm.size)) == [(r, 5) for r in range(5)]


def order(seed: int) -> list[int]:
    """Return which rank ran in each of the turns of three that wait for each other."""
    turns: list[int] = []

    def work(comm: Comm) -> None:
        with looking(comm, lambda: turns.append(comm.rank)):
            for _ in range(5):
                comm.allgather_object(None)

    threads.run_ranks(3, work, seed=seed)
    return turns


def test_the_seed_chooses_the_order() -> None:
    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(5)}) == 5


def test_one_rank_runs_at_a_time() -> None:
    """Draws of several ranks from the one generator of torch are never interleaved."""

    def work(comm: Comm) -> list[float]:
        torch.manual_seed(comm.rank)
        drawn = [torch.rand(1).item() for _ in range(100)]
        comm.allgather_object(None)
        return drawn

    for rank, drawn in enumerate(threads.run_ranks(4, work)):
        torch.manual_seed(rank)
        assert drawn == [torch.rand(1).item() for _ in range(100)]


def test_deadlock_names_what_each_rank_waits_for() -> None:
    seen = []

    def work(comm: Comm) -> None:
        comm.post_recv(1 - comm.rank, 4, [((2,), torch.int64)])
        try:
            comm.recv(1 - comm.rank, 4)
        except CommTimeout as stall:
            seen.append(str(stall))
            raise

    with pytest.raises(CommTimeout, match="deadlock"):
        threads.run_ranks(2, work)
    assert len(seen) == 2
    for words in seen:
        assert "rank 0 waits for (2,) int64 from rank 1 with tag 4" in words
        assert "rank 1 waits for (2,) int64 from rank 0 with tag 4" in words


def test_all_sending_without_receives_is_a_deadlock() -> None:
    """Sends are synchronous whatever their size: what passes here passes with big tensors."""

    def work(comm: Comm) -> None:
        comm.isend(torch.tensor(1), 1 - comm.rank, 0)
        comm.flush()

    with pytest.raises(CommTimeout, match=r"rank 0 waits for rank 1 to take 1 messages with tag 0"):
        threads.run_ranks(2, work)


def test_waiting_for_a_rank_that_has_left_is_a_deadlock() -> None:
    with pytest.raises(CommTimeout, match="rank 1 waits for the control data of all ranks"):
        threads.run_ranks(2, lambda comm: comm.allgather_object(0) if comm.rank else None)


def test_the_first_error_ends_all_ranks() -> None:
    ended = []

    def work(comm: Comm) -> None:
        try:
            if comm.rank == 2:
                raise ZeroDivisionError("of rank 2")
            comm.allgather_object(None)
        finally:
            ended.append(comm.rank)

    with pytest.raises(ZeroDivisionError, match="of rank 2"):
        threads.run_ranks(4, work)
    assert set(ended) >= {2}
    assert all(first != second for first, second in pairwise(sorted(ended)))


def test_abort_ends_all_ranks_with_the_code() -> None:
    def work(comm: Comm) -> None:
        if comm.rank == 1:
            comm.abort(4)
        comm.allgather_object(None)

    with pytest.raises(SystemExit) as caught:
        threads.run_ranks(3, work)
    assert caught.value.code == 4


def test_a_rank_that_never_waits_runs_into_the_limit() -> None:
    going = [True]

    def work(comm: Comm) -> None:
        while going[0]:
            pass

    with pytest.raises(CommTimeout, match=r"0\.2 s are over"):
        threads.run_ranks(1, work, timeout_s=0.2)
    going.clear()
    going.append(False)


def test_sizes_must_agree() -> None:
    comm = Comm(SingleBackend())
    comm.post_recv(0, 1, [((3,), torch.float32)])
    with pytest.raises(RuntimeError, match="message of 8 bytes met a receive of 12 bytes"):
        comm.isend(torch.ones(2), 0, 1)


def test_traffic_is_told_apart_by_hosts() -> None:
    def work(comm: Comm) -> tuple[int, int]:
        for to in range(comm.size):
            comm.post_recv(to, 1, [((5,), torch.float32)])
        for to in range(comm.size):
            comm.isend(torch.ones(5), to, 1)
        for source in range(comm.size):
            comm.recv(source, 1)
        comm.flush()
        return comm.traffic.bytes_intra, comm.traffic.bytes_inter

    assert threads.run_ranks(3, work, hosts=["a", "b", "a"]) == [(40, 20), (20, 40), (40, 20)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("numbers", [(7,), (100_000, 3, 400_001), (1 << 20, 5, 5), (4096,) * 50])
def test_pieces_cover_the_tensors_once(numbers: tuple[int, ...], size: int) -> None:
    flats = [torch.zeros(number) for number in numbers]
    pieces = cut_pieces(flats, size)
    for piece in pieces:
        assert sum(span.nbytes for span in piece) <= PIECE_BYTES
        for span in piece:
            span.add_(1)  # spans are views, not copies
    assert all(flat.eq(1).all() for flat in flats)
    payload = sum(flat.nbytes for flat in flats)
    if payload >= size * MIN_PIECE_BYTES:
        assert len(pieces) >= size, "each rank owns some"


def test_pieces_have_one_dtype() -> None:
    flats = [torch.zeros(5), torch.zeros(5, dtype=torch.float64), torch.zeros(5)]
    pieces = cut_pieces(flats, 2)
    assert [len({span.dtype for span in piece}) for piece in pieces] == [1, 1]


@pytest.mark.parametrize("size", range(1, 18))
def test_the_tree_reaches_every_rank_once(size: int) -> None:
    for root in {0, size - 1, size // 2}:
        links = {rank: tree_neighbours(rank, size, root) for rank in range(size)}
        children = [child for _, below in links.values() for child in below]
        assert sorted([*children, root]) == list(range(size))
        for rank, (_, below) in links.items():
            assert all(links[child][0] == rank for child in below)


def test_memory_is_aligned_and_kept() -> None:
    assert all(aligned_empty((n, 3), torch.float64).data_ptr() % 64 == 0 for n in range(20))
    scratch, like = BufferPool(1024), torch.empty(100)
    with scratch.lend(2, like) as first:
        addresses = {buffer.data_ptr() for buffer in first}
        assert all(buffer.shape == like.shape and buffer.dtype == like.dtype for buffer in first)
    with scratch.lend(2, like) as second:
        assert {buffer.data_ptr() for buffer in second} == addresses
