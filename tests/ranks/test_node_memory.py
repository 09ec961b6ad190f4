"""Data are held once per node, or read from disk, and what is trained does not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dtrain.build import hold_data
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.comm.shared_memory import allocate_shared
from dtrain.config.run import RunConfig
from dtrain.data import node_memory, shuffle_windows, source_dataset
from dtrain.data.array_source import ArraySource, LazySource, MemorySource
from dtrain.data.conversion import Array
from dtrain.data.dataset import Dataset, Subset
from dtrain.data.formats import mapped_source
from dtrain.data.formats.hdf5_source import Hdf5Source
from dtrain.data.formats.npy_source import open_npy
from dtrain.data.node_memory import hold_on_node, stored_arrays
from dtrain.data.source_dataset import SourceDataset
from dtrain.errors import DataError
from dtrain.evaluation import evaluate_run
from dtrain.planning import data_memory
from dtrain.planning.data_memory import node_warnings
from dtrain.planning.plan import Plan, make_plan
from dtrain.planning.report import plan_table, plan_text
from dtrain.prediction import predict_run
from dtrain.session import data_notes
from tests import tiny
from tests.harness import train_in_threads
from tests.refusals import refuses
from tests.single import one_thread  # noqa: F401

RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(50, 3, 4)), RNG.integers(0, 3, 50)


class FileSource(ArraySource):
    """Rows that count as being in a file, and a record of the ranges that are read."""

    def __init__(self, rows: Array, chunk_rows: int | None = None) -> None:
        self.rows, self.ranges = rows, list[tuple[int, int]]()
        self.shape, self.dtype, self.location = rows.shape, rows.dtype, "a file"
        self.chunk_rows = chunk_rows

    def read(self, indices: Any) -> Array:
        return self.rows[np.asarray(indices)].copy()

    def read_range(self, start: int, stop: int) -> Array:
        self.ranges.append((start, stop))
        return self.rows[start:stop]


class BrokenSource(FileSource):
    """A file whose rows cannot be read."""

    def read_range(self, start: int, stop: int) -> Array:
        raise DataError("data.file-damaged", "torn")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_memory, "PIECE_BYTES", 1000)
    monkeypatch.setattr(node_memory, "SMALL_BYTES", 100)


def limit(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    """Let every rank have so much memory."""
    monkeypatch.setattr(node_memory, "available_bytes", lambda: available)


Made = Callable[[int], dict[str, Dataset]]


def hold(
    make: Made, hosts: Sequence[str], readers: Sequence[int], owned: bool = True
) -> list[dict[str, Dataset]]:
    """Make data on ranks of these hosts and hold them; return those of each rank."""

    def work(comm: Comm) -> dict[str, Dataset]:
        splits = make(comm.rank)
        hold_on_node(splits, comm, reads_inputs=comm.rank in readers, owned=owned)
        return splits

    return run_ranks(len(hosts), work, hosts=hosts)


def places(splits: dict[str, Dataset]) -> dict[tuple[str, str], str]:
    """Return where the arrays are, by split and content."""
    return {(array.split, array.content): array.place for array in stored_arrays(splits)}


def rows_of(splits: dict[str, Dataset], split: str = "train", content: str = "inputs") -> Array:
    """Return the array that a data set reads from."""
    found = [a for a in stored_arrays(splits) if (a.split, a.content) == (split, content)]
    assert isinstance(found[0].source, MemorySource)
    return found[0].source.array


@pytest.mark.parametrize("chunk", [None, 7, 64])
@pytest.mark.parametrize("hosts", ["a", "aaa", "abab", "aabbb"])
def test_the_ranks_of_a_node_have_one_copy(hosts: str, chunk: int | None) -> None:
    """Each of them reads a share of whole chunks; every row is read once on each node."""
    sources = {rank: FileSource(X, chunk) for rank in range(len(hosts))}

    def make(rank: int) -> dict[str, Dataset]:
        return {"train": SourceDataset(sources[rank], FileSource(Y), 3)}

    splits = hold(make, hosts, range(len(hosts)))
    for rank, host in enumerate(hosts):
        assert set(places(splits[rank]).values()) == {"node"}
        assert not splits[rank]["train"].slow
        assert np.array_equal(rows_of(splits[rank]), X)
        for other, other_host in enumerate(hosts):
            is_shared = np.shares_memory(rows_of(splits[rank]), rows_of(splits[other]))
            assert is_shared == (host == other_host)
    for host in set(hosts):
        ranks = [rank for rank, name in enumerate(hosts) if name == host]
        read = sorted(pair for rank in ranks for pair in sources[rank].ranges)
        assert [i for start, stop in read for i in range(start, stop)] == list(range(50))
        assert all(start % (chunk or 1) == 0 for start, _ in read)


def test_ranks_that_read_no_samples_hold_targets_alone() -> None:
    """They open no file of samples, and the others share the reading among themselves."""
    sources = {rank: FileSource(X) for rank in range(4)}

    def make(rank: int) -> dict[str, Dataset]:
        return {"train": SourceDataset(sources[rank], FileSource(Y), 3)}

    splits = hold(make, "aaaa", readers=[0, 3])
    for rank in (1, 2):
        assert not sources[rank].ranges
        assert places(splits[rank]) == {("train", "targets"): "node", ("train", "inputs"): "disk"}
    assert np.shares_memory(rows_of(splits[0]), rows_of(splits[3]))
    targets = [rows_of(splits[rank], content="targets") for rank in (0, 1)]
    assert np.shares_memory(*targets)


@pytest.mark.parametrize(
    ("available", "held"),
    [
        (2 * (Y.nbytes + 2 * X.nbytes + 400), ["targets", "train", "test"]),
        (2 * (Y.nbytes + 2 * X.nbytes + 400) - 2, ["targets", "train"]),
        (2 * (Y.nbytes + X.nbytes) - 2, ["targets"]),
        (0, []),
    ],
)
def test_half_of_the_memory_holds_targets_first(
    available: int, held: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank with the least memory decides; the rest stays on disk."""
    least = iter([available + 10_000, available] * 3)
    monkeypatch.setattr(node_memory, "available_bytes", lambda: next(least))

    def make(rank: int) -> dict[str, Dataset]:
        test = SourceDataset(FileSource(X.astype(np.float64)), FileSource(Y.astype(np.int64)), 3)
        return {"train": SourceDataset(FileSource(X), FileSource(Y), 3), "test": test}

    for splits in hold(make, "aa", [0, 1]):
        on_node = {key for key, place in places(splits).items() if place == "node"}
        names = {"targets" if content == "targets" else split for split, content in on_node}
        assert names == set(held)
        assert splits["train"].slow == ("train" not in held)
        assert set(places(splits).values()) <= {"node", "disk"}


def test_two_views_of_a_data_set_are_held_once() -> None:
    def make(rank: int) -> dict[str, Dataset]:
        whole = SourceDataset(FileSource(X), FileSource(Y), 3)
        part = np.arange(0, 50, 2)
        return {"train": Subset(whole, part), "test": Subset(whole, part + 1)}

    for splits in hold(make, "aa", [0, 1]):
        assert places(splits) == {("train", "targets"): "node", ("train", "inputs"): "node"}
        assert splits["test"].inputs([3]).numpy().tolist() == X[7:8].tolist()


def test_further_inputs_are_held() -> None:
    mask = X[:, 0] > 0

    def make(rank: int) -> dict[str, Dataset]:
        return {"train": SourceDataset([FileSource(X), FileSource(mask)], FileSource(Y), 3)}

    for splits in hold(make, "aa", [0, 1]):
        assert places(splits)["train", "input 1"] == "node"
        assert splits["train"].read_other_inputs([4])[0].numpy().tolist() == mask[4:5].tolist()


COPIES: dict[str, tuple[Callable[[int], ArraySource], bool, str]] = {
    "equal": (lambda rank: MemorySource(X.copy()), True, "node"),
    "not in C order": (lambda rank: MemorySource(np.asfortranarray(X)), True, "node"),
    "different": (lambda rank: MemorySource(X + rank), True, "rank"),
    "also the user's": (lambda rank: MemorySource(X.copy()), False, "rank"),
    "small": (lambda rank: MemorySource(X[:, :1, :1] * np.ones((1, 1, 1))), True, "rank"),
    "one number": (lambda rank: MemorySource(np.broadcast_to(X[:1], X.shape)), True, "rank"),
    "loaded on first need": (
        lambda rank: LazySource(X.shape, X.dtype, X.copy, "a function"),
        True,
        "node",
    ),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_of_a_function_become_one(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_source, owned, place = COPIES[case]
    monkeypatch.setattr(node_memory, "SMALL_BYTES", 4000)
    x = make_source(0).read(np.arange(50))

    def make(rank: int) -> dict[str, Dataset]:
        return {"train": SourceDataset(make_source(rank), MemorySource(Y), 3)}

    first, second = hold(make, "aa", [0, 1], owned)
    assert places(first)["train", "inputs"] == place
    assert np.array_equal(first["train"].inputs(np.arange(50)).numpy(), x)
    if place == "node":
        assert np.shares_memory(rows_of(first), rows_of(second))
        assert not rows_of(first).flags.writeable


def test_a_memory_map_is_left_as_it_is(tmp_path: Path) -> None:
    """The pages of a file are in memory once, whoever maps them; also those of a part."""
    np.save(tmp_path / "x.npy", X)

    def make(rank: int) -> dict[str, Dataset]:
        rows = np.load(tmp_path / "x.npy", mmap_mode="r")
        sources = {
            "train": MemorySource(rows),
            "test": MemorySource(np.asarray(rows[:40])),
        }
        labels = MemorySource(Y[:0])
        return {name: SourceDataset(source, labels, 3) for name, source in sources.items()}

    for splits in hold(make, "aa", [0, 1]):
        assert places(splits)["train", "inputs"] == "mapped"
        assert places(splits)["test", "inputs"] == "mapped"


def test_one_rank_keeps_its_own_array() -> None:
    rows = X.copy()
    [splits] = hold(
        lambda rank: {"train": SourceDataset(MemorySource(rows), MemorySource(Y), 3)}, "a", [0]
    )
    assert rows_of(splits) is rows


@pytest.mark.parametrize("broken", ["inputs", "targets"])
@pytest.mark.parametrize("rank", [0, 2])
def test_rows_that_cannot_be_read_are_refused_on_all_ranks(broken: str, rank: int) -> None:
    refused = []

    def work(comm: Comm) -> None:
        bad = {broken} if comm.rank == rank else set()
        x = BrokenSource(X) if "inputs" in bad else FileSource(X)
        y = BrokenSource(Y) if "targets" in bad else FileSource(Y)
        with refuses(DataError, "data.file-damaged"):
            hold_on_node({"train": SourceDataset(x, y, 3)}, comm, reads_inputs=True, owned=True)
        refused.append(comm.rank)

    run_ranks(4, work, hosts="aabb")
    assert sorted(refused) == [0, 1, 2, 3]


@pytest.mark.parametrize(("available", "place"), [(1 << 30, "rank"), (0, "disk")])
def test_ranks_that_cannot_share_have_copies_if_they_fit(
    available: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.comm.communicator.allocate_shared", lambda comm, size: None)
    monkeypatch.setattr("dtrain.data.memory_limits.available_bytes", lambda: available)

    def make(rank: int) -> dict[str, Dataset]:
        return {"train": SourceDataset(FileSource(X), FileSource(Y), 3)}

    for splits in hold(make, "aa", [0, 1]):
        assert set(places(splits).values()) == {place}
        assert splits["train"].inputs([3]).numpy().tolist() == X[3:4].tolist()


def test_data_of_other_ranks_are_not_taken() -> None:
    """Ranks whose functions return other shapes are refused later, and here nothing hangs."""

    def make(rank: int) -> dict[str, Dataset]:
        return {"train": SourceDataset(MemorySource(X[: 40 + rank]), MemorySource(Y), 3)}

    for rank, splits in enumerate(hold(make, "aa", [0, 1])):
        assert rows_of(splits).shape[0] == 40 + rank


def test_ranks_in_one_process_may_be_given_the_same_data() -> None:
    """A second run with them has nothing left to hold."""
    given: dict[str, Dataset] = {"train": SourceDataset(FileSource(X), FileSource(Y), 3)}
    for _ in range(2):
        first, second = hold(lambda rank: given, "aa", [0, 1], owned=False)
        assert rows_of(first) is rows_of(second)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Write chunked and compressed files of the samples of `tiny`."""
    x, y, x_test, y_test = tiny.samples()
    for name, rows, labels in (("train", x, y), ("test", x_test, y_test)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("x", data=rows, chunks=(4, 2, 5), compression="gzip")
            file["y"] = labels
    return tmp_path


def run_of(files: Path, **changes: Any) -> RunConfig:
    data = {key: str(files / f"{key}.h5") for key in ("train", "test")}
    return tiny.run(data={"name": "hdf5", **data}, **changes)


LAYOUTS = {"one": (1, 1, None), "stages": (3, 1, "aab"), "replicas": (2, 2, "abab")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_does_not_depend_on_what_is_held(
    layout: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, targets alone, one split and everything: one digest, and that of data in memory."""
    stages, replicas, hosts = LAYOUTS[layout]
    x_bytes = 50 * 10 * 8
    digests = {}
    for available in (0, 1000, 2 * x_bytes + 2000, 1 << 30):
        limit(monkeypatch, available)
        summary = train_in_threads(
            run_of(files, mesh__stages=stages),
            files / f"{layout}-{available}",
            stages,
            replicas,
            hosts=hosts,
        )
        digests[available] = summary["digest"]
    summary = train_in_threads(
        tiny.run(mesh__stages=stages), files / layout, stages, replicas, hosts=hosts
    )
    assert set(digests.values()) == {summary["digest"]}


def test_windows_of_the_shuffle_do_not_depend_on_what_is_held(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows follow from how samples are stored, also where they are in memory then."""
    monkeypatch.setattr(shuffle_windows, "GROUP_BYTES", 1000)
    digests = set()
    for available in (0, 1 << 30):
        limit(monkeypatch, available)
        run = run_of(files)
        run = replace(run, data=replace(run.data, shuffle="chunks"))
        digests.add(train_in_threads(run, files / f"chunks-{available}")["digest"])
    assert len(digests) == 1


def test_windows_of_a_mapped_file_do_not_depend_on_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", X)
    pieces = []
    for fits in (True, False):
        monkeypatch.setattr(mapped_source, "fits_in_memory", lambda size, fits=fits: fits)
        dataset = SourceDataset(open_npy(tmp_path / "x.npy"), MemorySource(Y), 3)
        monkeypatch.setattr(source_dataset, "fits_in_memory", lambda size, fits=fits: fits)
        assert dataset.slow != fits
        pieces.append(dataset.stored_pieces)
    assert pieces[0] == pieces[1] is not None


def test_inner_stages_open_no_samples(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    for name in ("read", "read_range", "read_into"):
        method = getattr(Hdf5Source, name)

        def record(self: Hdf5Source, *arguments: Any, method: Any = method) -> Any:
            opened.append(self.name)
            return method(self, *arguments)

        monkeypatch.setattr(Hdf5Source, name, record)
    run = run_of(files)
    run = replace(run, data=replace(run.data, normalise=False))  # all ranks share in statistics
    train_in_threads(run, files / "out", 3)
    assert opened.count("x") == 5 + 2  # by the first stage, in pieces of three chunks
    assert opened.count("y") == 6  # by every stage: both splits


def test_evaluation_and_prediction_hold_what_they_read(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the split in question, or the samples of a file; the results are those from disk."""
    out = files / "out"
    train_in_threads(run_of(files), out, 2)
    monkeypatch.setattr(node_memory, "SMALL_BYTES", 1000)
    held: list[int] = []

    def record(comm: Comm, size: int) -> Any:
        held.append(size)
        return allocate_shared(comm, size)

    monkeypatch.setattr("dtrain.comm.communicator.allocate_shared", record)
    samples = files / "test.h5"
    results = []
    for available in (1 << 30, 0):
        limit(monkeypatch, available)
        results.append(
            (
                run_ranks(2, lambda comm: evaluate_run(out, comm, "test"))[0]["loss"],
                run_ranks(2, lambda comm: predict_run(out, comm, samples))[0],
                run_ranks(2, lambda comm: predict_run(out, comm, "test"))[0],
            )
        )
        if available:
            assert set(held) == {17 * 10 * 8}
            assert len(held) == 3  # by the first stage alone
            held.clear()
    assert not held
    (loss, outputs, same_outputs), (other_loss, *others) = results
    assert loss == other_loss
    assert all(np.array_equal(outputs, other) for other in (same_outputs, *others))


def data_row(plan: Plan) -> dict[str, int]:
    """Return the bytes of the data of a plan by place, without those that are 0."""
    table = plan_table(plan)["data"]
    assert table.pop("process_bytes") == data_memory.PROCESS_BYTES * (1 + plan.run.data.workers)
    return {key: size for key, size in table.items() if size}


def test_a_plan_says_what_a_node_holds(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a run, by the memory of this machine; afterwards, what the run has done."""
    x_bytes, y_bytes = 67 * 10 * 8, 67 * 8
    monkeypatch.setattr(node_memory, "SMALL_BYTES", 1000)
    plan = make_plan(run_of(files), 3)
    monkeypatch.setattr(data_memory, "available_bytes", lambda: 1 << 30)
    assert data_row(plan) == {"node_bytes": x_bytes, "rank_bytes": y_bytes}
    monkeypatch.setattr(data_memory, "available_bytes", lambda: 0)
    table = data_row(plan)
    assert table.pop("piece_bytes") > 0
    assert table == {"disk_bytes": x_bytes, "rank_bytes": y_bytes}
    limit(monkeypatch, 1 << 30)
    run_ranks(3, lambda comm: hold_data(plan, comm))
    assert data_row(plan) == {"node_bytes": x_bytes, "rank_bytes": y_bytes}
    assert "Data" in plan_text(plan).split("\n")


def test_a_plan_shows_arrays_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a function returns become one copy; those that a script holds do not."""
    arrays = tiny.samples()
    size = sum(array.nbytes for array in arrays)
    given = tiny.run()
    given = replace(given, dataset=replace(given.dataset, target=arrays))
    assert data_row(make_plan(tiny.run(), 3)) == {"node_bytes": size}
    assert data_row(make_plan(given, 3)) == {"rank_bytes": size}


def test_a_model_that_does_not_fit_beside_the_data_has_a_note(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(run_of(files), 3)
    notes = plan_table(plan)["cautions"]
    peaks = [row["peak_bytes"] for row in plan_table(plan)["memory"]]
    node = plan_table(plan)["data"]["node_bytes"]
    for available, count in ((node + max(peaks), 0), (node + max(peaks) - 1, 1)):
        monkeypatch.setattr(data_memory, "available_bytes", lambda size=available: max(size, 1))
        monkeypatch.setattr(data_memory, "choose_held", lambda arrays, size, owned: arrays)
        assert len(plan_table(plan)["cautions"]) == len(notes) + count
    for available, nodes in ((sum(peaks), 0), (sum(peaks) - 1, 1)):
        assert len(node_warnings(plan, [[0, 1, 2]], [available] * 3)) == nodes
    assert not node_warnings(plan, [[0], [1], [2]], [max(peaks)] * 3)


def test_a_run_whose_ranks_fill_the_node_says_so(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_threads(run_of(files), files / "out", 3)
    before = capsys.readouterr().out.count("\nnote ")
    monkeypatch.setattr(data_notes, "available_bytes", lambda: 1000)
    monkeypatch.setattr(data_notes, "SMALL_BYTES", 1000)
    train_in_threads(run_of(files), files / "other", 3, hosts="aab")
    assert capsys.readouterr().out.count("\nnote ") == before + 2
