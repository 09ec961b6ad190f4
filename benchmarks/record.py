"""Print a benchmark's result as one flat JSON record, and write it to `records/`.

Invariant: a record names its commit and its machine; only full mode writes it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def publish(
    name: str,
    label: str,
    figures: Mapping[str, float],
    peer: Mapping[str, float],
    ratio: float,
    spread: float | None,
    *,
    quick: bool,
    **details: Any,
) -> None:
    """Print the record as the last line; full mode also writes it to ``records/NAME.json``.

    Parameters
    ----------
    label : str
        "measured", "emulated" or "simulated".
    figures, peer : mapping of str to number
        Ours and the peer's, measured in the same run.
    ratio, spread : float
        The ratio that the benchmark's docstring defines, and its range over the repetitions (None
        for a single repetition).
    details : JSON values
        Further keys of the record.
    """
    record = {
        "name": name,
        "label": label,
        "commit": commit(),
        "machine": machine(),
        "figures": dict(figures),
        "peer": dict(peer),
        "ratio": ratio,
        "spread": spread,
        **details,
    }
    if not quick:
        path = _path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


def read(name: str) -> dict[str, Any] | None:
    """Return the committed record of a benchmark; None if there is none."""
    path = _path(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _path(name: str) -> Path:
    return ROOT / "benchmarks" / "records" / f"{name}.json"


def commit() -> str:
    """Return the commit, with "-changed" if the working tree differs from it outside records.

    ``DTRAIN_COMMIT`` names it for a copy without git.
    """
    if "DTRAIN_COMMIT" in os.environ:
        return os.environ["DTRAIN_COMMIT"]

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ".", ":!benchmarks/records")
    return git("rev-parse", "HEAD") + ("-changed" if changed else "")


def machine() -> str:
    """Return processor, cores, system and versions, without the host's name."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python, system = platform.python_version(), f"{platform.system()} {platform.release()}"
    return f"{model}, {cores} cores, {system}, Python {python}, torch {torch.__version__}"
