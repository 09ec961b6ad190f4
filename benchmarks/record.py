"""What every benchmark prints and commits: one flat JSON record.

Invariant: a record names its commit and its machine, and is written by full mode alone.
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
    **more: Any,
) -> None:
    """Print the record as the last line; in full mode write it to ``records/NAME.json`` too.

    Parameters
    ----------
    label : str
        "measured", "emulated" or "simulated".
    figures, peer : mapping of str to number
        Ours and, from the same run, the peer's.
    ratio, spread : float
        What the benchmark's docstring says, and its range over the repetitions (None: one only).
    """
    told = {
        "name": name,
        "label": label,
        "commit": commit(),
        "machine": _machine(),
        "figures": dict(figures),
        "peer": dict(peer),
        "ratio": ratio,
        "spread": spread,
        **more,
    }
    if not quick:
        path = ROOT / "benchmarks" / "records" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(told))


def commit() -> str:
    """Return the commit that ran, marked where the working tree differs from it in more than
    records.

    A copy without git, on a machine of another kind, is told by ``DTRAIN_COMMIT``.
    """
    if "DTRAIN_COMMIT" in os.environ:
        return os.environ["DTRAIN_COMMIT"]

    def git(*words: str) -> str:
        told = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return told.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ".", ":!benchmarks/records")
    return git("rev-parse", "HEAD") + ("-changed" if changed else "")


def _machine() -> str:
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
