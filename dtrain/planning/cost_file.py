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

from dtrain.errors import ConfigError, DtrainError, unknown_name
from dtrain.schema import from_table, load_toml

T = TypeVar("T")


HEADS = "heads"
"""Stands for every local head where layers are named."""


INTRA_NODE, INTER_NODE = "intra-node", "inter-node"


@final
@dataclass(frozen=True)
class RankSpeed:
    """The keys outside any table: how fast a rank is."""

    multiply_adds_per_s: float | None = None
    update_s: float | None = None
    ranks_per_node: int | None = None


@final
@dataclass(frozen=True)
class LayerTimes:
    """``[layers.<name>]``: seconds of one sample; backward is both gradients."""

    forward_s: float
    backward_s: float


@final
@dataclass(frozen=True)
class LinkSpeed:
    """``[links.intra-node]`` and ``[links.inter-node]``: between two ranks."""

    bytes_per_s: float
    latency_s: float = 0.0


@final
@dataclass(frozen=True)
class CostFile:
    """One checked costs file."""

    path: Path
    rank_speed: RankSpeed
    layers: Mapping[str, LayerTimes]
    links: Mapping[str, LinkSpeed]


def read_cost_file(path: Path) -> CostFile:
    """Read a costs file; unknown keys and impossible numbers are refused."""
    table = load_toml(path, "costs file")
    try:
        return _parse(table, path)
    except DtrainError as refusal:
        raise refusal.with_prefix(str(path)) from refusal


def _parse(table: Mapping[str, Any], path: Path) -> CostFile:
    parts = ("layers", "links")
    pace = from_table(
        RankSpeed, {k: v for k, v in table.items() if k not in parts}, "", other_keys=parts
    )
    layers, links = _tables(table, "layers", LayerTimes), _tables(table, "links", LinkSpeed)
    for name in links:
        if name not in (INTRA_NODE, INTER_NODE):
            error = unknown_name("table [links.*]", name, (INTRA_NODE, INTER_NODE))
            raise ConfigError("costs-file.unknown-link", error.message)
    _check_positive("multiply-adds-per-s", pace.multiply_adds_per_s)
    _check_positive("ranks-per-node", pace.ranks_per_node)
    _check_positive("update-s", pace.update_s, allow_zero=True)
    for name, times in layers.items():
        _check_positive(f"[layers.{name}] forward-s", times.forward_s, allow_zero=True)
        _check_positive(f"[layers.{name}] backward-s", times.backward_s, allow_zero=True)
    for name, cable in links.items():
        _check_positive(f"[links.{name}] bytes-per-s", cable.bytes_per_s)
        _check_positive(f"[links.{name}] latency-s", cable.latency_s, allow_zero=True)
    return CostFile(path, pace, layers, links)


def _tables(table: Mapping[str, Any], name: str, kind: type[T]) -> dict[str, T]:
    found = table.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise ConfigError(
            "todo.key", f"{name} holds tables: write [{name}.<name>] and its keys under it"
        )
    return {key: from_table(kind, each, f"[{name}.{key}] ") for key, each in found.items()}


def _check_positive(key: str, value: float | None, allow_zero: bool = False) -> None:
    if value is None or 0 < value < math.inf or (allow_zero and value == 0):
        return
    least = "0 or more" if allow_zero else "more than 0"
    raise ConfigError("todo.key", f"{key} = {value}: give a finite number, {least}")
