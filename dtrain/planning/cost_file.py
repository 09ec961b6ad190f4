"""Costs files: the speed of ranks and links, in TOML.

::

    multiply-adds-per-s = 5e9                    of a rank, for all layers without a table
    ranks-per-node = 4                           default: all ranks on one node
    update-s = 0.01                              optimizer step of the whole model; default: derived
    [layers.fc1]                                 of one sample; `heads`: every local head
    forward-s = 2e-6
    backward-s = 4e-6
    [links.intra-node]                           [links.inter-node] likewise
    latency-s = 1e-6
    bytes-per-s = 1e10

Invariant: numbers that were read are finite and not negative. `time_estimate` checks a file against
a run.
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
"""The layer name that stands for every local head."""


INTRA_NODE, INTER_NODE = "intra-node", "inter-node"


@final
@dataclass(frozen=True)
class RankSpeed:
    """The keys outside any table: speed of a rank."""

    multiply_adds_per_s: float | None = None
    update_s: float | None = None
    ranks_per_node: int | None = None


@final
@dataclass(frozen=True)
class LayerTimes:
    """``[layers.<name>]``: seconds of one sample; the backward computes both gradients."""

    forward_s: float
    backward_s: float


@final
@dataclass(frozen=True)
class LinkSpeed:
    """``[links.intra-node]`` and ``[links.inter-node]``: speed between two ranks."""

    bytes_per_s: float
    latency_s: float = 0.0


@final
@dataclass(frozen=True)
class CostFile:
    """One validated costs file."""

    path: Path
    rank_speed: RankSpeed
    layers: Mapping[str, LayerTimes]
    links: Mapping[str, LinkSpeed]


def read_cost_file(path: Path) -> CostFile:
    """Read and validate a costs file.

    Raises
    ------
    ConfigError
        No TOML, an unknown key or link, or a number that is negative or not finite.
    """
    table = load_toml(path, "costs file")
    try:
        return _parse(table, path)
    except DtrainError as error:
        raise error.with_prefix(str(path)) from error


def _parse(table: Mapping[str, Any], path: Path) -> CostFile:
    tables = ("layers", "links")
    rank_keys = {key: value for key, value in table.items() if key not in tables}
    speed = from_table(RankSpeed, rank_keys, "", other_keys=tables)
    layers, links = _tables(table, "layers", LayerTimes), _tables(table, "links", LinkSpeed)
    for name in links:
        if name not in (INTRA_NODE, INTER_NODE):
            error = unknown_name("table [links.*]", name, (INTRA_NODE, INTER_NODE))
            raise ConfigError("costs-file.unknown-link", error.message)
    _check_positive("multiply-adds-per-s", speed.multiply_adds_per_s)
    _check_positive("ranks-per-node", speed.ranks_per_node)
    _check_positive("update-s", speed.update_s, allow_zero=True)
    for name, times in layers.items():
        _check_positive(f"[layers.{name}] forward-s", times.forward_s, allow_zero=True)
        _check_positive(f"[layers.{name}] backward-s", times.backward_s, allow_zero=True)
    for name, link in links.items():
        _check_positive(f"[links.{name}] bytes-per-s", link.bytes_per_s)
        _check_positive(f"[links.{name}] latency-s", link.latency_s, allow_zero=True)
    return CostFile(path, speed, layers, links)


def _tables(table: Mapping[str, Any], name: str, kind: type[T]) -> dict[str, T]:
    tables = table.get(name, {})
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise ConfigError(
            "costs-file.not-a-table",
            f"{name} must have tables: write [{name}.<name>] and its keys under it",
        )
    return {key: from_table(kind, keys, f"[{name}.{key}] ") for key, keys in tables.items()}


def _check_positive(key: str, value: float | None, allow_zero: bool = False) -> None:
    if value is None or 0 < value < math.inf or (allow_zero and value == 0):
        return
    least = "0 or more" if allow_zero else "more than 0"
    raise ConfigError("costs-file.not-positive", f"{key} = {value} must be finite and {least}")
