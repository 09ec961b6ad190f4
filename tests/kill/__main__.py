"""Disturb all cases until enough kills have hit: ``python -m tests.kill [--kills N]``.

Parts are kept in ``runs/kill/`` and are not run again. Writes ``benchmarks/records/kill.json``.
Exit code 1: a promise was broken; the part that broke it is kept with its output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from tests.kill.cases import CASES, INTERVAL
from tests.kill.harness import ROOT, Part, undisturbed

sys.path.insert(0, str(ROOT / "benchmarks"))
from record import commit, publish

FOLDER = ROOT / "runs" / "kill"

KILLS_PER_PART = 10

SUMS = ("starts", "layout_changes", "refused", "hangs", "orphans", "failures", "ends",
        "identical_ends")  # fmt: skip


def main() -> int:
    """Run the parts that are missing, then write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300, metavar="N", help="default: 300")
    options = parser.parse_args()
    parts: list[dict[str, Any]] = []
    for number, index in (divmod(part, len(CASES)) for part in itertools.count()):
        if sum(len(part["kills"]) for part in parts) >= options.kills:
            break
        parts.append(_part(index, number))
        row = {name: parts[-1][name] for name in (*SUMS, "max_lost", "gone_s")}
        print(CASES[index].name, number, len(parts[-1]["kills"]), row, flush=True)
    publish_record(parts)
    return int(any(part["notes"] for part in parts))


def _part(index: int, number: int) -> dict[str, Any]:
    """Return the counts of a part, from its file or from running it."""
    name = f"case-{index}-part-{number}"
    path, folder = FOLDER / f"{name}.json", FOLDER / name
    if path.exists():
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    shutil.rmtree(folder, ignore_errors=True)
    reference = undisturbed(CASES[index], FOLDER / f"case-{index}")
    counts = Part(CASES[index], number, folder, reference, limit_s=600.0).run(KILLS_PER_PART)
    table = counts.table() | {"case": CASES[index].name, "commit": commit()}
    path.write_text(json.dumps(table))
    if not counts.notes:
        shutil.rmtree(folder)
    return table


def publish_record(parts: Sequence[dict[str, Any]]) -> None:
    """Write the record of all parts."""
    kills = [kill for part in parts for kill in part["kills"]]
    phases, targets = (Counter(kill.split(": ")[i] for kill in kills) for i in range(2))
    figures = {
        "kills": len(kills),
        **{f"kills_{phase}": count for phase, count in sorted(phases.items())},
        **{f"kills_of_{target}": count for target, count in sorted(targets.items())},
        **{name: sum(part[name] for part in parts) for name in SUMS},
        "max_lost_updates": _max_lost(parts, asynchronous=False),
        "max_lost_updates_asynchronous": _max_lost(parts, asynchronous=True),
        "checkpoint_interval": INTERVAL,
        "max_seconds_to_the_last_end": max(part["gone_s"] for part in parts),
        "restart_over_fresh_start": _restart_ratio(parts),
    }
    publish(
        "kill", "measured", figures, {}, figures["identical_ends"] / max(figures["ends"], 1), None,
        quick=False,
        commits=dict(Counter(part["commit"] for part in parts for _ in part["kills"])),
        cases=dict(Counter(part["case"] for part in parts for _ in part["kills"])),
    )  # fmt: skip


def _max_lost(parts: Sequence[dict[str, Any]], asynchronous: bool) -> int:
    """Return the largest number of updates that a kill has cost."""
    names = [case.name for case in CASES if case.asynchronous == asynchronous]
    return max((part["max_lost"] for part in parts if part["case"] in names), default=0)


def _restart_ratio(parts: Sequence[dict[str, Any]]) -> float:
    """Return the median over numbers of ranks: restart over fresh start, to the first update."""
    seconds: dict[str, dict[int, list[float]]] = {"fresh_s": {}, "restart_s": {}}
    for part, name in itertools.product(parts, seconds):
        for ranks, value in part[name]:
            seconds[name].setdefault(ranks, []).append(value)
    fresh, restart = seconds["fresh_s"], seconds["restart_s"]
    ratios = [median(restart[ranks]) / median(fresh[ranks]) for ranks in fresh if ranks in restart]
    return median(ratios) if ratios else 0.0


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    sys.exit(main())
