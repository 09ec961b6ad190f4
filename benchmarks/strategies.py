"""The syncs that `slow_link` and `slow_link_accuracy` measure, and their run files.

Invariant: pure; an epoch of a timed run is one phase of a strategy, in segments of whole rounds
of it, after which nothing is in flight.

::

    daso        | warm-up, blocking | cycling, S = 8, B = 2 | cool-down, blocking |
    qsr         | short: H = 4      | long: H = 24          |
    ab, oialr   | full rank         | low rank, first rank  |
    others      | steady            |                           an epoch each
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import final

from dtrain.schema import Table

NODES, EACH, ROWS = 2, 2, 32
"""Hosts, ranks of each, samples of a rank in an update."""
PLACES = ("a", "a", "b", "b")
BATCH = NODES * EACH * ROWS
SHORT, LONG = 4, 24
"""Updates of a round of `qsr` at the peak rate, and at that of the second epoch of its timing."""
SEGMENTS = 4
"""Segments of an epoch of the timing part; the last, which has the epoch's end, is not timed."""
DASO_PHASES = ("warm-up", "cycling", "cool-down")
QSR_PHASES = ("short", "long")
RANK_PHASES = ("full", "low")


@final
@dataclass(frozen=True)
class Strategy:
    """What is measured of a sync.

    Attributes
    ----------
    sync : table
        Of the accuracy part.
    phases : tuple of str
        An epoch of the timing part for each.
    round : int
        Updates of a segment of the timing part: whole rounds, 24 in three of them.
    timing : table
        Keys of the sync that differ in the timing part.
    part : float
        The bytes of one of its means between nodes, as a part of those of `every-step`.
    lr : float, optional
        Where it cannot use the rate of all others.
    """

    sync: Table
    phases: tuple[str, ...] = ("steady",)
    round: int = 8
    timing: Table = field(default_factory=dict)
    part: float = 1.0
    lr: float | None = None


def _coded(inner: Table) -> Table:
    return {"name": "int8", "inner": inner}


DASO: Table = {"name": "daso", "warmup-epochs": 1, "cooldown-epochs": 1}
EPOCH = SEGMENTS * 8
STRATEGIES = {
    "every-step": Strategy({"name": "every-step"}),
    "daso": Strategy(DASO, DASO_PHASES),
    "local-sgd": Strategy({"name": "local-sgd"}),
    "qsr": Strategy({"name": "qsr"}, QSR_PHASES, LONG),
    "diloco": Strategy({"name": "diloco"}, round=50),
    "int8": Strategy({"name": "int8"}),
    "terngrad": Strategy({"name": "terngrad"}),
    "powersgd": Strategy({"name": "powersgd"}),
    "demo": Strategy({"name": "demo"}, lr=3e-4),
    "ab": Strategy(
        {"name": "ab"},
        RANK_PHASES,
        timing={"warmup-updates": EPOCH, "every": EPOCH, "full-updates": 1},
    ),
    "oialr": Strategy(
        {"name": "oialr"},
        RANK_PHASES,
        # A round of all matrices, in the last segment of low rank.
        timing={"delay-updates": EPOCH, "every": EPOCH - 1, "share": 1.0},
    ),
    "int8 of daso": Strategy(_coded(DASO), DASO_PHASES),
    "int8 of local-sgd": Strategy(_coded({"name": "local-sgd"})),
    "int8 of qsr": Strategy(_coded({"name": "qsr"}), QSR_PHASES, LONG, part=1 / 4),
}
CHANGES = {"ab": ("split", "merge"), "oialr": ("split", "round")}
"""What happens in the last segment of full rank, and of low rank."""


def rounds(name: str) -> int:
    """Return the updates of a segment of the timing part; of the peer's blocks of steps, too."""
    return STRATEGIES[name].round if name in STRATEGIES else 8


def base(name: str, lr: float) -> Table:
    """Return what the run files of all parts share."""
    own = STRATEGIES[name]
    return {
        "threads": 1,
        "batch-size": BATCH,
        "model": {"name": "mlp", "widths": [1024] * 7},
        "mesh": {"stages": 1, "placement": "replicas-in-node"},
        "partition": {"blocks": 1},
        "objective": {"name": "backprop"},
        "sync": own.sync,
        "optimizer": {"name": "sgd", "lr": own.lr or lr, "momentum": 0.9},
        "lr": {"name": "cosine"},
    }


def timed(name: str) -> Table:
    """Return the run file of the timing part: an epoch of noise for each phase."""
    own = STRATEGIES[name]
    per_epoch = SEGMENTS * own.round
    data = {"name": "user:noise", "normalise": False, "rows": per_epoch * BATCH, "width": 3072}
    # H = floor((alpha / lr)^2) with alpha = 0.0175 / 0.008 of the peak rate.
    low = 0.0175 / 0.008 / sqrt(LONG + 0.5)
    falls = own.phases == QSR_PHASES
    return base(name, 0.01) | {
        "epochs": len(own.phases),
        "segment": own.round,
        "data": data,
        "sync": own.sync | own.timing,
        "lr": {"name": "step", "epochs": [1], "gamma": low} if falls else {},
    }
