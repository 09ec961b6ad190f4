"""Microseconds of an update on a tiny net that dtrain adds, over another checkout or a plain loop.

With ``--before DIR``: `ratio` = our overhead over that of the package in another checkout. Without:
`ratio` = our update over that of a plain PyTorch loop. `spread` = its range over the rounds.

Set-up: net 64-32-32-10 on one rank, random inputs in memory, `backprop`, one block, SGD, 32 samples
per update, one thread. `update_us` is an update of dtrain. The peer `plain_update_us` is an update
of a plain PyTorch loop over the same net, rows and optimizer, which records no loss. `overhead_us`
is their difference. All sides alternate.

    python benchmarks/engine_overhead.py [--quick] [--before DIR]

Label: measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
BATCH, STEPS, SEGMENTS = 32, 1000, 6
"""Samples per update, updates per segment, and segments; the first segment warms up."""

RUN = f"""
updates = {STEPS * SEGMENTS}
segment = {STEPS}
batch-size = {BATCH}
threads = 1
[data]
name = "user:noise"
rows = {BATCH * STEPS}
width = 64
[model]
name = "mlp"
widths = [32, 32]
[partition]
blocks = 1
[objective]
name = "backprop"
[optimizer]
name = "sgd"
lr = 0.01
[evaluate]
every = 1000
[log]
every-s = 1000
"""


def main() -> None:
    """Measure alternately and publish the record."""
    options = _options()
    if options.plain:
        return train_plain()
    rounds = 3 if options.quick else 7
    rows = [_measure_round(options) for _ in range(rounds)]
    ours = {key: median(row[key] for row in rows) for key in ("update_us", "overhead_us")}
    peer = {key: median(row[key] for row in rows) for key in rows[0] if key not in ours}
    numerator, denominator = ("overhead_us", "before_overhead_us") if options.before else (
        "update_us", "plain_update_us",
    )  # fmt: skip
    ratios = [row[numerator] / row[denominator] for row in rows]
    from record import publish

    publish(
        "engine_overhead", "measured", ours, peer, median(ratios), max(ratios) - min(ratios),
        quick=options.quick,
    )  # fmt: skip


def _options() -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--quick", action="store_true", help="three rounds, no record")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout to compare")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure_round(options: argparse.Namespace) -> dict[str, float]:
    """Return one measurement of each side."""
    plain = json.loads(_run_python([__file__, "--plain"], ROOT, ROOT))["update_us"]
    row = {"update_us": _measure_package(ROOT), "plain_update_us": float(plain)}
    row["overhead_us"] = row["update_us"] - row["plain_update_us"]
    if options.before:
        row["before_update_us"] = _measure_package(options.before.resolve())
        row["before_overhead_us"] = row["before_update_us"] - row["plain_update_us"]
    return row


def _measure_package(tree: Path) -> float:
    """Return microseconds per update of the package in a checkout."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "run.toml").write_text(RUN, encoding="utf-8")
        (folder / "user.py").write_bytes((ROOT / "benchmarks" / "user.py").read_bytes())
        _run_python(["-m", "dtrain", "train", "run.toml", "--out", "out"], folder, tree)
        lines = (folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [r["samples_per_s"] for r in map(json.loads, lines) if r["kind"] == "train"]
    return float(1e6 * BATCH / median(rates[1:]))


def _run_python(arguments: list[str], folder: Path, tree: Path) -> str:
    """Run Python with the package of a checkout; return the last line of its output."""
    environ = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    result = subprocess.run(
        command, cwd=folder, env=environ, check=True, capture_output=True, text=True
    )
    return result.stdout.strip().splitlines()[-1]


def train_plain() -> None:
    """Train the same net in a plain loop and print microseconds per update."""
    import time

    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy
    from user import noise

    torch.set_num_threads(1)
    x, y, *_ = noise(BATCH * STEPS, 64)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.01, fused=True)
    seconds = []
    for _ in range(SEGMENTS):
        order = torch.randperm(len(inputs))
        start = time.perf_counter()
        for update in range(STEPS):
            rows = order[update * BATCH : (update + 1) * BATCH]
            optimizer.zero_grad()
            loss = cross_entropy(net(inputs[rows]), targets[rows])
            torch.autograd.backward(loss)
            optimizer.step()
        seconds.append((time.perf_counter() - start) / STEPS)
    print(json.dumps({"update_us": 1e6 * median(seconds[1:])}))


if __name__ == "__main__":
    main()
