"""The contract of Comm on the backends inside one process, and laws of these backends alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dtrain.comm.allreduce import MIN_PIECE_BYTES, PIECE_BYTES, SUM_DTYPES, cut_pieces
from dtrain.comm.backends import threads
from dtrain.comm.backends.base import Bytes, CommTimeout, Deadlock, Request
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.buffers import BufferPool, aligned_empty
from dtrain.comm.communicator import Comm
from dtrain.comm.node_topology import NodeTopology
from dtrain.comm.staging import Host, Pinned
from dtrain.comm.tree import tree_neighbours
from dtrain.errors import DtrainError, HangError, RankLostError
from tests.ranks.contract import (
    CASES,
    FLOATS,
    OVERLAPPING,
    ObservedBackend,
    bits,
    exact,
    normal,
    observed,
    observing,
    raises_naming,
    same,
    weights,
)
from tests.refusals import refuses

named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


def run_case(case: Callable[[Comm], None], n: int, seed: int, hosts: Sequence[str]) -> None:
    """Run a case on ranks that are threads."""
    threads.run_ranks(n, lambda comm: case(observed(comm)), seed=seed, hosts=hosts, timeout_s=60)


@named
@pytest.mark.parametrize("n", [2, 3, 4])
def test_threads(case: Callable[[Comm], None], n: int) -> None:
    run_case(case, n, n, [f"node{rank // 2}" for rank in range(n)])


@pytest.mark.parametrize("case", OVERLAPPING, ids=lambda case: case.__name__)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_threads_in_other_orders(case: Callable[[Comm], None], n: int, seed: int) -> None:
    run_case(case, n, seed, [f"node{rank // 2}" for rank in range(n)])


@named
def test_seven_ranks(case: Callable[[Comm], None]) -> None:
    run_case(case, 7, 0, "abcabca")


def test_a_mean_of_more_ranks_than_lanes() -> None:
    def work(comm: Comm) -> bool:
        tensor = torch.full((1 << 19,), float(comm.rank))
        comm.mean_([tensor])
        return bool(tensor.sub(34.5).abs().max() < 1e-4)

    assert all(threads.run_ranks(70, work, timeout_s=60))


@named
def test_single(case: Callable[[Comm], None]) -> None:
    case(Comm(ObservedBackend(SingleBackend())))


class PretendedStaging:
    """Memory of a pretended accelerator: every buffer that staging allocated, in order."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.buffers.append(aligned_empty(shape, dtype))
        return self.buffers[-1]


@named
def test_an_accelerator_is_staged(case: Callable[[Comm], None]) -> None:
    """The contract holds if every tensor is copied on its way to and from the backend.

    The accelerator is pretended: this shows where copies are made, not that a real device works.
    """

    def staged(comm: Comm) -> None:
        comm.context.staging = Pinned(torch.device("cpu"), aligned_empty)
        case(comm)

    run_case(staged, 3, 0, "aba")


def test_staging_copies_both_ways_and_its_memory_is_not_returned() -> None:
    staging = PretendedStaging()
    comm = Comm(SingleBackend())
    comm.context.staging = Pinned(torch.device("cpu"), staging.empty)
    first, second = torch.arange(6.0).view(2, 3), torch.ones(3)
    comm.post_recv(
        0, 1, [((2, 3), torch.float32), (((2, 3), torch.float32), ((3,), torch.float32))]
    )
    comm.isend(first, 0, 1)
    content = first.clone()
    first.zero_()  # the message was copied when it was sent
    received = comm.recv(0, 1)
    assert received.equal(content)
    addresses = {buffer.data_ptr() for buffer in staging.buffers}
    assert received.data_ptr() not in addresses
    comm.isend((first, second), 0, 1)
    assert [part.shape for part in comm.recv(0, 1)] == [(2, 3), (3,)]
    comm.flush()
    assert len(staging.buffers) == 1 + 1 + 2 + 2
    comm.mean_([second], 0.5)
    comm.broadcast_([second])
    assert len(staging.buffers) == 6 + 1 + 1
    assert second.eq(0.5).all()


def test_the_device_of_a_rank_is_set_for_all_groups() -> None:
    comm = Comm(SingleBackend())
    twin = comm.dup()
    comm.set_device(torch.device("cuda", 1))
    staging = twin.context.staging
    assert isinstance(staging, Pinned)
    assert staging.device == torch.device("cuda", 1)
    tensor = torch.ones(2)
    assert staging.to_host(tensor).data_ptr() == tensor.data_ptr(), "on the CPU: not copied"
    with raises_naming(ValueError, "cuda:0"):
        comm.set_device(torch.device("cuda"))
    comm.set_device(torch.device("cpu"))
    assert isinstance(twin.context.staging, Host)


NODES = ["ab", "aab", "abc", "abab", "aaabb", "aaaabccc", "abcbacbaa", "aaaaaaaaab"]
"""Hosts of the ranks: even and uneven nodes, one of them alone, in any order."""


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_mean_over_nodes_has_exactly_the_documented_bits(nodes: str, dtype: torch.dtype) -> None:
    """Node by node, in rank order: these bits, on all ranks, in every repetition."""
    n, shapes = len(nodes), [(100_003,), (7,), (300, 70), (0,)]
    scales = weights(n)
    parts = [[normal(shape, dtype, 9 * rank + len(shape)) for shape in shapes] for rank in range(n)]
    means = [exact([part[i] for part in parts], scales, nodes) for i in range(len(shapes))]

    def work(comm: Comm) -> None:
        for _ in range(2):
            mine = [part.clone() for part in parts[comm.rank]]
            comm.mean_(mine, scales[comm.rank])
            assert [bits(tensor) for tensor in mine] == [bits(tensor) for tensor in means]
        assert same(comm, mine)

    threads.run_ranks(n, work, hosts=list(nodes), seed=n)


@pytest.mark.parametrize("nodes", NODES)
def test_a_mean_over_nodes_is_the_mean_of_the_replicas(nodes: str) -> None:
    n = len(nodes)
    parts = [normal((50_001,), torch.float64, rank) for rank in range(n)]
    mean = torch.stack(parts).mean(0)

    def work(comm: Comm) -> float:
        mine = parts[comm.rank].clone()
        comm.mean_([mine])
        return float((mine - mean).abs().max())

    assert max(threads.run_ranks(n, work, hosts=list(nodes))) < 1e-12


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_traffic_between_nodes_does_not_depend_on_their_ranks(
    nodes: str, dtype: torch.dtype
) -> None:
    """2 (m - 1) payloads between m nodes, in balance; nodes of several ranks send wide sums."""
    n, m = len(nodes), len(set(nodes))
    topology = NodeTopology(nodes, 0)
    pieces = topology.pieces_per_round
    tensor = torch.zeros(pieces * 20_000, dtype=dtype)
    assert len(cut_pieces([tensor], pieces)) == pieces

    def work(comm: Comm) -> tuple[int, int]:
        comm.mean_([tensor.clone()])
        return comm.traffic.bytes_intra, comm.traffic.bytes_inter

    sent = threads.run_ranks(n, work, hosts=list(nodes))
    wide = SUM_DTYPES[dtype].itemsize // dtype.itemsize
    widths = [wide if size > 1 else 1 for size in topology.node_sizes]
    to_owners = sum(
        width
        for piece in range(pieces)
        for node, width in enumerate(widths)
        if topology.leaders(piece)[1] not in topology.nodes[node]
    )
    piece_bytes = tensor.nbytes // pieces
    assert sum(inter for _, inter in sent) == (to_owners + pieces * (m - 1)) * piece_bytes
    assert sum(intra for intra, _ in sent) == 2 * (n - m) * tensor.nbytes
    if dtype != torch.bfloat16:
        for ranks in topology.nodes:
            assert sum(sent[rank][1] for rank in ranks) == 2 * (m - 1) * tensor.nbytes // m


class CountingBackend(ObservedBackend):
    """A backend that counts its sends by whether they are longer than a weight."""

    counts: Counter[bool]

    def isend(self, data: Bytes, dest: int, tag: int) -> Request:
        self.counts[data.size > 8] += 1
        return super().isend(data, dest, tag)


def test_messages_of_a_large_group_stay_few() -> None:
    """64 ranks on 8 nodes and 40 MB: 64 pieces, 126 messages per rank, and the weights."""
    pieces_per_round = NodeTopology([*range(8)] * 8, 0).pieces_per_round
    assert len(cut_pieces([torch.empty(10_000_000, device="meta")], pieces_per_round)) == 64
    counts: Counter[bool] = Counter()

    def work(comm: Comm) -> None:
        backend = CountingBackend(comm.transport.backend)
        backend.counts = counts
        Comm(backend).mean_([torch.zeros(64 * 5000)])

    threads.run_ranks(64, work, hosts=[f"n{rank % 8}" for rank in range(64)])
    assert counts == {True: 64 * 126, False: 64 * 7}


def test_a_group_of_one_copies_nothing() -> None:
    comm = Comm(SingleBackend())
    strided = torch.ones(4, 6).t()
    version = strided._version
    handle = comm.imean_([strided])
    assert handle.test()
    assert strided._version == version
    with raises_naming(TypeError, "mean_", torch.int64, "tensor 0"):
        comm.mean_([torch.ones(2, dtype=torch.int64)])


@pytest.mark.parametrize("nodes", [*NODES, "a" * 5, "abcde"])
@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 16, 40])
def test_weights_go_where_they_multiply(nodes: str, pieces: int) -> None:
    """A rank's weight goes to the ranks that multiply its parts, and to no others."""
    topologies = [NodeTopology(nodes, rank) for rank in range(len(nodes))]
    for rank, topology in enumerate(topologies):
        owners = {topology.leaders(k)[1] for k in range(pieces)}
        leaders = {topology.leaders(k)[0][topology.node_index] for k in range(pieces)}
        multipliers = owners if len(topology.node_ranks) == 1 else leaders
        assert topology.weight_receivers(rank, pieces) == multipliers - {rank}
        for other in topologies:
            sends = rank in other.weight_senders(pieces)
            assert sends == (other.rank in topology.weight_receivers(rank, pieces))


@pytest.mark.parametrize("nodes", NODES)
def test_ranks_are_grouped_by_host(nodes: str) -> None:
    """Nodes in order of their first ranks, ranks ascending; the same groups on all ranks."""
    for rank, host in enumerate(nodes):
        topology = NodeTopology(nodes, rank)
        assert [nodes[ranks[0]] for ranks in topology.nodes] == list(dict.fromkeys(nodes))
        assert topology.node_ranks == topology.nodes[topology.node_index]
        assert topology.node_ranks[topology.local_rank] == rank
        assert topology.node_peers == [other for other in topology.node_ranks if other != rank]
        assert topology.node_sizes == [nodes.count(name) for name in dict.fromkeys(nodes)]
        assert [topology.is_local(other) for other in range(len(nodes))] == [
            name == host for name in nodes
        ]


def test_results_come_in_rank_order() -> None:
    assert threads.run_ranks(5, lambda comm: (comm.rank, comm.size)) == [(r, 5) for r in range(5)]


def order(seed: int) -> list[int]:
    """Return the rank of each turn of three ranks that wait for each other."""
    turns: list[int] = []

    def work(comm: Comm) -> None:
        world = observed(comm)
        with observing(world, lambda: turns.append(comm.rank)):
            for _ in range(5):
                world.allgather_object(None)

    threads.run_ranks(3, work, seed=seed)
    return turns


def test_the_seed_chooses_the_order() -> None:
    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(5)}) == 5


def test_one_rank_runs_at_a_time() -> None:
    """Numbers that several ranks draw from torch's one generator are never interleaved."""

    def work(comm: Comm) -> list[float]:
        torch.manual_seed(comm.rank)
        numbers = [torch.rand(1).item() for _ in range(100)]
        comm.allgather_object(None)
        return numbers

    for rank, numbers in enumerate(threads.run_ranks(4, work)):
        torch.manual_seed(rank)
        assert numbers == [torch.rand(1).item() for _ in range(100)]


def test_deadlock_names_the_wait_of_each_rank() -> None:
    messages: list[str] = []

    def work(comm: Comm) -> None:
        comm.post_recv(1 - comm.rank, 4, [((2,), torch.int64)])
        try:
            comm.recv(1 - comm.rank, 4)
        except Deadlock as error:
            messages.append(error.message)
            raise

    with refuses(Deadlock, "comm.deadlock"):
        threads.run_ranks(2, work)
    assert len(messages) == 2
    for message in messages:
        for rank in range(2):
            assert f"rank {rank} waits for (2,) int64 from rank {1 - rank} with tag 4" in message


def test_a_deadlock_of_one_rank_is_found() -> None:
    comm = Comm(SingleBackend())
    comm.post_recv(0, 4, [((2,), torch.int64)])
    with refuses(Deadlock, "comm.deadlock") as caught:
        comm.recv(0, 4)
    assert isinstance(caught.value, HangError)
    assert "(2,) int64 from rank 0 with tag 4" in caught.value.message


def test_all_sending_without_receives_is_a_deadlock() -> None:
    """Sends are synchronous whatever their size: a program that passes here passes with any."""

    def work(comm: Comm) -> None:
        comm.isend(torch.tensor(1), 1 - comm.rank, 0)
        comm.flush()

    with refuses(Deadlock, "comm.deadlock"):
        threads.run_ranks(2, work)


def test_waiting_for_a_rank_that_has_ended_is_a_deadlock() -> None:
    with refuses(Deadlock, "comm.deadlock"):
        threads.run_ranks(2, lambda comm: comm.allgather_object(0) if comm.rank else None)


def test_a_wait_times_out_although_others_are_at_work() -> None:
    ended = threading.Event()

    def work(comm: Comm) -> None:
        comm.timeout_s = 0.05
        if comm.rank == 0:
            comm.post_recv(1, 4, [((2,), torch.int64)])
            with refuses(CommTimeout, "comm.timeout"):
                comm.recv(1, 4)
            ended.set()
        while not ended.is_set():
            comm.post_recv(comm.rank, 1, [((), torch.int64)])
            comm.isend(torch.tensor(1), comm.rank, 1)
            comm.recv(comm.rank, 1)
            comm.transport.backend.idle(0, "its next turn")

    threads.run_ranks(2, work)


def test_the_first_error_ends_all_ranks() -> None:
    """The others raise `RankLostError` in their waits, also if they catch it and wait again."""
    errors: dict[int, BaseException] = {}

    def work(comm: Comm) -> None:
        if comm.rank == 2:
            raise ZeroDivisionError
        try:
            comm.allgather_object(None)
        except DtrainError as error:
            errors[comm.rank] = error
            comm.allgather_object(None)

    with pytest.raises(ZeroDivisionError):
        threads.run_ranks(4, work)
    for error in errors.values():
        assert isinstance(error, RankLostError)
        assert error.key == "comm.rank-failed"


def test_abort_ends_all_ranks_with_the_code() -> None:
    def work(comm: Comm) -> None:
        if comm.rank == 1:
            comm.abort(4)
        comm.allgather_object(None)

    with pytest.raises(SystemExit) as caught:
        threads.run_ranks(3, work)
    assert caught.value.code == 4


def test_a_rank_that_never_waits_runs_into_the_limit() -> None:
    ended = threading.Event()

    def work(comm: Comm) -> None:
        while not ended.is_set():
            pass

    with refuses(CommTimeout, "comm.timeout"):
        threads.run_ranks(1, work, timeout_s=0.2)
    ended.set()


def test_sizes_must_agree() -> None:
    comm = Comm(SingleBackend())
    comm.post_recv(0, 1, [((3,), torch.float32)])
    with raises_naming(RuntimeError, "8 bytes", "12 bytes"):
        comm.isend(torch.ones(2), 0, 1)


@pytest.mark.parametrize("hosts", ["aba", "aaa", "abc"])
def test_traffic_is_counted_by_whether_it_leaves_the_node(hosts: str) -> None:
    """Two nodes may have one name, and one node two names."""

    def work(comm: Comm) -> tuple[int, int]:
        for source in range(comm.size):
            comm.post_recv(source, 1, [((5,), torch.float32)])
        for dest in range(comm.size):
            comm.isend(torch.ones(5), dest, 1)
        for source in range(comm.size):
            comm.recv(source, 1)
        comm.flush()
        return comm.traffic.bytes_intra, comm.traffic.bytes_inter

    nodes = None if hosts == "aba" else [7, 8, 7]
    sent = threads.run_ranks(3, work, hosts=list(hosts), nodes=nodes)
    assert sent == [(40, 20), (20, 40), (40, 20)]


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
        all_children = [child for _, children in links.values() for child in children]
        assert sorted([*all_children, root]) == list(range(size))
        for rank, (_, children) in links.items():
            assert all(links[child][0] == rank for child in children)


def test_memory_is_aligned_and_used_again() -> None:
    assert all(aligned_empty((n, 3), torch.float64).data_ptr() % 64 == 0 for n in range(20))
    pool, like = BufferPool(1024), torch.empty(100)
    with pool.lend(2, like) as first:
        addresses = {buffer.data_ptr() for buffer in first}
        assert all(buffer.shape == like.shape and buffer.dtype == like.dtype for buffer in first)
    with pool.lend(2, like) as second:
        assert {buffer.data_ptr() for buffer in second} == addresses
