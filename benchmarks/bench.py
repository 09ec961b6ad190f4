"""Starts runs of dtrain and programs of peers, one at a time and in turns, for all benchmarks.

Invariant: nothing runs beside what is being timed; a part that finished is kept on disk under the
clean commit that made it, so a benchmark that was cut short goes on where it was.

::

    turns(5, ours, theirs)      ours theirs | ours theirs | ...      five pairs, one after another
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, final

from record import ROOT, commit

from dtrain.comm.launcher import find_mpirun, launch_command, rank_environment
from dtrain.schema import Table, dump_toml

T = TypeVar("T")
PEERS = ROOT / "benchmarks" / "peers"
KEEPING = (f"MALLOC_MMAP_THRESHOLD_={2**25}", f"MALLOC_TRIM_THRESHOLD_={2**30}")


def asked(told: str | None) -> bool:
    """Return whether `--quick` was given; `told` is what `--help` says."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=told, formatter_class=plain)
    parser.add_argument("--quick", action="store_true", help="at most 10 minutes, writes no record")
    return bool(parser.parse_args().quick)


@final
@dataclass(frozen=True)
class Told:
    """What one run of dtrain left behind.

    Attributes
    ----------
    summary : dict
        `summary.json`.
    trained, tested : list of dict
        The records of `metrics.jsonl` at segment ends and at evaluations, in order.
    """

    summary: dict[str, Any]
    trained: list[dict[str, Any]]
    tested: list[dict[str, Any]] = field(default_factory=list)

    def walls(self) -> list[float]:
        """Return the seconds of each segment, its fill and its drain included."""
        done = [0, *(record["samples"] for record in self.trained)]
        rates = [record["samples_per_s"] for record in self.trained]
        return [(b - a) / rate for a, b, rate in zip(done, done[1:], rates, strict=False)]

    def rate(self) -> float:
        """Return samples per second: the median of all segments but the first, which warms up."""
        return median(float(record["samples_per_s"]) for record in self.trained[1:])


@final
class Bench:
    """One benchmark's folder of run files, run folders and finished parts.

    Parameters
    ----------
    name : str
        The script's name.
    quick : bool
        Kept apart from full mode.
    """

    def __init__(self, name: str, quick: bool) -> None:
        mark = commit()
        clean = not mark.endswith("-changed")
        self.folder = ROOT / "runs" / name / ("quick" if quick else "full") / mark[:12]
        if not clean:  # nobody knows what made the parts that lie there
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "benchmarks" / "user.py", self.folder)

    def has(self, part: str) -> bool:
        """Say whether a part is there from an earlier start."""
        return (self.folder / f"{part}.json").exists()

    def kept(self, part: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return what `make` returns, from disk where an earlier start made it: plain values."""
        path = self.folder / f"{part}.json"
        if not path.exists():
            text = json.dumps(make())
            path.with_suffix(".part").write_text(text, encoding="utf-8")
            path.with_suffix(".part").rename(path)
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def train(self, run: Table, ranks: int, threads: int = 1, where: str = ".") -> Told:
        """Train `run`, the tables of a run file, on `ranks` ranks of this host; in the sub-folder
        `where`, if another run goes on beside it."""

        def start(words: list[str], folder: Path) -> None:
            call([*words, "--ranks", str(ranks)], folder, threads)

        return self.started(run | {"threads": threads}, start, where)

    def inside(self, run: Table, hosts: Sequence[str], where: str = ".") -> Told:
        """Train `run` on threads of one process, one per host named; for what is no time."""
        program = [sys.executable, str(ROOT / "benchmarks" / "inside.py"), "run.toml", "out"]

        def start(_: list[str], folder: Path) -> None:
            call([*program, *hosts], folder, 1)

        return self.started(run | {"threads": 1}, start, where)

    def started(
        self, run: Table, start: Callable[[list[str], Path], object], where: str = "."
    ) -> Told:
        """Train `run` by `start(words, folder)`, which runs a command in a folder to its end."""
        folder = self._write(run, where)
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        start([*DTRAIN, "train", "run.toml", "--out", "out"], folder)
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        by = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "eval")}
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        return Told(summary, by["train"], by["eval"])

    def plan(self, run: Table, ranks: int) -> dict[str, Any]:
        """Return what `dtrain plan --json` tells of `run`."""
        self._write(run)
        words = [*DTRAIN, "plan", "run.toml", "--json", "--ranks", str(ranks)]
        return dict(json.loads(call(words, self.folder, 1, quiet=True)))

    def _write(self, run: Table, where: str = ".") -> Path:
        folder = self.folder / where
        folder.mkdir(exist_ok=True)
        if folder != self.folder:
            shutil.copy(self.folder / "user.py", folder)
        (folder / "run.toml").write_text(dump_toml(run), encoding="utf-8")
        return folder


DTRAIN = [sys.executable, "-m", "dtrain"]


def cifar() -> tuple[str, str]:
    """Return the paths of CIFAR-10's training and test files, imported on first need."""
    source = Path(os.environ.get("DTRAIN_DATA", ROOT.parent / "shared" / "data"))
    folder = ROOT / "runs" / "cifar10"
    paths = folder / "cifar10.h5", folder / "cifar10-test.h5"
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        tar = str(source / "cifar10-jpeg.tar.gz")
        call([*DTRAIN, "data", "import", tar, str(paths[0])], ROOT, 1)
    return str(paths[0]), str(paths[1])


def peer(script: str, ranks: int, *words: object) -> dict[str, float]:
    """Return the figures that `peers/SCRIPT.py` prints as its last line, on torch's own ranks.

    The C library keeps freed memory for it as for us (see `dtrain.device.keep_freed`): a peer is
    measured at its best setting, and this one gains 2 to 5 %.
    """
    run = Path(sysconfig.get_path("scripts")) / "torchrun"
    start = [str(run), "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    program = ["env", *KEEPING, *(start or [sys.executable])]
    program += [str(PEERS / f"{script}.py"), *map(str, words)]
    return _last(call(program, ROOT, 1, quiet=True))


def ranked(ranks: int, *words: object) -> dict[str, Any]:
    """Return the last line that a program of ours prints, started on MPI ranks of this host."""
    launcher = find_mpirun(os.environ)
    if launcher is None:
        raise FileNotFoundError("no mpirun was found: make install")
    argv = launch_command(launcher, ranks, [sys.executable, *map(str, words)])
    return _last(call(argv, ROOT, 1, quiet=True))


def turns(
    pairs: int, ours: Callable[[int], T], theirs: Callable[[int], T]
) -> tuple[list[T], list[T]]:
    """Call both in turns, with the number of the pair; return what they returned."""
    told = [(ours(number), theirs(number)) for number in range(pairs)]
    return [a for a, _ in told], [b for _, b in told]


def middle(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the medians of figures that were taken several times."""
    return {key: median(row[key] for row in rows) for key in rows[0]}


def spread(values: list[float]) -> float:
    """Return the range of repeated values: the largest less the smallest."""
    return max(values) - min(values)


def complete(left: int) -> None:
    """End this start, and say how many cells are left, where some are."""
    if left:
        print(f"{left} cells are left: start again to go on", file=sys.stderr)
        sys.exit(0)


def _last(text: str) -> dict[str, Any]:
    return dict(json.loads(text.strip().splitlines()[-1]))


def call(
    words: list[str],
    folder: Path,
    threads: int,
    quiet: bool = False,
    more: Mapping[str, str] | None = None,
) -> str:
    """Run a program to its end, with `more` variables; return what it printed, or pass that on to
    stderr."""
    environ = rank_environment(os.environ) | {"OMP_NUM_THREADS": str(threads)} | dict(more or {})
    path = os.pathsep.join(filter(None, [environ.get("PYTHONPATH"), str(ROOT)]))
    out = subprocess.PIPE if quiet else sys.stderr
    told = subprocess.run(
        words, cwd=folder, env=environ | {"PYTHONPATH": path}, stdout=out, text=True, check=True
    )
    return told.stdout or ""
