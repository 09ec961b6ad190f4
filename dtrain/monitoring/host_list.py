"""The hosts of the ranks in short: "node[1-4] x 4 ranks"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise


def hosts_text(hosts: Sequence[str]) -> str:
    """Return the hosts of all ranks, grouped by their number of ranks."""
    hosts_by_count: dict[int, list[str]] = {}
    for host in dict.fromkeys(hosts):
        hosts_by_count.setdefault(hosts.count(host), []).append(host)
    return ", ".join(
        f"{compress_hosts(names)} x {count} {'rank' if count == 1 else 'ranks'}"
        for count, names in hosts_by_count.items()
    )


def compress_hosts(names: Iterable[str]) -> str:
    """Return different host names as Slurm writes them: "gpu[01-03,07],login"."""
    numbers: dict[tuple[str, str, int], list[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", name)
        if match is None:
            numbers.setdefault((name, "", 0), [])
            continue
        prefix, digits, suffix = match.groups()
        width = len(digits) if digits.startswith("0") or len(digits) > 1 else 1
        width = width if digits.startswith("0") else 0
        numbers.setdefault((prefix, suffix, width), []).append(int(digits))
    return ",".join(_group_text(*key, values) for key, values in numbers.items())


def _group_text(prefix: str, suffix: str, width: int, numbers: Sequence[int]) -> str:
    """Return hosts that differ in a number of `width` digits only (0: without leading zeros)."""
    ordered = sorted(numbers)
    starts = [i for i, (a, b) in enumerate(pairwise(ordered), 1) if b != a + 1]
    runs = [ordered[i:j] for i, j in pairwise([0, *starts, len(ordered)])] if ordered else []
    texts = [
        f"{run[0]:0{width}}" if len(run) == 1 else f"{run[0]:0{width}}-{run[-1]:0{width}}"
        for run in runs
    ]
    if len(ordered) < 2:
        return f"{prefix}{''.join(texts)}{suffix}"
    return f"{prefix}[{','.join(texts)}]{suffix}"
