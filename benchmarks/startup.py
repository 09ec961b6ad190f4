"""Seconds from `dtrain train --ranks 4` to the first update of the demo, over another checkout.

`ratio` = our `first_update_s` over the peer's, the median of the pairs; 1 means no change. `spread`
= its range. The peer is the package of ``--against DIR``, run by the same Python.

Set-up: `jobs/demo.toml` with two updates, each a segment of its own. `first_update_s` lasts from
the start of the command to the record of the first segment. `leave_s` lasts from the last line of
the output to the end of the command. `cpu_s` are the CPU seconds of the command and of all its
ranks; other load on the machine hardly changes them. `import_s` and `help_s` are those of
``python -c "import dtrain"`` and ``dtrain --help``. The two sides alternate, and so does their
order; the first pair writes bytecode and does not count.

    python benchmarks/startup.py --against DIR [--quick] [--ranks N]

Label: measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from statistics import median

from bench import medians, spread
from record import ROOT, publish

from dtrain.comm.launcher import rank_environment
from dtrain.schema import dump_toml


def main() -> None:
    """Measure pairs and publish the record."""
    options = _options()
    peer = options.against.resolve()
    ours, theirs = list[dict[str, float]](), list[dict[str, float]]()
    for number in range(1 + (5 if options.quick else 9)):
        trees = (ROOT, peer) if number % 2 else (peer, ROOT)
        rows = {tree: _measure(tree, options.ranks) for tree in trees}
        if number:
            ours.append(rows[ROOT])
            theirs.append(rows[peer])
    ratios = [a["first_update_s"] / b["first_update_s"] for a, b in zip(ours, theirs, strict=True)]
    publish(
        "startup", "measured", medians(ours), medians(theirs), median(ratios), spread(ratios),
        quick=options.quick, ranks=options.ranks, pairs=len(ratios),
    )  # fmt: skip


def _options() -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument(
        "--against", type=Path, metavar="DIR", required=True, help="another checkout to compare"
    )
    parser.add_argument("--quick", action="store_true", help="five pairs, no record")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="ranks (default: 4)")
    return parser.parse_args()


def _measure(tree: Path, ranks: int) -> dict[str, float]:
    """Return the figures of the package in a checkout."""
    return {
        **_measure_run(tree, ranks),
        "import_s": _seconds(["-c", "import dtrain"], tree),
        "help_s": _seconds(["-m", "dtrain", "--help"], tree),
    }


def _measure_run(tree: Path, ranks: int) -> dict[str, float]:
    """Return the figures of a run of two updates."""
    table = tomllib.loads((ROOT / "jobs" / "demo.toml").read_text(encoding="utf-8"))
    del table["epochs"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = dump_toml({"updates": 2, "segment": 1, **table})
        (folder / "run.toml").write_text(run, encoding="utf-8")
        command = ["-m", "dtrain", "train", "run.toml", "--out", "out", "--ranks", str(ranks)]
        cpu_before, start = _children_cpu_s(), time.time()
        with _start(command, tree, folder) as process:
            assert process.stdout is not None
            last_line = start
            for _ in process.stdout:
                last_line = time.time()
        end = time.time()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        lines = (folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first = next(r for r in map(json.loads, lines) if r["kind"] == "train")
    return {
        "first_update_s": first["unix_s"] - start,
        "leave_s": end - last_line,
        "cpu_s": _children_cpu_s() - cpu_before,
    }


def _seconds(arguments: list[str], tree: Path) -> float:
    """Return how long Python runs with the package of a checkout."""
    start = time.perf_counter()
    with _start(arguments, tree, ROOT) as process:
        process.communicate()
    return time.perf_counter() - start


def _start(arguments: list[str], tree: Path, folder: Path) -> subprocess.Popen[str]:
    """Start Python with the package of a checkout; it may write bytecode, as for a user."""
    environ = rank_environment(os.environ) | {"PYTHONPATH": str(tree)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.Popen(
        [sys.executable, "-P", *arguments],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
    )


def _children_cpu_s() -> float:
    """Return the CPU seconds of all programs that have ended, their own children included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
