"""What a run tells: the plan as text and as plain values, and the summary.

Invariant: pure functions of a plan and of totals; what a number means stands in the contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dtrain.planning.cost_file import CostFile
from dtrain.planning.layout import describe
from dtrain.planning.memory import MemoryPlan
from dtrain.planning.plan import Plan
from dtrain.planning.time_estimate import estimate_time, estimate_timeline
from dtrain.planning.warnings import plan_warnings
from dtrain.schedules.render_svg import timeline_svg
from dtrain.schedules.render_text import timeline_text


def plan_text(plan: Plan, cost_file: CostFile | None = None) -> str:
    """Return partition, schedule, messages and memory of a plan, for people; time by a `sheet`."""
    told = plan_table(plan, cost_file)
    layout, top = plan.layout, plan.run.settings
    lines = [
        f"{pluralise(told['ranks'], 'rank')} = {pluralise(told['replicas'], 'replica')} x "
        f"{pluralise(told['stages'], 'stage')}, {layout.mesh.placement}",
        f"{pluralise(told['updates'], 'update')}, {plan.training_length.updates_per_epoch:,} an epoch; "
        f"{pluralise(top.batch_size, 'sample')} an update in "
        f"{pluralise(top.micro_batches, 'micro-batch', 'micro-batches')} a replica",
        "",
        f"Blocks ({plan.run.partition.balance}; multiply-adds of one sample, forward and backward)",
        *_block_lines(told),
        f"costliest stage over mean: {told['imbalance']:.2f}, so utilisation stays below "
        f"{1 / told['imbalance']:.0%}",
        "",
        f"Schedule {plan.run.schedule.name} (the first updates of an epoch, and its last)",
        timeline_text(plan.proof),
        "",
        "Messages of a full micro-batch",
        *_message_lines(told["messages"]),
        "",
        "Memory of a rank at its fullest, in bytes",
        *_memory_lines(told["memory"]),
        *(["", "Notes", *told["cautions"]] if told["cautions"] else []),
        *(_time_lines(told["prediction"]) if cost_file is not None else []),
    ]
    return "\n".join(lines) + "\n"


def plan_svg(plan: Plan, cost_file: CostFile | None = None) -> str:
    """Return the planned timeline as SVG: of the updates that are proved, F = 1 and B = 2; by a
    `sheet` in seconds, of the first updates."""
    stages, name = plan.layout.mesh.stages, plan.run.schedule.name
    title = f"{name}, {pluralise(len(plan.layout.block_layouts), 'block')} on {pluralise(stages, 'stage')}"
    if cost_file is None:
        return timeline_svg(plan.proof.timeline, stages, f"{title}; forward 1, backward 2")
    spans = estimate_timeline(plan, cost_file, MemoryPlan(plan))
    shortest = min((s.end - s.start for s in spans if s.action.kind == "F"), default=1.0)
    return timeline_svg(spans, stages, f"{title}; by {cost_file.path.name}", "s", shortest or 1.0)


def pluralise(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the plural where it needs one."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def plan_table(plan: Plan, cost_file: CostFile | None = None) -> dict[str, Any]:
    """Return the plan as plain values, for ``--json``; with a `sheet`, what it predicts, too."""
    books = MemoryPlan(plan)
    predicted = {} if cost_file is None else {"prediction": estimate_time(plan, cost_file, books)}
    proof, rows = plan.proof, plan.batch_splitter.largest_micro_batch
    return describe(plan.layout, rows) | {
        "updates": plan.training_length.total_updates,
        "updates_per_epoch": plan.training_length.updates_per_epoch,
        "rows_per_micro": rows,
        "peak_live_micros": list(proof.peak_live),
        "staleness": list(proof.staleness),
        "bubble": proof.bubble,
        "memory": books.to_dicts(),
        "cautions": plan_warnings(plan),
        "run": plan.run.to_table(),
        **predicted,
    }


def _block_lines(table: dict[str, Any]) -> list[str]:
    total = sum(block["multiply_adds"] for block in table["blocks"]) or 1
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
    return _align_columns(rows)


def _message_lines(messages: Sequence[dict[str, Any]]) -> list[str]:
    rows = [("route", "from", "to", "bytes", "")]
    rows += [
        (
            each["route"],
            f"block {each['from_block']} (stage {each['from_stage']})",
            f"block {each['to_block']} (stage {each['to_stage']})",
            f"{each['bytes']:,}",
            "" if each["wire"] else "on the rank itself",
        )
        for each in messages
    ]
    return _align_columns(rows) if messages else ["none: one block"]


def _memory_lines(memory: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per stage, of the replica that holds most."""
    parts = ("parameters", "gradients", "optimizer", "sync", "versions", "live", "messages", "peak")
    heads = ("stage", *parts[:5], "live activations", "messages", "together")
    stages: dict[int, dict[str, Any]] = {}
    for each in memory:
        fullest = stages.get(each["stage"], each)
        stages[each["stage"]] = max(fullest, each, key=lambda row: int(row["peak_bytes"]))
    rows = [
        (str(stage), *(f"{stages[stage][f'{part}_bytes']:,}" for part in parts))
        for stage in sorted(stages)
    ]
    return _align_columns([heads, *rows])


def _time_lines(estimate: dict[str, Any]) -> list[str]:
    """Return what a costs file predicts."""
    whole, span = estimate["updates"] == estimate["segment_updates"], estimate["makespan_s"]
    rate = (
        "" if estimate["samples_per_s"] is None else f", {estimate['samples_per_s']:,.0f} samples/s"
    )
    rows = [("stage", "busy", "waiting", "mean over replicas, an update")]
    rows += [
        (
            str(each["stage"]),
            f"{each['busy_s'] / span if span else 0:.1%}",
            f"{each['wait_s'] / span if span else 0:.1%}",
            f"{each['mean_s']:.3g} s",
        )
        for each in estimate["stages"]
    ]
    links = [("link", "messages", "bytes")]
    links += [(k, f"{v['messages']:,}", f"{v['bytes']:,}") for k, v in estimate["links"].items()]
    return [
        "",
        f"Time by {estimate['file']}",
        f"{'a segment' if whole else 'the start of a segment'} of "
        f"{pluralise(estimate['updates'], 'update')}: {span:.4g} s{rate}; bubble {estimate['bubble']:.1%}",
        *_align_columns(rows),
        "",
        *_align_columns(links),
    ]


def _align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as columns: numbers to the right, the last column and texts to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [all(_is_number(row[i]) for row in rows[1:]) for i in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _is_number(cell: str) -> bool:
    return cell.strip("-0123456789,.%") == ""


def percent(fraction: float) -> str:
    """Return a share of 1 in words."""
    return f"{fraction:.1%}".replace("%", " %")


TEST_KEYS = ("test_loss", "test_accuracy", "test_accuracy_vote", "accuracy_per_block")
