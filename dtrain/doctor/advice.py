"""Which sync for a network: the table of docs/communication.md, applied to measured numbers.

Pure arithmetic. T is the time of a mean of all gradients between nodes, that of the ring:
2 (m - 1) / m times the model's bytes, divided by the rate of a link.

::

    T             up to half a step   some steps    ten steps or more             a hundred or more
    take          every-step          daso          local-sgd, within = "node"    diloco
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

OVERLAP = 2 / 3
"""Part of a step, its backward pass, with which an all-reduce overlaps."""


SOME_STEPS, MANY_STEPS, VERY_MANY_STEPS = 0.5, 10.0, 100.0
"""Steps that a mean takes, from which another sync is the one of the table."""


PARTS = {
    "every-step": 1.0,
    "int8": 1 / 4,
    "daso": 1 / 4,
    "local-sgd": 1 / 8,
    "qsr": 1 / 4,
    "diloco": 1 / 50,
}
"""Part of the bytes of `every-step` that a sync sends per update, with its default keys."""


HANDLING_S_PER_BYTE = 2e-9
"""Seconds in which a core sends and adds a byte of a mean over TCP, measured without a limit of the
link (benchmarks/slow_link.py) on nodes whose cores all compute."""


HANDLING = {"daso": 2.0, "int8": 5.7}
"""Work per byte that is sent, over that of `every-step`: a copy and a merge; the codec."""


HIDDEN = ("daso",)
"""Syncs whose means between nodes overlap with whole steps."""


@final
@dataclass(frozen=True)
class Advice:
    """The sync for a network.

    Attributes
    ----------
    mean_s : float
        Seconds of a mean of all gradients between nodes.
    steps : float or None
        The same in steps; None: the time of a step is unknown.
    sync : str or None
        None: the time of a step is unknown.
    step_s : dict
        Estimated seconds of a step by sync; empty likewise.
    reason : str
        The row of the table.
    """

    mean_s: float
    steps: float | None
    sync: str | None
    step_s: dict[str, float]
    reason: str


def advise(
    model_bytes: float,
    nodes: int,
    bytes_per_s: float,
    compute_s: float | None = None,
    handling_s_per_byte: float = 0.0,
) -> Advice:
    """Return the sync for a model on several nodes.

    Parameters
    ----------
    model_bytes : float
        Trained parameters.
    nodes : int
        Nodes that hold replicas.
    bytes_per_s : float
        Measured rate between nodes.
    compute_s : float, optional
        Seconds of a step without communication.
    handling_s_per_byte : float
        Seconds in which a computing core handles a byte of a mean; 0: others do it.
    """
    mean_s = 2 * (nodes - 1) / nodes * model_bytes / bytes_per_s
    if nodes == 1:
        step_s = {} if compute_s is None else dict.fromkeys(PARTS, compute_s)
        return Advice(0.0, 0.0, "every-step", step_s, "one node: means stay in its memory")
    if compute_s is None:
        return Advice(mean_s, None, None, {}, "the time of a step is unknown")
    steps = mean_s / compute_s
    sync, reason = _row(steps)
    work_s = 2 * (nodes - 1) / nodes * model_bytes * handling_s_per_byte
    step_s = {
        name: _step_s(name, mean_s, compute_s) + PARTS[name] * HANDLING.get(name, 1.0) * work_s
        for name in PARTS
    }
    return Advice(mean_s, steps, sync, step_s, reason)


def _row(steps: float) -> tuple[str, str]:
    """Return the sync and the reason of a row of the table."""
    if steps <= SOME_STEPS:
        return "every-step", "the mean overlaps with the backward pass"
    if steps < MANY_STEPS:
        return "daso", "a mean takes as long as some steps, and daso overlaps it with them"
    if steps < VERY_MANY_STEPS:
        return (
            "local-sgd",
            'a mean takes as long as ten steps or more; within = "node", or qsr with a learning '
            "rate that falls",
        )
    return "diloco", "a mean takes as long as a hundred steps or more; for long runs"


def _step_s(name: str, mean_s: float, compute_s: float) -> float:
    """Return the estimated seconds of a step, without the work of the cores for messages."""
    part = PARTS[name] * mean_s
    if name in HIDDEN:
        return max(compute_s, part)
    if name == "every-step":
        return max(compute_s, part + (1 - OVERLAP) * compute_s)
    return compute_s + part


def advice_lines(advice: Advice, model_bytes: float, nodes: int, rate_text: str) -> Sequence[str]:
    """Return the advice in words."""
    size = f"{model_bytes / 1e6:,.1f} MB of parameters"
    if nodes == 1:
        return [f"sync       every-step: {advice.reason}"]
    head = f"{size} on {nodes} nodes at {rate_text}: a mean takes {_seconds(advice.mean_s)}"
    if advice.sync is None:
        some, many = advice.mean_s / SOME_STEPS, advice.mean_s / MANY_STEPS
        return [
            f"sync       {head}",
            f"           every-step, if a step takes {_seconds(some)} or more",
            f"           daso, if it takes {_seconds(many)} to {_seconds(some)}",
            f'           local-sgd with within = "node", if it takes less than {_seconds(many)}',
            "           give --step-seconds for one answer (1 / updates per second of a run on one "
            "node)",
        ]
    lines = [
        f"sync       {advice.sync}: {advice.reason}",
        f"           {head}, {advice.steps:.2g} steps",
    ]
    ordered = sorted(advice.step_s.items(), key=lambda item: item[1])
    estimates = ", ".join(f"{name} {_seconds(value)}" for name, value in ordered)
    lines.append(f"           estimated steps: {estimates}")
    if advice.sync not in ("every-step", "diloco"):
        lines.append(
            "           int8 around it sends a quarter of the bytes and costs compute: measure it"
        )
    return lines


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def advice_table(advice: Advice) -> dict[str, Any]:
    """Return the advice as plain values."""
    return dict(vars(advice))
