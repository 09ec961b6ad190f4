"""Start training runs and peer programs one at a time, and cache their results.

Invariant: no other program of the benchmark runs beside a timed one. A finished part is cached on
disk under the clean commit that measured it, so an interrupted benchmark resumes after its last
finished part.

::

    alternate(5, ours, theirs)      ours theirs | ours theirs | ...      five pairs
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
DTRAIN = [sys.executable, "-m", "dtrain"]
PEERS = ROOT / "benchmarks" / "peers"
MALLOC_ENVIRONMENT = (f"MALLOC_MMAP_THRESHOLD_={2**25}", f"MALLOC_TRIM_THRESHOLD_={2**30}")
"""Lets the C library reuse freed memory (see `dtrain.block.device.keep_freed_memory`)."""


def parse_quick(description: str | None) -> bool:
    """Parse the command line; return whether it has `--quick`."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=plain)
    parser.add_argument("--quick", action="store_true", help="at most 10 minutes, writes no record")
    return bool(parser.parse_args().quick)


@final
@dataclass(frozen=True)
class RunResult:
    """Summary and metrics of one training run.

    Attributes
    ----------
    summary : dict
        `summary.json`.
    train_records, eval_records : list of dict
        The records of `metrics.jsonl` at segment ends and at evaluations, in order.
    """

    summary: dict[str, Any]
    train_records: list[dict[str, Any]]
    eval_records: list[dict[str, Any]] = field(default_factory=list)

    def segment_seconds(self) -> list[float]:
        """Return the seconds of each segment, pipeline fill and drain included."""
        samples = [0, *(record["samples"] for record in self.train_records)]
        rates = [record["samples_per_s"] for record in self.train_records]
        return [(b - a) / rate for a, b, rate in zip(samples, samples[1:], rates, strict=False)]

    def samples_per_s(self) -> float:
        """Return the median over all segments but the first, which warms up."""
        return median(float(record["samples_per_s"]) for record in self.train_records[1:])


@final
class Bench:
    """The folder of one benchmark: run files, run folders and cached parts.

    Parameters
    ----------
    name : str
        The name of the script.
    quick : bool
        Quick mode has a folder of its own.
    """

    def __init__(self, name: str, quick: bool) -> None:
        version = commit()
        self.folder = ROOT / "runs" / name / ("quick" if quick else "full") / version[:12]
        if version.endswith("-changed"):  # the code that measured cached parts is unknown
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "benchmarks" / "user.py", self.folder)

    def has(self, part: str) -> bool:
        """Return whether an earlier start cached a part."""
        return (self.folder / f"{part}.json").exists()

    def cached(self, part: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return a cached part; if there is none, measure it and cache it as JSON."""
        path = self.folder / f"{part}.json"
        if not path.exists():
            text = json.dumps(measure())
            path.with_suffix(".part").write_text(text, encoding="utf-8")
            path.with_suffix(".part").rename(path)
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def train(self, run: Table, ranks: int, threads: int = 1, subfolder: str = ".") -> RunResult:
        """Train a run file on `ranks` ranks of this host; concurrent runs need a `subfolder`."""

        def start(command: list[str], folder: Path) -> None:
            run_program([*command, "--ranks", str(ranks)], folder, threads)

        return self.train_with(start, run | {"threads": threads}, subfolder)

    def train_in_threads(self, run: Table, hosts: Sequence[str], subfolder: str = ".") -> RunResult:
        """Train a run file on threads of one process, one per host name; not for timings."""
        script = ROOT / "benchmarks" / "train_in_threads.py"
        program = [sys.executable, str(script), "run.toml", "out"]

        def start(_: list[str], folder: Path) -> None:
            run_program([*program, *hosts], folder, 1)

        return self.train_with(start, run | {"threads": 1}, subfolder)

    def train_with(
        self, start: Callable[[list[str], Path], object], run: Table, subfolder: str = "."
    ) -> RunResult:
        """Train a run file by `start(command, folder)`, which runs a command to its end."""
        folder = self.write_run(run, subfolder)
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        start([*DTRAIN, "train", "run.toml", "--out", "out"], folder)
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        train, evaluation = ([r for r in records if r["kind"] == k] for k in ("train", "eval"))
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        return RunResult(summary, train, evaluation)

    def plan(self, run: Table, ranks: int) -> dict[str, Any]:
        """Return the output of `dtrain plan --json`."""
        self.write_run(run)
        command = [*DTRAIN, "plan", "run.toml", "--json", "--ranks", str(ranks)]
        return dict(json.loads(run_program(command, self.folder, 1, capture=True)))

    def write_run(self, run: Table, subfolder: str = ".") -> Path:
        """Write `run.toml`, with the user code beside it; return its folder."""
        folder = self.folder / subfolder
        folder.mkdir(exist_ok=True)
        if folder != self.folder:
            shutil.copy(self.folder / "user.py", folder)
        (folder / "run.toml").write_text(dump_toml(run), encoding="utf-8")
        return folder


def cifar_paths() -> tuple[str, str]:
    """Return the paths of CIFAR-10's training and test files; the first call imports them."""
    source = Path(os.environ.get("DTRAIN_DATA", ROOT.parent / "shared" / "data"))
    folder = ROOT / "runs" / "cifar10"
    paths = folder / "cifar10.h5", folder / "cifar10-test.h5"
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        archive = str(source / "cifar10-jpeg.tar.gz")
        run_program([*DTRAIN, "data", "import", archive, str(paths[0])], ROOT, 1)
    return str(paths[0]), str(paths[1])


def run_peer(script: str, ranks: int, *arguments: object) -> dict[str, float]:
    """Run `peers/SCRIPT.py` on torchrun's ranks; return the figures of its last line.

    `MALLOC_ENVIRONMENT` makes the peer 2 to 5 % faster: a peer is measured at its best setting.
    """
    torchrun = Path(sysconfig.get_path("scripts")) / "torchrun"
    several = [str(torchrun), "--standalone", "--nproc-per-node", str(ranks)]
    command = ["env", *MALLOC_ENVIRONMENT, *(several if ranks > 1 else [sys.executable])]
    command += [str(PEERS / f"{script}.py"), *map(str, arguments)]
    return last_record(run_program(command, ROOT, 1, capture=True))


def run_on_ranks(ranks: int, *arguments: object) -> dict[str, Any]:
    """Run a Python script on MPI ranks of this host; return the record of its last line."""
    launcher = find_mpirun(os.environ)
    if launcher is None:
        raise FileNotFoundError("no mpirun was found: make install")
    command = launch_command(launcher, ranks, [sys.executable, *map(str, arguments)])
    return last_record(run_program(command, ROOT, 1, capture=True))


def alternate(
    pairs: int, ours: Callable[[int], T], theirs: Callable[[int], T]
) -> tuple[list[T], list[T]]:
    """Call both alternately with the number of the pair; return the results of each."""
    results = [(ours(number), theirs(number)) for number in range(pairs)]
    return [a for a, _ in results], [b for _, b in results]


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure over repetitions."""
    return {key: median(row[key] for row in rows) for key in rows[0]}


def spread(values: list[float]) -> float:
    """Return the largest value minus the smallest."""
    return max(values) - min(values)


def exit_if_incomplete(missing: int) -> None:
    """End this start if cells are missing, and print their number."""
    if missing:
        print(f"{missing} cells are not measured: start this script again", file=sys.stderr)
        sys.exit(0)


def last_record(text: str) -> dict[str, Any]:
    """Return the JSON record on the last line of a program's output."""
    return dict(json.loads(text.strip().splitlines()[-1]))


def run_program(
    command: list[str],
    folder: Path,
    threads: int,
    capture: bool = False,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run a program to its end; return its stdout if `capture`, else pass it on to stderr."""
    environ = rank_environment(os.environ) | {"OMP_NUM_THREADS": str(threads)}
    environ |= dict(variables or {})
    path = os.pathsep.join(filter(None, [environ.get("PYTHONPATH"), str(ROOT)]))
    environ |= {"PYTHONPATH": path}
    out = subprocess.PIPE if capture else sys.stderr
    result = subprocess.run(command, cwd=folder, env=environ, stdout=out, text=True, check=True)
    return result.stdout or ""
