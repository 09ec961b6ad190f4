"""Costs files: how fast ranks and links are, in TOML.

::

    multiply-adds-per-s = 5e9                    of a rank: all layers that have no table
    ranks-per-node = 4                           default: all ranks on one node
    update-s = 0.01                              the whole model's step; default: derived
    [layers.fc1]                                 of one sample; `heads`: every local head
    forward-s = 2e-6
    backward-s = 4e-6
    [links.intra-node]                           [links.inter-node] likewise
    latency-s = 1e-6
    bytes-per-s = 1e10

Invariant: what is read is finite and not negative; what depends on the run is refused by `outlook`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from dtrain.errors import Refusal, unknown
from dtrain.tables import fill, load

T = TypeVar("T")

HEADS = "heads"
"""Stands for every local head where layers are named."""

NEAR, FAR = "intra-node", "inter-node"


@final
@dataclass(frozen=True)
class Pace:
    """The keys outside any table: how fast a rank is."""

    multiply_adds_per_s: float | None = None
    update_s: float | None = None
    ranks_per_node: int | None = None


@final
@dataclass(frozen=True)
class Times:
    """``[layers.<name>]``: seconds of one sample; backward is both gradients."""

    forward_s: float
    backward_s: float


@final
@dataclass(frozen=True)
class Cable:
    """``[links.intra-node]`` and ``[links.inter-node]``: between two ranks."""

    bytes_per_s: float
    latency_s: float = 0.0


@final
@dataclass(frozen=True)
class Sheet:
    """One checked costs file."""

    path: Path
    pace: Pace
    layers: Mapping[str, Times]
    links: Mapping[str, Cable]


def read(path: Path) -> Sheet:
    """Read a costs file; unknown keys and impossible numbers are refused."""
    table = load(path, "costs file")
    try:
        return _parse(table, path)
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal.message}", refusal.code) from refusal


def _parse(table: Mapping[str, Any], path: Path) -> Sheet:
    parts = ("layers", "links")
    pace = fill(Pace, {k: v for k, v in table.items() if k not in parts}, "", known=parts)
    layers, links = _tables(table, "layers", Times), _tables(table, "links", Cable)
    for name in links:
        if name not in (NEAR, FAR):
            raise unknown("table [links.*]", name, (NEAR, FAR))
    _positive("multiply-adds-per-s", pace.multiply_adds_per_s)
    _positive("ranks-per-node", pace.ranks_per_node)
    _positive("update-s", pace.update_s, zero=True)
    for name, times in layers.items():
        _positive(f"[layers.{name}] forward-s", times.forward_s, zero=True)
        _positive(f"[layers.{name}] backward-s", times.backward_s, zero=True)
    for name, cable in links.items():
        _positive(f"[links.{name}] bytes-per-s", cable.bytes_per_s)
        _positive(f"[links.{name}] latency-s", cable.latency_s, zero=True)
    return Sheet(path, pace, layers, links)


def _tables(table: Mapping[str, Any], name: str, kind: type[T]) -> dict[str, T]:
    found = table.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise Refusal(f"{name} holds tables: write [{name}.<name>] and its keys under it")
    return {key: fill(kind, each, f"[{name}.{key}] ") for key, each in found.items()}


def _positive(key: str, value: float | None, zero: bool = False) -> None:
    if value is None or 0 < value < math.inf or (zero and value == 0):
        return
    least = "0 or more" if zero else "more than 0"
    raise Refusal(f"{key} = {value}: give a finite number, {least}")
