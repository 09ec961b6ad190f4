"""The cheapest benchmark runs as a program on real ranks and prints its record.

Invariant: no test judges a time; other load on the machine must not decide a test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KEYS = {"name", "label", "commit", "machine", "figures", "peer", "ratio", "spread"}


def test_quick_prints_one_record_as_its_last_line(clean: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / "mean.py"), "--quick"],
        env=clean,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record.keys() >= KEYS
    assert (record["name"], record["label"]) == ("mean", "measured")
    assert record["figures"].keys() == record["peer"].keys()
    assert min(*record["figures"].values(), *record["peer"].values(), record["ratio"]) > 0
    assert record["spread"] >= 0
