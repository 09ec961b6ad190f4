"""A plan as text, as plain values and as a drawing.

Invariant: pure functions of a plan and a costs file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dtrain.partition import is_ascending
from dtrain.planning.cost_file import CostFile
from dtrain.planning.data_memory import data_lines, data_warnings, plan_data_memory
from dtrain.planning.formatting import align_columns, percent, pluralise
from dtrain.planning.layout_table import describe
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.placement_warnings import planned_warnings
from dtrain.planning.plan import Plan
from dtrain.planning.time_estimate import estimate_time, estimate_timeline
from dtrain.planning.warnings import plan_warnings
from dtrain.schedules.render_svg import timeline_svg
from dtrain.schedules.render_text import timeline_text


def plan_text(plan: Plan, cost_file: CostFile | None = None) -> str:
    """Return a plan for people: partition, schedule, messages, memory and warnings.

    With a costs file the estimated time follows.
    """
    table = plan_table(plan, cost_file)
    lines = [
        *_size_lines(plan),
        "",
        *_block_lines(plan, table),
        *_place_lines(table["place"]),
        "",
        f"Schedule {plan.run.schedule.name} (the first updates of an epoch, then its last)",
        timeline_text(plan.proof),
        "",
        "Messages of a full micro-batch, or of an update",
        *_message_lines(table["messages"]),
        "",
        "Peak memory per rank (bytes)",
        *_memory_lines(table["memory"]),
        *data_lines(table["data"], table["memory"]),
        *(["", "Notes", *table["cautions"]] if table["cautions"] else []),
        *(_time_lines(table["prediction"]) if cost_file is not None else []),
    ]
    return "\n".join(lines) + "\n"


def plan_svg(plan: Plan, cost_file: CostFile | None = None) -> str:
    """Return the planned timeline as SVG.

    It shows the proven updates with F = 1 and B = 2, or with a costs file the first updates in
    seconds.
    """
    stages, blocks = plan.layout.mesh.stages, len(plan.layout.block_layouts)
    title = (
        f"{plan.run.schedule.name}, {pluralise(blocks, 'block')} on {pluralise(stages, 'stage')}"
    )
    if cost_file is None:
        return timeline_svg(plan.proof.timeline, stages, f"{title}; forward 1, backward 2")
    spans = estimate_timeline(plan, cost_file, MemoryPlan(plan))
    shortest = min((s.end - s.start for s in spans if s.action.kind == "F"), default=1.0)
    return timeline_svg(spans, stages, f"{title}; by {cost_file.path.name}", "s", shortest or 1.0)


def plan_table(plan: Plan, cost_file: CostFile | None = None) -> dict[str, Any]:
    """Return a plan as plain values, the output of ``--json``; with a costs file the estimated
    time, too."""
    memory_plan = MemoryPlan(plan)
    data, memory = plan_data_memory(plan), memory_plan.to_dicts()
    peak = max(row["peak_bytes"] for row in memory)
    ranks_per_node = None if cost_file is None else cost_file.rank_speed.ranks_per_node
    proof, rows = plan.proof, plan.batch_splitter.largest_micro_batch
    table = describe(plan.layout, rows) | {
        "updates": plan.training_length.total_updates,
        "updates_per_epoch": plan.training_length.updates_per_epoch,
        "rows_per_micro": rows,
        "peak_live_micros": list(proof.peak_live),
        "staleness": list(proof.staleness),
        "bubble": proof.bubble,
        "memory": memory,
        "data": data.to_dict(),
        "cautions": [
            *plan_warnings(plan),
            *(planned_warnings(plan, ranks_per_node) if ranks_per_node else []),
            *data_warnings(plan, data, peak),
        ],
        "run": plan.run.to_table(),
    }
    if cost_file is not None:
        table["prediction"] = estimate_time(plan, cost_file, memory_plan)
    return table


def _size_lines(plan: Plan) -> list[str]:
    mesh, settings, length = plan.layout.mesh, plan.run.settings, plan.training_length
    micro_batches = pluralise(settings.micro_batches, "micro-batch", "micro-batches")
    shares = f", shares {' '.join(map(str, mesh.shares))}" if mesh.shares else ""
    return [
        f"{pluralise(mesh.ranks, 'rank')} = {pluralise(mesh.replicas, 'replica')} x "
        f"{pluralise(mesh.stages, 'stage')}, {mesh.placement}{shares}",
        f"{pluralise(length.total_updates, 'update')}, {length.updates_per_epoch:,} per epoch; "
        f"{pluralise(settings.batch_size, 'sample')} per update in {micro_batches} per replica",
    ]


def _block_lines(plan: Plan, table: dict[str, Any]) -> list[str]:
    section, total = plan.run.partition, sum(b["multiply_adds"] for b in table["blocks"]) or 1
    cuts = f"balanced by {section.balance}" if section.cuts is None else "cuts of the run file"
    rows = [("block", "stage", "parameters", "head", "multiply-adds", "share", "layers")]
    rows += [
        (
            str(block["block"]),
            str(block["stage"]),
            f"{block['parameters']:,}",
            f"{block['head_parameters']:,}" if block["head_parameters"] else "-",
            f"{block['multiply_adds']:,}",
            f"{block['multiply_adds'] / total:.0%}",
            " ".join([*block["layers"], *(["(frozen)"] if block["frozen"] else [])]),
        )
        for block in table["blocks"]
    ]
    imbalance = table["imbalance"]
    return [
        f"Blocks ({cuts}; multiply-adds of one sample, forward and backward)",
        *align_columns(rows),
        f"Load imbalance of stages (max/mean): {imbalance:.2f}; "
        f"upper bound on utilisation: {percent(1 / imbalance, 0)}",
    ]


def _place_lines(place: Sequence[int]) -> list[str]:
    """Return a drawing of the blocks of each stage, where these are not contiguous."""
    if is_ascending(place):
        return []
    width = len(str(len(place) - 1))
    rows = [
        f"stage {stage:{len(str(max(place)))}} | "
        + " ".join(f"{b if s == stage else '.':>{width}}" for b, s in enumerate(place))
        for stage in range(max(place) + 1)
    ]
    return ["", "Places (the blocks of each stage; activations go from left to right)", *rows]


def _message_lines(messages: Sequence[dict[str, Any]]) -> list[str]:
    rows = [("route", "from", "to", "bytes", "per", "")]
    rows += [
        (
            message["route"],
            f"block {message['from_block']} (stage {message['from_stage']})",
            f"block {message['to_block']} (stage {message['to_stage']})",
            f"{message['bytes']:,}",
            message["per"],
            _not_sent(message),
        )
        for message in messages
    ]
    return align_columns(rows) if messages else ["none"]


def _not_sent(message: dict[str, Any]) -> str:
    """Return why no bytes are sent for a message; empty if they are."""
    if message["wire"]:
        return ""
    same_rank = message["from_stage"] == message["to_stage"]
    return "same rank, not sent" if same_rank else "sent once to this rank"


def _memory_lines(memory: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per stage, of the replica that needs most."""
    parts = ["parameters", "gradients", "optimizer", "sync", "versions", "live", "messages"]
    parts += ["checkpoint"] if any(rank["checkpoint_bytes"] for rank in memory) else []
    parts.append("peak")
    titles = {"live": "live activations", "peak": "total"}
    header = ("stage", *(titles.get(part, part) for part in parts))
    stages: dict[int, dict[str, Any]] = {}
    for rank in memory:
        largest = stages.get(rank["stage"], rank)
        stages[rank["stage"]] = max(largest, rank, key=lambda row: int(row["peak_bytes"]))
    rows = [
        (str(stage), *(f"{stages[stage][f'{part}_bytes']:,}" for part in parts))
        for stage in sorted(stages)
    ]
    return align_columns([header, *rows])


def _time_lines(estimate: dict[str, Any]) -> list[str]:
    """Return the estimated time of a segment, its stages and links."""
    is_whole = estimate["updates"] == estimate["segment_updates"]
    updates, span = pluralise(estimate["updates"], "update"), estimate["makespan_s"]
    rate = estimate["samples_per_s"]
    stages = [("stage", "busy", "waiting", "gradient mean per update")]
    stages += [
        (
            str(stage["stage"]),
            f"{stage['busy_s'] / span if span else 0:.1%}",
            f"{stage['wait_s'] / span if span else 0:.1%}",
            f"{stage['mean_s']:.3g} s",
        )
        for stage in estimate["stages"]
    ]
    links = [("link", "messages", "bytes")]
    links += [
        (kind, f"{link['messages']:,}", f"{link['bytes']:,}")
        for kind, link in estimate["links"].items()
    ]
    return [
        "",
        f"Estimated time by {estimate['file']}",
        (f"Segment of {updates}" if is_whole else f"The first {updates} of a segment")
        + f": {span:.4g} s"
        + ("" if rate is None else f", {rate:,.0f} samples/s")
        + f"; bubble {percent(estimate['bubble'])}",
        *align_columns(stages),
        "",
        *align_columns(links),
    ]
