"""The syncs that `slow_link` and `slow_link_accuracy` measure, and their run files.

Invariant: pure; an epoch of a timed run is one phase of a strategy. Its segments are whole rounds
of the strategy and end without messages in flight.

::

    daso        | warm-up, blocking | cycling, S = 8, B = 2 | cool-down, blocking |
    qsr         | short: H = 4      | long: H = 24          |
    ab, oialr   | full rank         | low rank, first rank  |
    others      | steady            |                           one epoch per phase
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import final

from dtrain.schema import Table

NODES, RANKS_PER_NODE, ROWS = 2, 2, 32
"""Hosts, ranks per host, samples of a rank per update."""
HOST_OF_RANK = ("a", "a", "b", "b")
BATCH = NODES * RANKS_PER_NODE * ROWS
SHORT, LONG = 4, 24
"""Updates of a `qsr` round at the peak learning rate, and at that of the second timing epoch."""
SEGMENTS = 4
"""Segments per epoch of the timing part; the last one contains the epoch's end and is not timed."""
DASO_PHASES = ("warm-up", "cycling", "cool-down")
QSR_PHASES = ("short", "long")
RANK_PHASES = ("full", "low")


@final
@dataclass(frozen=True)
class Strategy:
    """A sync, and how to measure it.

    Attributes
    ----------
    sync : table
        The `[sync]` section of the accuracy part.
    phases : tuple of str
        One epoch of the timing part per phase.
    segment_updates : int
        Updates per segment of the timing part: whole rounds; at least 24 updates in three
        segments.
    timing_keys : table
        Keys of `[sync]` that differ in the timing part.
    mean_size : float
        Bytes of one mean between nodes, relative to `every-step`.
    lr : float, optional
        Replaces the learning rate that all other strategies share.
    """

    sync: Table
    phases: tuple[str, ...] = ("steady",)
    segment_updates: int = 8
    timing_keys: Table = field(default_factory=dict)
    mean_size: float = 1.0
    lr: float | None = None


def _int8(inner: Table) -> Table:
    return {"name": "int8", "inner": inner}


DASO: Table = {"name": "daso", "warmup-epochs": 1, "cooldown-epochs": 1}
EPOCH = SEGMENTS * 8
STRATEGIES = {
    "every-step": Strategy({"name": "every-step"}),
    "daso": Strategy(DASO, DASO_PHASES),
    "local-sgd": Strategy({"name": "local-sgd"}),
    "qsr": Strategy({"name": "qsr"}, QSR_PHASES, LONG),
    "diloco": Strategy({"name": "diloco"}, segment_updates=50),
    "int8": Strategy({"name": "int8"}),
    "terngrad": Strategy({"name": "terngrad"}),
    "powersgd": Strategy({"name": "powersgd"}),
    "demo": Strategy({"name": "demo"}, lr=3e-4),
    "ab": Strategy(
        {"name": "ab"},
        RANK_PHASES,
        timing_keys={"warmup-updates": EPOCH, "every": EPOCH, "full-updates": 1},
    ),
    "oialr": Strategy(
        {"name": "oialr"},
        RANK_PHASES,
        # The last low-rank segment contains a round of all matrices.
        timing_keys={"delay-updates": EPOCH, "every": EPOCH - 1, "share": 1.0},
    ),
    "int8 of daso": Strategy(_int8(DASO), DASO_PHASES),
    "int8 of local-sgd": Strategy(_int8({"name": "local-sgd"})),
    "int8 of qsr": Strategy(_int8({"name": "qsr"}), QSR_PHASES, LONG, mean_size=1 / 4),
}
CHANGES = {"ab": ("split", "merge"), "oialr": ("split", "round")}
"""Changes of rank in the last segment of full rank, and of low rank."""


def segment_updates(name: str) -> int:
    """Return the updates per segment of the timing part, or the peer's steps per measurement."""
    return STRATEGIES[name].segment_updates if name in STRATEGIES else 8


def common_run(name: str, lr: float) -> Table:
    """Return the keys that the run files of both parts share."""
    strategy = STRATEGIES[name]
    return {
        "threads": 1,
        "batch-size": BATCH,
        "model": {"name": "mlp", "widths": [1024] * 7},
        "mesh": {"stages": 1, "placement": "replicas-in-node"},
        "partition": {"blocks": 1},
        "objective": {"name": "backprop"},
        "sync": strategy.sync,
        "optimizer": {"name": "sgd", "lr": strategy.lr or lr, "momentum": 0.9},
        "lr": {"name": "cosine"},
    }


def timing_run(name: str) -> Table:
    """Return the run file of the timing part: one epoch of random inputs per phase."""
    strategy = STRATEGIES[name]
    per_epoch = SEGMENTS * strategy.segment_updates
    data = {"name": "user:noise", "normalise": False, "rows": per_epoch * BATCH, "width": 3072}
    # H = floor((alpha / lr)^2) with alpha = 0.0175 / 0.008 of the peak rate.
    gamma = 0.0175 / 0.008 / sqrt(LONG + 0.5)
    decays = strategy.phases == QSR_PHASES
    return common_run(name, 0.01) | {
        "epochs": len(strategy.phases),
        "segment": strategy.segment_updates,
        "data": data,
        "sync": strategy.sync | strategy.timing_keys,
        "lr": {"name": "step", "epochs": [1], "gamma": gamma} if decays else {},
    }
