"""The contract of Comm: laws that hold on any backend, for any number of ranks.

Each case is called on every rank, with a group of all ranks. `threads`, `single` and `mpi` run the
same list, so no backend can behave differently from the others.
"""

from __future__ import annotations

import gc
import math
import random
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from dtrain.comm.agree import all_or_none, broadcast_object
from dtrain.comm.backends.base import Backend, Bytes, CommTimeout, Request
from dtrain.comm.buffers import TensorSpec
from dtrain.comm.call_order import CollectiveMismatch
from dtrain.comm.communicator import Comm
from dtrain.comm.early_end import EarlyEnd
from dtrain.errors import ConfigError, DataError
from tests.refusals import refuses

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]
FLOATS = DTYPES[:4]
SHAPES = [(), (0, 3), (1,), (5, 7), (2, 3, 4, 5)]


class ObservedBackend(Backend):
    """A backend that calls its observers in every vain turn of every wait of a family of groups."""

    def __init__(self, inner: Backend, observers: list[Callable[[], object]] | None = None) -> None:
        self.rank, self.size, self.hosts = inner.rank, inner.size, inner.hosts
        self.nodes, self.world_ranks, self.library = inner.nodes, inner.world_ranks, inner.library
        self.inner = inner
        self.observers: list[Callable[[], object]] = [] if observers is None else observers

    def isend(self, data: Bytes, dest: int, tag: int) -> Request:
        return self.inner.isend(data, dest, tag)

    def irecv(self, data: Bytes, source: int, tag: int) -> Request:
        return self.inner.irecv(data, source, tag)

    def idle(self, turn: int, description: str) -> None:
        for observer in tuple(self.observers):
            observer()
        self.inner.idle(turn, description)

    def split(self, color: int, key: int) -> Backend:
        return ObservedBackend(self.inner.split(color, key), self.observers)

    def abort(self, code: int) -> NoReturn:
        self.inner.abort(code)


def observed(comm: Comm) -> Comm:
    """Return a new world over the backend of a world that is not used yet, for `observing`."""
    return Comm(ObservedBackend(comm.transport.backend), timeout_s=comm.timeout_s)


@contextmanager
def observing(comm: Comm, observer: Callable[[], object]) -> Iterator[None]:
    """Call `observer` in every vain turn of every wait while the body runs."""
    backend = comm.transport.backend
    assert isinstance(backend, ObservedBackend)
    backend.observers.append(observer)
    try:
        yield
    finally:
        backend.observers.remove(observer)


@contextmanager
def raises_naming(kind: type[Exception], *facts: object) -> Iterator[None]:
    """Assert that the body raises `kind`, with a message that contains each fact."""
    with pytest.raises(kind) as caught:
        yield
    for fact in facts:
        assert str(fact) in str(caught.value), (fact, str(caught.value))


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor in C order."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def noise(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Return arbitrary bits that any dtype can hold (NaN and infinity among them)."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    limit = 2 if dtype == torch.bool else 256
    data = torch.randint(0, limit, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(tuple(shape))


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Return normal deviates."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), dtype=torch.float64, generator=generator).to(dtype)


def spec(tensor: Tensor) -> TensorSpec:
    """Return shape and dtype, which the receiver declares."""
    return tuple(tensor.shape), tensor.dtype


def weights(size: int) -> list[float]:
    """Return uneven weights that add up to 1."""
    return [2.0 * (rank + 1) / (size * (size + 1)) for rank in range(size)]


def exact(parts: Sequence[Tensor], scales: Sequence[float], nodes: Sequence[Hashable]) -> Tensor:
    """Return the exact bits of a mean: each product and sum rounded, in rank order within nodes,
    then in node order."""
    dtype = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    sums: dict[Hashable, Tensor] = {}
    for part, scale, node in zip(parts, scales, nodes, strict=True):
        term = part.to(dtype) * scale
        sums[node] = sums[node] + term if node in sums else term
    result, *rest = sums.values()
    for node_sum in rest:
        result = result + node_sum
    return result.to(parts[0].dtype)


def same(comm: Comm, tensors: Sequence[Tensor]) -> bool:
    """Return whether all ranks hold the same bits."""
    ranks = comm.allgather_object([bits(tensor).hex() for tensor in tensors])
    return all(other == ranks[0] for other in ranks)


def ring_of_all_dtypes(comm: Comm) -> None:
    """Bits arrive as they left, whatever the shape and dtype, and start on a 64-byte boundary."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    kinds = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    comm.post_recv(left, 1, kinds)
    for number, kind in enumerate(kinds):
        comm.isend(noise(*kind, seed=100 * comm.rank + number), right, 1)
        received = comm.recv(left, 1)
        sent = noise(*kind, seed=100 * left + number)
        assert spec(received) == spec(sent)
        assert bits(received) == bits(sent)
        assert received.data_ptr() % 64 == 0
    comm.flush()


def big_both_ways(comm: Comm) -> None:
    """Large messages cross in both directions at once, although all ranks send first."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    big = torch.full((1 << 20,), float(comm.rank))
    comm.post_recv(left, 1, [spec(big)])
    comm.post_recv(right, 2, [spec(big)])
    comm.isend(big, right, 1)
    comm.isend(big, left, 2)
    assert comm.recv(left, 1).eq(left).all()
    assert comm.recv(right, 2).eq(right).all()
    comm.flush()


def big_of_all_dtypes(comm: Comm) -> None:
    """Messages of every dtype arrive when they are too long to be buffered on the way."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    kinds = [((3, 50_001), dtype) for dtype in DTYPES]
    comm.post_recv(left, 1, kinds)
    for number, kind in enumerate(kinds):
        comm.isend(noise(*kind, seed=100 * comm.rank + number), right, 1)
        assert bits(comm.recv(left, 1)) == bits(noise(*kind, seed=100 * left + number))
    comm.flush()


def awkward(rank: int) -> dict[str, Tensor]:
    """Return tensors, by name, whose memory is not their content in C order."""
    base = normal((6, 8), torch.float32, rank)
    pair = torch.complex(base, base + 1)
    picture = normal((2, 3, 4, 5), torch.float32, rank)
    return {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "shifted": base.view(-1)[3:],
        "expanded": base[:, :1].expand(6, 5),
        "channels last": picture.to(memory_format=torch.channels_last),
        "permuted": picture.permute(3, 1, 0, 2),
        "overlapping": base.view(-1).unfold(0, 4, 2),
        "zero-size": base[:, :0].t(),
        "no dimension": base[2, 3],
        "a leaf": torch.nn.Parameter(base.clone()),
        "a result": torch.nn.Parameter(base.clone()).t() * 2,
        "conjugate": pair.t().conj(),
        "negative": pair.conj().imag,
    }


def awkward_memory_is_sent_in_order(comm: Comm) -> None:
    """The content of a tensor arrives in C order, whatever its memory."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    mine, theirs = awkward(comm.rank), awkward(left)
    comm.post_recv(left, 1, [spec(tensor) for tensor in theirs.values()])
    for name, tensor in mine.items():
        comm.isend(tensor, right, 1)
        received = comm.recv(left, 1)
        assert received.is_contiguous(), name
        assert not received.requires_grad, name
        assert received.equal(theirs[name].detach()), name
    comm.flush()


def sends_are_refused_by_name(comm: Comm) -> None:
    """Tensors without dense memory are refused before anything is sent."""
    dense = torch.eye(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of prototypes and deprecations
        wrong = {
            "sparse_coo": dense.to_sparse(),
            "sparse_csr": dense.to_sparse_csr(),
            "quantised": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
            "meta": dense.to("meta"),
            "nested": torch.nested.nested_tensor([dense, dense[:2]]),
        }
    for kind, tensor in wrong.items():
        with raises_naming(TypeError, "isend", kind, "tensor 1"):
            comm.isend((dense, tensor), comm.rank, 1)
        with raises_naming(TypeError, "mean_", kind, "tensor 1"):
            comm.mean_([dense, tensor])
        with raises_naming(TypeError, "broadcast_", kind, "tensor 1"):
            comm.broadcast_([dense, tensor])
    with pytest.raises(ValueError):  # noqa: PT011
        comm.isend((), comm.rank, 1)
    comm.flush()


def overwritten_memory_must_be_disjoint(comm: Comm) -> None:
    """In-place operations refuse elements, and tensors, that share memory."""
    base = torch.ones(4, 6)
    overlapping = (base[:, :1].expand(4, 5), base.view(-1).unfold(0, 4, 2))
    for operation, call in (("mean_", comm.mean_), ("broadcast_", comm.broadcast_)):
        for tensor in overlapping:
            with raises_naming(ValueError, operation, "tensor 1,"):
                call([torch.ones(2), tensor])
        with raises_naming(ValueError, operation, "tensors 0 and 2"):
            call([base, torch.ones(2), base[1:3]])
        call([base[:2], base[2:], torch.ones(1).expand(1, 1), base[:0], base[:0]])
    assert base.sub(1).abs().max() < 1e-6


def tuples_are_one_message(comm: Comm) -> None:
    """Several tensors travel as one message, in order with others, and arrive as declared."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    long, short = spec(torch.ones(70_000)), ((2, 3), torch.int64)
    comm.post_recv(left, 1, [(long, short, ((), torch.bool)), short, (short,), (long, long)])
    wide = torch.full((70_000,), float(comm.rank))
    grid = torch.full((3, 2), comm.rank, dtype=torch.int64).t()
    for message in ((wide, grid, torch.tensor(True)), grid):
        comm.isend(message, right, 1)
    first, second = comm.recv(left, 1), comm.recv(left, 1)
    for message in ((grid,), (wide + 1, wide + 2)):
        comm.isend(message, right, 1)
    third, fourth = comm.recv(left, 1), comm.recv(left, 1)
    assert isinstance(first, tuple)
    assert [spec(part) for part in first] == [long, short, ((), torch.bool)]
    assert first[0].eq(left).all()
    assert first[1].eq(left).all()
    assert first[2].item()
    assert isinstance(second, Tensor)
    assert second.eq(left).all()
    assert isinstance(third, tuple)
    assert third[0].eq(left).all()
    assert fourth[0].eq(left + 1).all()
    assert fourth[1].eq(left + 2).all()
    assert all(part.data_ptr() % 64 == 0 for part in (*first, *fourth))
    comm.flush()


def a_tuple_takes_one_credit(comm: Comm) -> None:
    """As many tuples as credits may be in flight, whatever their length."""
    three = (torch.ones(3), torch.ones(4), torch.ones(5))
    for _ in range(comm.credits):
        comm.isend(three, comm.rank, 1)  # would wait for ever if a tuple took more
    comm.post_recv(comm.rank, 1, [tuple(map(spec, three))] * comm.credits)
    for _ in range(comm.credits):
        assert [part.numel() for part in comm.recv(comm.rank, 1)] == [3, 4, 5]
    comm.flush()


def outstanding(comm: Comm) -> str:
    """Return the part of the flight record about transfers in flight."""
    return comm.flight.text().partition("last events")[0]


def progress_moves_without_waiting(comm: Comm) -> None:
    """Large messages and means of all groups arrive although no rank waits."""
    other = comm.dup()
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    big = torch.full((1 << 19,), float(comm.rank))
    mean = torch.full((1 << 19,), float(comm.rank))
    other.post_recv(left, 1, [spec(big)])
    other.isend(big, right, 1)
    handle = comm.imean_([mean])
    comm.allgather_object(None)
    waited, turns, limit = comm.wait_s, 0, time.monotonic() + 20
    while any(text in outstanding(comm) for text in (" send (", "a mean of 1 tensors of world")):
        comm.progress()
        # Lets other threads run; posts and tests nothing.
        comm.transport.backend.idle(turns, "its next turn")
        turns += 1
        assert time.monotonic() < limit, comm.flight.text()
    assert comm.wait_s == waited
    handle.wait()
    assert other.recv(left, 1).eq(left).all()
    assert mean.sub((comm.size - 1) / 2).abs().max() < 1e-6
    other.flush()


def closed_groups_are_not_progressed(comm: Comm) -> None:
    """A finished group can be closed; one with something in flight cannot."""
    other = comm.dup("errands")
    other.post_recv(comm.rank, 1, [((), torch.int64)])
    with raises_naming(RuntimeError, "errands", "1 in flight", "int64"):
        other.close()
    other.isend(torch.tensor(1), comm.rank, 1)
    assert other.recv(comm.rank, 1).item() == 1
    other.flush()
    assert "of errands" in comm.flight.text()
    group_count = len(comm.context.groups)
    other.close()
    other.close()
    assert len(comm.context.groups) == group_count - 1
    comm.allgather_object(None)


def flight_records_show_what_is_outstanding(comm: Comm) -> None:
    """The recorder shows posted receives and sends with their peers, and the wait of a rank."""
    other = comm.dup("errands")
    other.post_recv(comm.rank, 7, [((2, 3), torch.float32)] * 2)
    comm.flight.note("action", "F3.0", "update", 17)
    texts: list[str] = []
    with observing(comm, lambda: texts.append(comm.flight.text())):
        comm.wait(lambda: bool(texts), "an observer")
    backend = comm.transport.backend
    process = f"world rank {backend.world_ranks[comm.rank]} on {comm.hosts[comm.rank]}"
    peer = f"rank {comm.rank} of errands ({process})"
    assert f"receive (2, 3) float32 from {peer} with tag 7 (1 more declared)" in texts[0]
    assert "action    F3.0 update 17" in texts[0]
    assert "s for an observer" in texts[0]
    for _ in range(2):
        other.isend(torch.ones(2, 3), comm.rank, 7)
    for _ in range(2):
        other.recv(comm.rank, 7)
    other.flush()
    text = comm.flight.text()
    for kind, end in (("send", "to"), ("sent", "to"), ("received", "from")):
        assert f"{kind:9} 24 bytes {end} rank {comm.rank} tag 7 of errands" in text
    assert "outstanding: 0" in text
    assert "is in no wait" in text


def order_within_and_across_channels(comm: Comm) -> None:
    """Messages of one channel keep their order; channels do not wait for each other."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for tag in (7, 8):
        comm.post_recv(left, tag, [((1,), torch.int64)] * 2)
    for tag in (7, 8):
        for number in range(2):
            comm.isend(torch.tensor([10 * tag + number]), right, tag)
    assert [comm.recv(left, tag).item() for tag in (8, 7, 8, 7)] == [80, 70, 81, 71]
    comm.flush()


def channel_objects_are_the_channels(comm: Comm) -> None:
    """A channel object sends and receives as the methods of `Comm` do, in one order with them."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    to_right, from_left = comm.send_channel(right, 3), comm.recv_channel(left, 3)
    assert comm.send_channel(right, 3) is to_right
    assert comm.recv_channel(left, 3) is from_left
    from_left.post_recv([((), torch.int64)] * 2)
    comm.post_recv(left, 3, [((), torch.int64), (((2,), torch.float32), ((), torch.bool))])
    received: list[float] = []
    for number in range(0, 4, 2):
        to_right.send(torch.tensor(number))
        received.append(comm.recv(left, 3).item())
        message = torch.tensor(number + 1)
        comm.isend(message if number == 0 else (torch.ones(2), torch.tensor(True)), right, 3)
        if number == 0:
            received.append(from_left.receive().item())
    ones, flag = from_left.receive()
    assert received == [0, 1, 2]
    assert ones.equal(torch.ones(2))
    assert flag.item()
    comm.flush()
    assert len(to_right) == 0
    with raises_naming(RuntimeError, f"rank {left}", "tag 3"):
        from_left.receive()


def a_receive_may_be_posted_after_the_send(comm: Comm) -> None:
    """A message that was sent before it was declared waits for its receive."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    comm.isend(torch.tensor(3), right, 5)
    comm.allgather_object(None)
    comm.post_recv(left, 5, [((), torch.int64)])
    assert comm.recv(left, 5).item() == 3
    comm.flush()
    with raises_naming(RuntimeError, f"rank {left}", "tag 5"):
        comm.recv(left, 5)


def credits_bound_what_is_in_flight(comm: Comm) -> None:
    """A send beyond the credits waits until the oldest was received, and not before."""
    comm.post_recv(comm.rank, 1, [((1,), torch.int64)])
    for number in range(comm.credits + 1):  # the posted one completes at once
        comm.isend(torch.tensor([number]), comm.rank, 1)
    received: list[float] = []

    def receive() -> None:
        if not waited:
            waited.append(True)
            comm.post_recv(comm.rank, 1, [((1,), torch.int64)] * (comm.credits + 1))
            received.append(comm.recv(comm.rank, 1).item())

    waited: list[bool] = []
    with observing(comm, receive):
        comm.isend(torch.tensor([comm.credits + 1]), comm.rank, 1)
    assert waited, "the send did not wait"
    received += [comm.recv(comm.rank, 1).item() for _ in range(comm.credits + 1)]
    assert received == list(range(comm.credits + 2))
    comm.flush()


def flush_waits_for_the_receiver(comm: Comm) -> None:
    """A send is complete only once it was received, however small it is."""
    comm.isend(torch.tensor(1), comm.rank, 1)
    posted: list[bool] = []

    def post() -> None:
        if not posted:
            posted.append(True)
            comm.post_recv(comm.rank, 1, [((), torch.int64)])

    with observing(comm, post):
        comm.flush()
    assert posted, "the send was complete without a receive"
    assert comm.recv(comm.rank, 1).item() == 1


def chunks_are_invisible(comm: Comm) -> None:
    """Messages and means longer than `chunk_bytes` travel in chunks, to the same effect."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    comm.transport.chunk_bytes = 7
    kinds = [((9, 5), torch.float64), ((0,), torch.float32), ((7,), torch.uint8)]
    comm.post_recv(left, 1, kinds)
    for number, kind in enumerate(kinds):
        comm.isend(noise(*kind, seed=comm.rank + number), right, 1)
        assert bits(comm.recv(left, 1)) == bits(noise(*kind, seed=left + number))
    comm.flush()
    mean = torch.full((33,), float(comm.rank))
    comm.mean_([mean])
    torch.testing.assert_close(mean, torch.full_like(mean, (comm.size - 1) / 2))
    assert comm.allgather_object(comm.rank) == list(range(comm.size))


def mean_has_exactly_the_documented_bits(comm: Comm) -> None:
    """The weighted mean has these bits in every dtype, wherever pieces are cut."""
    sizes = [(3,), (0,), (100_001,), (), (20, 30), (300_000,), (5,)]
    scales = weights(comm.size)
    for dtype in FLOATS:
        parts = [
            [normal(shape, dtype, 1000 * rank + i) for i, shape in enumerate(sizes)]
            for rank in range(comm.size)
        ]
        mine = [part.clone() for part in parts[comm.rank]]
        comm.mean_(mine, scales[comm.rank])
        for number, tensor in enumerate(mine):
            mean = exact([part[number] for part in parts], scales, comm.nodes)
            assert bits(tensor) == bits(mean), (dtype, number)


def mean_is_near_float64(comm: Comm) -> None:
    """The default mean is the mean, to the precision of the dtype."""
    for dtype, error in zip(FLOATS, (1e-6, 1e-15, 1e-2, 1e-3), strict=True):
        parts = [normal((50, 7), dtype, rank) for rank in range(comm.size)]
        mine = parts[comm.rank].clone()
        comm.mean_([mine])
        mean = torch.stack([part.double() for part in parts]).mean(0)
        torch.testing.assert_close(mine.double(), mean, rtol=error, atol=error)


def mean_repeats_and_agrees(comm: Comm) -> None:
    """All ranks hold the same bits, in every repetition."""
    runs = []
    for _ in range(3):
        mine = [normal((70_000,), torch.float32, comm.rank), normal((9,), torch.bfloat16, 7)]
        comm.mean_(mine, weights(comm.size)[comm.rank])
        assert same(comm, mine)
        runs.append([bits(tensor) for tensor in mine])
    assert runs[0] == runs[1] == runs[2]


def mean_of_mixed_and_strided(comm: Comm) -> None:
    """Dtypes may be mixed; strided tensors and parameters are changed in place, too."""
    wide = torch.full((6, 4), float(comm.rank + 1), dtype=torch.float64)
    leaf = torch.nn.Parameter(torch.full((3,), float(comm.rank + 1)))
    picture = torch.full((2, 3, 4, 4), float(comm.rank + 1)).to(memory_format=torch.channels_last)
    half = torch.full((5,), float(comm.rank + 1), dtype=torch.bfloat16)
    comm.mean_([wide.t()[1:3], leaf, half, picture])
    for tensor in (leaf, half, picture, wide[:, 1:3]):
        mean = torch.full_like(tensor, (comm.size + 1) / 2)
        torch.testing.assert_close(tensor.detach(), mean.detach())
    assert wide[:, 0].eq(comm.rank + 1).all()


def mean_alone_is_the_identity(comm: Comm) -> None:
    """In a group of one nothing changes, bit for bit; a weight scales."""
    alone = comm.split(comm.rank)
    for dtype in FLOATS:
        tensor = normal((40,), dtype, 3)
        for weight in (None, 1.0):
            copy = tensor.clone()
            alone.mean_([copy], weight)
            assert bits(copy) == bits(tensor)
        alone.mean_([copy], 0.5)
        assert copy.equal(tensor * 0.5)


def mean_of_nothing(comm: Comm) -> None:
    """A mean of no tensors, or of empty ones, sends nothing and does not hang."""
    before = comm.traffic.bytes_intra + comm.traffic.bytes_inter
    comm.mean_([])
    comm.mean_([torch.empty(0), torch.empty(0, 3, dtype=torch.float64)])
    assert comm.traffic.bytes_intra + comm.traffic.bytes_inter == before


def mean_refuses_by_name(comm: Comm) -> None:
    """Integers and booleans have no mean; the message names the tensor."""
    for dtype in (torch.int64, torch.bool, torch.uint8):
        with raises_naming(TypeError, dtype, "tensor 1", (2,)):
            comm.mean_([torch.ones(3), torch.ones(2).to(dtype)])


def means_keep_no_reference(comm: Comm) -> None:
    """A finished mean keeps no reference to its tensors: a run of many updates must not grow."""
    tensor = torch.ones(1000)
    watch = weakref.ref(tensor)
    comm.mean_([tensor])
    del tensor
    gc.collect()
    assert watch() is None


def means_in_flight_do_not_mix(comm: Comm) -> None:
    """Means may be started in one order and waited for in another, among messages."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    first = [torch.full((3 << 18,), float(comm.rank))]
    second = [torch.full((3 << 18,), 10.0 * comm.rank), torch.full((3,), -1.0 * comm.rank)]
    handles = [comm.imean_(first), comm.imean_(second)]
    comm.post_recv(left, 0, [((1,), torch.int64)])
    comm.isend(torch.tensor([comm.rank]), right, 0)
    assert comm.recv(left, 0).item() == left
    for handle in handles if comm.rank % 2 else reversed(handles):
        handle.wait()
        assert handle.test()
    mean = (comm.size - 1) / 2
    assert first[0].eq(mean).all()
    assert second[0].eq(10 * mean).all()
    assert second[1].eq(-mean).all()
    comm.flush()


def mean_advances_in_waits_of_other_groups(comm: Comm) -> None:
    """A mean of one group advances while its ranks wait for something in another."""
    other = comm.dup()
    tensor = torch.full((1 << 19,), float(comm.rank))
    handle = comm.imean_([tensor])
    for _ in range(3):
        other.allgather_object(None)
    other.wait(handle.test, "a mean of another group")
    torch.testing.assert_close(tensor, torch.full_like(tensor, (comm.size - 1) / 2))


def bytes_follow_the_formula(comm: Comm) -> None:
    """Payload is counted exactly: 2 (n - 1) of a mean, n - 1 of a broadcast, each message."""

    def sent(work: Callable[[], object]) -> int:
        before = comm.traffic.bytes_intra + comm.traffic.bytes_inter
        work()
        after = comm.traffic.bytes_intra + comm.traffic.bytes_inter
        return int(sum(comm.allgather_object(after - before)))

    tensors = [torch.ones(100_003), torch.ones(7), torch.ones(12_345, dtype=torch.float64)]
    payload = sum(tensor.nbytes for tensor in tensors)
    n = comm.size
    assert sent(lambda: comm.mean_(tensors, 1 / n)) == 2 * (n - 1) * payload
    assert sent(lambda: comm.broadcast_(tensors, n - 1)) == (n - 1) * payload
    assert sent(lambda: comm.allgather_object("control data is not counted")) == 0

    def message() -> None:
        comm.post_recv(comm.rank, 3, [((5,), torch.float64)])
        comm.isend(torch.ones(5, dtype=torch.float64), comm.rank, 3)
        comm.recv(comm.rank, 3)
        comm.flush()

    assert sent(message) == n * 40
    with comm.without_counting():
        assert sent(message) == 0
        handle = comm.imean_(tensors)  # counted or not by where it starts
    assert sent(handle.wait) == 0
    assert sent(message) == n * 40


def broadcast_from_every_root(comm: Comm) -> None:
    """All ranks get the root's bits, in any dtype, strided ones too."""
    for root in range(comm.size):
        mine = [noise((3, 5), dtype, 10 * comm.rank + i) for i, dtype in enumerate(DTYPES)]
        grid = noise((4, 6), torch.int32, comm.rank)
        comm.broadcast_([*mine, grid.t()], root)
        for i, (tensor, dtype) in enumerate(zip(mine, DTYPES, strict=True)):
            assert bits(tensor) == bits(noise((3, 5), dtype, 10 * root + i))
        assert grid.equal(noise((4, 6), torch.int32, root))


def allgather_keeps_rank_order(comm: Comm) -> None:
    """Items of very different sizes come back in rank order; NaN is allowed."""
    item = {"rank": comm.rank, "text": "ü" * 1000 * comm.rank, "loss": math.nan, "none": None}
    items = comm.allgather_object(item)
    assert [other["rank"] for other in items] == list(range(comm.size))
    assert [len(other["text"]) for other in items] == [1000 * r for r in range(comm.size)]
    assert all(math.isnan(other["loss"]) and other["none"] is None for other in items)


def errors_are_raised_on_all_ranks_or_none(comm: Comm) -> None:
    """All ranks raise the error of the lowest failing rank, or none does."""
    last = comm.size - 1

    def fail(ranks: Sequence[int]) -> int:
        if comm.rank in ranks:
            raise DataError(f"test.rank-{comm.rank}", "a message")
        return comm.rank

    comm.raise_together(None)
    assert all_or_none(comm, lambda: fail([])) == comm.rank
    with refuses(DataError, f"test.rank-{last}") as caught:
        all_or_none(comm, lambda: fail([last]))
    assert caught.value.on_all_ranks
    with refuses(ConfigError, "test.rank-0") as caught:
        comm.raise_together(ConfigError(f"test.rank-{comm.rank}", "a message"))
    assert caught.value.on_all_ranks


def broadcast_objects_come_from_rank_zero(comm: Comm) -> None:
    """`broadcast_object` runs on rank 0 alone; all ranks get its result, or raise its error."""
    calls: list[int] = []

    def work() -> object:
        calls.append(comm.rank)
        return {"rank": comm.rank, "pair": (1, None)}

    def fail() -> object:
        raise DataError("test.broadcast", "a message")

    assert broadcast_object(comm, work) == {"rank": 0, "pair": [1, None]}
    assert calls == ([0] if comm.rank == 0 else [])
    assert broadcast_object(comm, lambda: None) is None
    with refuses(DataError, "test.broadcast") as caught:
        broadcast_object(comm, fail)
    assert caught.value.on_all_ranks


def split_orders_by_key_then_rank(comm: Comm) -> None:
    """Groups are by colour, ordered by key, then rank; messages of two groups never match."""
    half = comm.split(comm.rank % 2)
    mine = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
    assert (half.rank, half.size) == (mine.index(comm.rank), len(mine))
    assert half.allgather_object(comm.rank) == mine
    back = comm.split(0, -comm.rank)
    assert back.allgather_object(comm.rank) == list(reversed(range(comm.size)))
    assert back.hosts == tuple(reversed(comm.hosts))
    twin = comm.dup()
    assert (twin.rank, twin.size, twin.hosts) == (comm.rank, comm.size, comm.hosts)
    for group in (comm, twin):
        group.post_recv(comm.rank, 1, [((), torch.int64)])
    for number, group in enumerate((twin, comm)):
        group.isend(torch.tensor(number), comm.rank, 1)
    assert comm.recv(comm.rank, 1).item() == 1
    assert twin.recv(comm.rank, 1).item() == 0
    assert half.traffic is comm.traffic
    comm.flush()
    twin.flush()


def nodes_are_numbered(comm: Comm) -> None:
    """Nodes are numbered by first appearance; `split_by_node` joins the ranks of one node."""
    local = comm.split_by_node()
    assert set(local.nodes) == {comm.nodes[comm.rank]}
    assert local.size == comm.nodes.count(comm.nodes[comm.rank])
    assert local.rank == comm.topology.local_rank
    assert (local.node_index, local.node_count) == (0, 1)
    assert comm.node_count == len(set(comm.nodes))
    assert comm.allgather_object(comm.node_index)[0] == 0


def memory_of_a_node_is_one(comm: Comm) -> None:
    """What one rank writes, the others read, to the last byte; sizes need not be those of pages."""
    node = comm.split_by_node()
    for size in (1, 4096 * node.size + 3, 0):
        memory = node.allocate_shared(size)
        assert memory is not None
        assert memory.shape == (size,)
        assert not memory.any()
        node.allgather_object(None)
        memory[node.rank :: node.size] = node.rank + 1
        node.allgather_object(None)
        expected = torch.arange(size) % node.size + 1
        assert torch.from_numpy(memory).equal(expected.to(torch.uint8))
        node.allgather_object(None)


def memory_of_a_node_is_given_to_all_or_none(comm: Comm) -> None:
    """More than the machine has is refused without an error, and the next request is served."""
    node = comm.split_by_node()
    assert node.allocate_shared(1 << 60) is None
    assert node.allocate_shared(10) is not None
    if comm.node_count > 1:
        with pytest.raises(ValueError, match=str(comm.node_count)):
            comm.allocate_shared(10)


def waits_end_with_a_name(comm: Comm) -> None:
    """A timeout, or a deadlock that is found earlier, names the rank and the message that it waits
    for; the message can still arrive."""
    hasty = comm.dup()
    hasty.timeout_s = 0.02
    hasty.post_recv(comm.rank, 9, [((2, 3), torch.float32)])
    with raises_naming(CommTimeout, f"rank {comm.rank}", "(2, 3) float32", "tag 9"):
        hasty.recv(comm.rank, 9)
    hasty.timeout_s = None
    hasty.isend(torch.ones(2, 3), comm.rank, 9)
    assert hasty.recv(comm.rank, 9).eq(1).all()
    hasty.flush()


def a_wait_in_one_group_progresses_all(comm: Comm) -> None:
    """Every turn of a wait moves the messages of all groups of the world."""
    other = comm.dup()
    comm.isend(torch.ones(3), comm.rank, 1)
    comm.post_recv(comm.rank, 1, [((3,), torch.float32)])
    other.wait(lambda: not list(comm.send_channel(comm.rank, 1).pending()), "a send elsewhere")
    assert comm.recv(comm.rank, 1).eq(1).all()


def parts_reach_their_ranks(comm: Comm) -> None:
    """An all-to-all works in any dtype and beside a mean, and is counted."""
    size, rank = comm.size, comm.rank

    def part(source: int, target: int) -> Tensor:
        return torch.full((target + 2, 3), 10 * source + target, dtype=torch.uint8)

    before = comm.traffic.bytes_intra + comm.traffic.bytes_inter
    exchange = comm.ialltoall([part(rank, target) for target in range(size)])
    with comm.without_counting():
        mean = comm.imean_([torch.ones(5)])
    received = exchange.wait()
    mean.wait()
    for source, tensor in enumerate(received):
        assert torch.equal(tensor, part(source, rank))
    sent = sum(part(0, target).nbytes for target in range(size) if target != rank)
    with comm.without_counting():
        gathered = comm.ialltoall([torch.tensor(float(rank))] * size).wait()
    assert [float(tensor) for tensor in gathered] == list(range(size))
    assert comm.traffic.bytes_intra + comm.traffic.bytes_inter == before + sent
    with raises_naming(ValueError, f"{size + 1} parts", f"{size} ranks"):
        comm.ialltoall([torch.ones(1)] * (size + 1))
    with raises_naming(TypeError, "all_to_all", "meta"):
        comm.ialltoall([torch.ones(1, device="meta")] * size)


def debugging_changes_nothing(comm: Comm) -> None:
    """In debug mode the same calls give the same bits and count the same bytes."""

    def work() -> list[object]:
        before = comm.traffic.bytes_intra + comm.traffic.bytes_inter
        mine = [normal((700,), torch.float32, comm.rank), normal((9, 5), torch.float64, comm.rank)]
        comm.mean_(mine, weights(comm.size)[comm.rank])
        named = dict(zip("ab", mine, strict=True))
        comm.mean_(named)
        handles = [comm.imean_(named), comm.dup().imean_([torch.ones(3)])]
        for handle in handles:
            handle.wait()
        comm.broadcast_({"c": mine[0][:3]}, comm.size - 1)
        comm.ialltoall([mine[0]] * comm.size).wait()
        items = comm.allgather_object("x" * comm.rank)
        after = comm.traffic.bytes_intra + comm.traffic.bytes_inter
        return [*map(bits, mine), items, after - before]

    before = work()
    assert not comm.context.debug_mode
    comm.context.debug()
    assert comm.dup().context.debug_mode
    assert work() == before


def debugging_names_what_differs(comm: Comm) -> None:
    """Other shapes, dtypes, names, numbers of tensors, roots and operations: the error on all ranks
    names the rank and both calls, and the ranks may go on."""
    last, t = comm.size - 1, torch.ones
    comm.context.debug()
    twins = comm.dup("twins")
    odd = comm.rank == last

    def call(difference: str) -> None:
        match difference:
            case "shape":
                twins.mean_({"u": t(2), "v": t(3) if odd else t(4)})
            case "dtype":
                twins.imean_([t(2), t(3, dtype=torch.float64) if odd else t(3)])
            case "name":
                twins.broadcast_({"v" if odd else "u": t(2)})
            case "number":
                twins.mean_([t(2)] if odd else [t(2), t(3)])
            case "root":
                twins.broadcast_([t(2)], last if odd else 0)
            case "operation":
                twins.allgather_object(0) if odd else twins.mean_([t(2)])

    differences = {
        "shape": ("mean_", "tensor 1 'v' (3,) float32", "tensor 1 'v' (4,) float32"),
        "dtype": ("mean_", "tensor 1 (3,) float64", "tensor 1 (3,) float32"),
        "name": ("broadcast_ from rank 0", "tensor 0 'v' (2,)", "tensor 0 'u' (2,)"),
        "number": ("mean_", "no tensor 1", "tensor 1 (3,) float32"),
        "root": (f"broadcast_ from rank {last}", "broadcast_ from rank 0"),
        "operation": ("exchange", "mean_"),
    }
    for number, (difference, facts) in enumerate(differences.items(), 1):
        if last:
            calls = f"rank {last} of twins (world rank {last}) calls {facts[0]}"
            with raises_naming(
                CollectiveMismatch, calls, f"(collective {number} of twins)", *facts[1:]
            ):
                call(difference)
        else:
            call(difference)
        assert twins.allgather_object(comm.rank) == list(range(comm.size))


def debugging_names_ranks_that_call_elsewhere(comm: Comm) -> None:
    """Ranks that call two groups in different orders raise after the time limit."""
    last = comm.size - 1
    first, second = comm.dup("first"), comm.dup("second")
    comm.context.debug(0.3)
    if not last:
        return
    group = second if comm.rank == last else first  # and then the other
    absent = "rank 0 of second" if comm.rank == last else f"rank {last} of first"
    call = f"mean_ (collective 1 of {group.name})"
    with raises_naming(CollectiveMismatch, absent, call, f"as rank {comm.rank} has"):
        group.imean_([torch.ones(2)])


def debugging_names_ranks_that_call_nothing(comm: Comm) -> None:
    """The error for a missing call names its number, and the last call that all ranks made."""
    twins = comm.dup("twins")
    comm.context.debug(0.3)
    twins.mean_([torch.ones(2)])
    last = comm.size - 1
    if comm.rank == last:
        return
    calls = "exchange (collective 2 of twins)", "mean_ (collective 1 of twins)"
    with raises_naming(CollectiveMismatch, f"rank {last} of twins", *calls):
        twins.allgather_object(None)


def tags_are_checked(comm: Comm) -> None:
    """Tags of users end below those of collectives."""
    for tag in (-1, 1 << 14):
        with raises_naming(ValueError, f"tag {tag}"):
            comm.isend(torch.ones(1), comm.rank, tag)


def declared_messages_may_be_withdrawn(comm: Comm) -> None:
    """The next declaration starts anew, with messages of another size."""
    if comm.size == 1:
        return
    source, dest = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    for size in (3, 5):
        comm.post_recv(source, 1, [((size,), torch.float32)] * 4)
        comm.isend(torch.full((size,), float(comm.rank)), dest, 1)
        message = comm.recv(source, 1)
        assert isinstance(message, Tensor)
        assert message.tolist() == [float(source)] * size
        comm.flush()
        before = comm.traffic.message_bytes
        comm.recv_channel(source, 1).cancel()
        assert comm.traffic.message_bytes == before - 4 * size
        comm.allgather_object(None)  # no rank sends of the next size before


def early_ends(comm: Comm, seed: int, updates: int = 40) -> list[int]:
    """Return where three segments of a pipeline end, whose ranks ask for it at random moments."""
    chance, message = random.Random(seed * 100 + comm.rank), torch.zeros(3)
    early_end, ends, start = EarlyEnd(comm.dup(), in_segments=True), list[int](), 0
    for _ in range(3):
        done = start
        if comm.rank:
            comm.post_recv(comm.rank - 1, 1, [((3,), torch.float32)] * updates)
        for update in range(start, start + updates):
            if not early_end.admits(update):
                break
            if comm.rank:
                comm.recv(comm.rank - 1, 1)
            done = update + 1
            if comm.rank + 1 < comm.size:
                comm.isend(message, comm.rank + 1, 1)
            if chance.random() < 0.02:
                early_end.passing_request = 1
        assert done == early_end.end_of(start + updates)
        comm.flush()
        if comm.rank:
            comm.recv_channel(comm.rank - 1, 1).cancel()
        ends.append(done)
        announced = max(comm.allgather_object(early_end.announce(done)))
        early_end.settle(announced, done + 1)
        start = done
    if any(comm.allgather_object(early_end.disable())):
        early_end.settle(1, 0)
    early_end.close()
    return ends


def ranks_end_a_segment_at_one_update(comm: Comm) -> None:
    first, *others = comm.allgather_object(early_ends(comm, 1))
    assert all(ends == first for ends in others)
    assert all(0 < end <= start + 40 for start, end in zip([0, *first], first, strict=False))


CASES: list[Callable[[Comm], None]] = [
    ring_of_all_dtypes,
    big_both_ways,
    big_of_all_dtypes,
    awkward_memory_is_sent_in_order,
    sends_are_refused_by_name,
    overwritten_memory_must_be_disjoint,
    tuples_are_one_message,
    a_tuple_takes_one_credit,
    progress_moves_without_waiting,
    closed_groups_are_not_progressed,
    flight_records_show_what_is_outstanding,
    order_within_and_across_channels,
    channel_objects_are_the_channels,
    a_receive_may_be_posted_after_the_send,
    credits_bound_what_is_in_flight,
    flush_waits_for_the_receiver,
    chunks_are_invisible,
    mean_has_exactly_the_documented_bits,
    mean_is_near_float64,
    mean_repeats_and_agrees,
    mean_of_mixed_and_strided,
    mean_alone_is_the_identity,
    mean_of_nothing,
    mean_refuses_by_name,
    means_keep_no_reference,
    means_in_flight_do_not_mix,
    mean_advances_in_waits_of_other_groups,
    bytes_follow_the_formula,
    broadcast_from_every_root,
    allgather_keeps_rank_order,
    errors_are_raised_on_all_ranks_or_none,
    broadcast_objects_come_from_rank_zero,
    split_orders_by_key_then_rank,
    nodes_are_numbered,
    memory_of_a_node_is_one,
    memory_of_a_node_is_given_to_all_or_none,
    waits_end_with_a_name,
    a_wait_in_one_group_progresses_all,
    parts_reach_their_ranks,
    debugging_changes_nothing,
    debugging_names_what_differs,
    debugging_names_ranks_that_call_elsewhere,
    debugging_names_ranks_that_call_nothing,
    tags_are_checked,
    declared_messages_may_be_withdrawn,
    ranks_end_a_segment_at_one_update,
]


OVERLAPPING: list[Callable[[Comm], None]] = [
    progress_moves_without_waiting,
    order_within_and_across_channels,
    channel_objects_are_the_channels,
    credits_bound_what_is_in_flight,
    flush_waits_for_the_receiver,
    means_in_flight_do_not_mix,
    mean_advances_in_waits_of_other_groups,
    parts_reach_their_ranks,
]
"""Cases in which several transfers are in flight: their outcome might depend on timing."""
