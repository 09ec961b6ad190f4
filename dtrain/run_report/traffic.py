"""Bytes that ranks sent, by kind and by whether they left a node.

Invariant: the kinds add up to the counted totals. The messages of samples are those of the plan
times the samples; the rest are the averages of the sync. If the two do not fit, all bytes are of
one kind.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from dtrain.run_report.plan_file import RunPlan
from dtrain.run_report.run_record import RunRecord

AVERAGES, ALL = "averages of replicas", "all kinds"


TOLERANCE = 0.02
"""Share of the total by which planned messages may exceed counted bytes."""


class Traffic(NamedTuple):
    """Bytes of one kind, inside nodes and between nodes."""

    kind: str
    intra_node: int
    inter_node: int


def traffic_by_kind(run: RunRecord) -> list[Traffic]:
    """Return the counted bytes of a run by kind, empty where none were counted."""
    intra, inter = run.number("bytes_intra_node"), run.number("bytes_inter_node")
    if intra is None or inter is None:
        return []
    total = Traffic(ALL, int(intra), int(inter))
    messages = _message_bytes(run.plan, run.nodes, run.count("samples"))
    if messages is None:
        return [total]
    rest_intra = total.intra_node - sum(kind.intra_node for kind in messages)
    rest_inter = total.inter_node - sum(kind.inter_node for kind in messages)
    if min(rest_intra, rest_inter) < -TOLERANCE * (intra + inter):
        return [total]
    rest = Traffic(AVERAGES, max(rest_intra, 0), max(rest_inter, 0))
    kinds = [*messages, rest] if run.plan.mesh and run.plan.mesh.replicas > 1 else messages
    return [kind for kind in kinds if kind.intra_node or kind.inter_node]


def _message_bytes(plan: RunPlan, nodes: list[str], samples: int) -> list[Traffic] | None:
    """Return the planned bytes of messages by route; None where plan and ranks do not fit."""
    mesh, rows = plan.mesh, plan.rows_per_micro_batch
    if mesh is None or not rows or len(nodes) != mesh.ranks:
        return None
    shares = mesh.shares or (1,) * mesh.replicas
    sizes: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for message in plan.messages:
        if not message.is_sent or max(message.source_stage, message.target_stage) >= mesh.stages:
            continue
        for replica in range(mesh.replicas):
            ends = message.source_stage, message.target_stage
            source, target = (nodes[mesh.rank(replica, stage)] for stage in ends)
            size = message.size / rows * samples * shares[replica] / sum(shares)
            sizes[message.route][source != target] += size
    return [Traffic(route, round(a), round(b)) for route, (a, b) in sizes.items()]
