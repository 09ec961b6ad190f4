"""Functions of the package that a micro-batch and a gradient pass through, over another checkout.

`ratio` = `micro_batch` of this checkout over that of the other; `peer` holds the other's figures.

Set-up: counted with `sys.setprofile` on one rank of each run, medians over updates:

``micro_batch``
    Three stages under MPI, `mono-forward` with `stream`, the inner stage: distinct functions of the
    package between two optimizer steps, which are one micro-batch and its update.
``gradient``
    Two replicas under MPI, `backprop`: distinct functions from the start of torch's backward to the
    optimizer step.
``send_frames``, ``gradient_frames``
    Frames of the package on the stack at the MPI backend's `isend`, counted from `train`; the
    maximum over updates.

A comprehension counts with its enclosing function.

    python benchmarks/call_paths.py [--quick] [--before DIR] [--list]

Label: measured (an exact count). Without ``--before`` the figures are printed and no record is
written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
UPDATES, FIRST = 24, 8
"""Updates of a run, and uncounted updates at its start."""

RUN = """
updates = {updates}
batch-size = {batch}
micro-batches = 1
threads = 1
[data]
name = "counted_data:samples"
[model]
name = "mlp"
widths = [32, 32, 32]
[mesh]
stages = {stages}
[partition]
blocks = {stages}
[objective]
name = "{objective}"
[optimizer]
name = "sgd"
lr = 0.01
[log]
every-s = 1000
"""
DATA = """
import numpy as np
def samples():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1024, 64), dtype=np.float32)
    return x, np.arange(1024) % 10, x[:32], np.arange(32) % 10
"""
CASES = {
    "micro_batch": {"ranks": 3, "stages": 3, "objective": "mono-forward", "batch": 16, "rank": 1},
    "gradient": {"ranks": 2, "stages": 1, "objective": "backprop", "batch": 32, "rank": 0},
}


def main() -> None:
    """Count, print, and in full mode write the record."""
    options = _options()
    if options.worker:
        return count_rank(options.worker, options.package)
    figures = {
        "package": count_package(Path.cwd() if (Path.cwd() / "dtrain").is_dir() else ROOT, options)
    }
    if options.before:
        figures["before"] = count_package(options.before.resolve(), options)
    if not options.before:
        print(json.dumps(figures["package"]))
        return
    from record import publish

    ratio = figures["package"]["micro_batch"] / figures["before"]["micro_batch"]
    publish(
        "call_paths", "measured", figures["package"], figures["before"], ratio, None,
        quick=options.quick,
    )  # fmt: skip


def _options() -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--quick", action="store_true", help="write no record")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout to compare")
    parser.add_argument("--list", action="store_true", help="print the functions to stderr")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--package", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def count_package(tree: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of the package in a checkout."""
    figures: dict[str, float] = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "run.toml").write_text(RUN.format(updates=UPDATES, **case), encoding="utf-8")
            (folder / "counted_data.py").write_text(DATA, encoding="utf-8")
            _train(tree, folder, name, int(str(case["ranks"])))
            windows = json.loads((folder / f"rank-{case['rank']}.json").read_text("utf-8"))
        functions = [len(window["functions"]) for window in windows]
        frames = [window["frames"] for window in windows]
        figures[name] = median(functions)
        figures["send_frames" if name == "micro_batch" else "gradient_frames"] = max(frames)
        if options.list:
            names = sorted(set().union(*(window["functions"] for window in windows)))
            print(f"{tree} {name}", *names, sep="\n    ", file=sys.stderr)
    return figures


def _train(tree: Path, folder: Path, name: str, ranks: int) -> None:
    mpirun = Path(sys.executable).with_name("mpirun")
    environ = os.environ | {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    command = [
        str(mpirun),
        "--oversubscribe",
        "--bind-to",
        "none",
        "-n",
        str(ranks),
        sys.executable,
    ]
    command += [__file__, "--worker", name, "--package", str(tree / "dtrain")]
    subprocess.run(command, cwd=folder, env=environ, check=True, timeout=300, stdout=sys.stderr)


def count_rank(case: str, package: Path) -> None:
    """Train as one rank and count calls."""
    counter = Counter(case, f"{package}{os.sep}")
    sys.setprofile(counter.event)
    from dtrain.cli import main as dtrain

    try:
        dtrain(["train", "run.toml", "--out", "out"])
    finally:
        sys.setprofile(None)
        rank = os.environ["OMPI_COMM_WORLD_RANK"]
        windows = [
            {"functions": sorted(functions), "frames": frames}
            for functions, frames in counter.windows[FIRST:-2]
        ]
        Path(f"rank-{rank}.json").write_text(json.dumps(windows), encoding="utf-8")


BACKWARD_FILES = ("autograd/__init__.py", "dtrain/eager_torch.py")
"""Files with the function that runs torch's backward."""


TRAINING_LOOPS = (("training.py", "train_session"), ("training.py", "train"), ("train.py", "train"))
"""The function that loops over the updates, in this checkout and in older ones."""


class Counter:
    """Called functions of the package, by window (from one boundary in torch to the next)."""

    def __init__(self, case: str, package: str) -> None:
        self.case = case
        self.package = package
        self.windows: list[tuple[set[str], int]] = []
        self.functions: set[str] = set()
        self.frames = 0
        self.counting = case == "micro_batch"

    def event(self, frame: FrameType, event: str, _: Any) -> None:
        """Record a call; calls of torch's backward and optimizer step bound the windows."""
        if event == "call":
            code = frame.f_code
            if code.co_name == "backward" and code.co_filename.endswith(BACKWARD_FILES):
                if self.case == "gradient":
                    self.functions, self.frames, self.counting = set(), 0, True
            elif code.co_filename.startswith(self.package):
                self._record(frame, code)
            elif code.co_name == "step" and "torch/optim/" in code.co_filename:
                self._close_window()

    def _record(self, frame: FrameType, code: CodeType) -> None:
        if not self.counting:
            return
        if not code.co_name.endswith("comp>") and code.co_name != "<genexpr>":
            name = code.co_filename.removeprefix(self.package)
            self.functions.add(f"{name}:{code.co_qualname}")
        if code.co_name == "isend" and code.co_filename.endswith("mpi.py"):
            self.frames = max(self.frames, self._depth(frame))

    def _depth(self, frame: FrameType) -> int:
        """Return the number of frames of the package from `train` on, without comprehensions."""
        names = [
            (f.f_code.co_filename.removeprefix(self.package), f.f_code.co_name)
            for f in caller_frames(frame)
            if f.f_code.co_filename.startswith(self.package)
        ]
        outer = [names.index(loop) for loop in TRAINING_LOOPS if loop in names]
        if not outer:
            return 0
        inner = names[: outer[0] + 1]
        return sum(not name.endswith("comp>") and name != "<genexpr>" for _, name in inner)

    def _close_window(self) -> None:
        if self.counting:
            self.windows.append((self.functions, self.frames))
        self.functions, self.frames = set(), 0
        self.counting = self.case == "micro_batch"


def caller_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back


if __name__ == "__main__":
    main()
