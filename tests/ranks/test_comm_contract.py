"""The contract of Comm on the wires inside one process, and what only those promise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from dtrain.comm import threads
from dtrain.comm.comm import Comm
from dtrain.comm.mean import ENOUGH_BYTES, PIECE_BYTES, cut
from dtrain.comm.memory import Scratch, aligned
from dtrain.comm.single import SingleWire
from dtrain.comm.tree import family
from dtrain.comm.wire import Stall
from tests.ranks.contract import CASES

named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


@named
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_threads(case: Callable[[Comm], None], n: int, seed: int) -> None:
    hosts = [f"node{rank // 2}" for rank in range(n)]
    threads.run(n, case, seed=seed, hosts=hosts, timeout_s=30)


@named
def test_seven_ranks(case: Callable[[Comm], None]) -> None:
    threads.run(7, case, hosts=list("abcabca"), timeout_s=60)


def test_a_mean_of_more_ranks_than_lanes() -> None:
    def work(comm: Comm) -> bool:
        tensor = torch.full((1 << 19,), float(comm.rank))
        comm.mean_([tensor])
        return bool(tensor.sub(34.5).abs().max() < 1e-4)

    assert all(threads.run(70, work, timeout_s=60))


@named
def test_self(case: Callable[[Comm], None]) -> None:
    case(Comm(SingleWire()))


def test_results_come_in_rank_order() -> None:
    assert threads.run(5, lambda comm: (comm.rank, comm.size)) == [(r, 5) for r in range(5)]


def order(seed: int) -> list[int]:
    """Return which rank ran in each of the turns of three that wait for each other."""
    turns: list[int] = []

    def work(comm: Comm) -> None:
        comm.polls.append(lambda: turns.append(comm.rank))
        for _ in range(5):
            comm.exchange(None)

    threads.run(3, work, seed=seed)
    return turns


def test_the_seed_chooses_the_order() -> None:
    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(5)}) == 5


def test_one_rank_runs_at_a_time() -> None:
    """Draws of several ranks from the one generator of torch are never interleaved."""

    def work(comm: Comm) -> list[float]:
        torch.manual_seed(comm.rank)
        drawn = [torch.rand(1).item() for _ in range(100)]
        comm.exchange(None)
        return drawn

    for rank, drawn in enumerate(threads.run(4, work)):
        torch.manual_seed(rank)
        assert drawn == [torch.rand(1).item() for _ in range(100)]


def test_deadlock_names_what_each_rank_waits_for() -> None:
    seen = []

    def work(comm: Comm) -> None:
        comm.expect(1 - comm.rank, 4, [((2,), torch.int64)])
        try:
            comm.recv(1 - comm.rank, 4)
        except Stall as stall:
            seen.append(str(stall))
            raise

    with pytest.raises(Stall, match="deadlock"):
        threads.run(2, work)
    assert len(seen) == 2
    for words in seen:
        assert "rank 0 waits for (2,) int64 from rank 1 with tag 4" in words
        assert "rank 1 waits for (2,) int64 from rank 0 with tag 4" in words


def test_all_sending_without_receives_is_a_deadlock() -> None:
    """Sends are synchronous whatever their size: what passes here passes with big tensors."""

    def work(comm: Comm) -> None:
        comm.isend(torch.tensor(1), 1 - comm.rank, 0)
        comm.flush()

    with pytest.raises(Stall, match=r"rank 0 waits for rank 1 to take 1 messages with tag 0"):
        threads.run(2, work)


def test_waiting_for_a_rank_that_has_left_is_a_deadlock() -> None:
    with pytest.raises(Stall, match="rank 1 waits for the control data of all ranks"):
        threads.run(2, lambda comm: comm.exchange(0) if comm.rank else None)


def test_the_first_error_ends_all_ranks() -> None:
    ended = []

    def work(comm: Comm) -> None:
        try:
            if comm.rank == 2:
                raise ZeroDivisionError("of rank 2")
            comm.exchange(None)
        finally:
            ended.append(comm.rank)

    with pytest.raises(ZeroDivisionError, match="of rank 2"):
        threads.run(4, work)
    assert set(ended) >= {2}
    assert all(first != second for first, second in pairwise(sorted(ended)))


def test_abort_ends_all_ranks_with_the_code() -> None:
    def work(comm: Comm) -> None:
        if comm.rank == 1:
            comm.abort(4)
        comm.exchange(None)

    with pytest.raises(SystemExit) as caught:
        threads.run(3, work)
    assert caught.value.code == 4


def test_a_rank_that_never_waits_runs_into_the_limit() -> None:
    going = [True]

    def work(comm: Comm) -> None:
        while going[0]:
            pass

    with pytest.raises(Stall, match=r"0\.2 s are over"):
        threads.run(1, work, timeout_s=0.2)
    going.clear()
    going.append(False)


def test_sizes_must_agree() -> None:
    comm = Comm(SingleWire())
    comm.expect(0, 1, [((3,), torch.float32)])
    with pytest.raises(RuntimeError, match="message of 8 bytes met a receive of 12 bytes"):
        comm.isend(torch.ones(2), 0, 1)


def test_traffic_is_told_apart_by_hosts() -> None:
    def work(comm: Comm) -> tuple[int, int]:
        for to in range(comm.size):
            comm.expect(to, 1, [((5,), torch.float32)])
        for to in range(comm.size):
            comm.isend(torch.ones(5), to, 1)
        for source in range(comm.size):
            comm.recv(source, 1)
        comm.flush()
        return comm.traffic.bytes_intra, comm.traffic.bytes_inter

    assert threads.run(3, work, hosts=["a", "b", "a"]) == [(40, 20), (20, 40), (40, 20)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("numbers", [(7,), (100_000, 3, 400_001), (1 << 20, 5, 5), (4096,) * 50])
def test_pieces_cover_the_tensors_once(numbers: tuple[int, ...], size: int) -> None:
    flats = [torch.zeros(number) for number in numbers]
    pieces = cut(flats, size)
    for piece in pieces:
        assert sum(span.nbytes for span in piece) <= PIECE_BYTES
        for span in piece:
            span.add_(1)  # spans are views, not copies
    assert all(flat.eq(1).all() for flat in flats)
    payload = sum(flat.nbytes for flat in flats)
    if payload >= size * ENOUGH_BYTES:
        assert len(pieces) >= size, "each rank owns some"


def test_pieces_have_one_dtype() -> None:
    flats = [torch.zeros(5), torch.zeros(5, dtype=torch.float64), torch.zeros(5)]
    pieces = cut(flats, 2)
    assert [len({span.dtype for span in piece}) for piece in pieces] == [1, 1]


@pytest.mark.parametrize("size", range(1, 18))
def test_the_tree_reaches_every_rank_once(size: int) -> None:
    for root in {0, size - 1, size // 2}:
        links = {rank: family(rank, size, root) for rank in range(size)}
        children = [child for _, below in links.values() for child in below]
        assert sorted([*children, root]) == list(range(size))
        for rank, (_, below) in links.items():
            assert all(links[child][0] == rank for child in below)


def test_memory_is_aligned_and_kept() -> None:
    assert all(aligned((n, 3), torch.float64).data_ptr() % 64 == 0 for n in range(20))
    scratch, like = Scratch(1024), torch.empty(100)
    with scratch.lend(2, like) as first:
        addresses = {buffer.data_ptr() for buffer in first}
        assert all(buffer.shape == like.shape and buffer.dtype == like.dtype for buffer in first)
    with scratch.lend(2, like) as second:
        assert {buffer.data_ptr() for buffer in second} == addresses
