"""What a run tells: the plan as text and as plain values, and the summary.

Invariant: pure functions of a plan and of totals; what a number means stands in the contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dtrain.budget import Books
from dtrain.cautions import cautions
from dtrain.costs import Sheet
from dtrain.job import Plan
from dtrain.layout import describe
from dtrain.outlook import expected, predict
from dtrain.schedules.draw import draw
from dtrain.schedules.picture import picture
from dtrain.totals import Totals


def plan_text(plan: Plan, sheet: Sheet | None = None) -> str:
    """Return partition, schedule, messages and memory of a plan, for people; time by a `sheet`."""
    told = plan_table(plan, sheet)
    layout, top = plan.layout, plan.run.top
    lines = [
        f"{counted(told['ranks'], 'rank')} = {counted(told['replicas'], 'replica')} x "
        f"{counted(told['stages'], 'stage')}, {layout.mesh.placement}",
        f"{counted(told['updates'], 'update')}, {plan.calendar.per_epoch:,} an epoch; "
        f"{counted(top.batch_size, 'sample')} an update in "
        f"{counted(top.micro_batches, 'micro-batch', 'micro-batches')} a replica",
        "",
        f"Blocks ({plan.run.partition.balance}; multiply-adds of one sample, forward and backward)",
        *_blocks(told),
        f"costliest stage over mean: {told['imbalance']:.2f}, so utilisation stays below "
        f"{1 / told['imbalance']:.0%}",
        "",
        f"Schedule {plan.run.schedule.name} (the first updates of an epoch, and its last)",
        draw(plan.proof),
        "",
        "Messages of a full micro-batch",
        *_messages(told["messages"]),
        "",
        "Memory of a rank at its fullest, in bytes",
        *_memory(told["memory"]),
        *(["", "Notes", *told["cautions"]] if told["cautions"] else []),
        *(_time(told["prediction"]) if sheet is not None else []),
    ]
    return "\n".join(lines) + "\n"


def plan_picture(plan: Plan, sheet: Sheet | None = None) -> str:
    """Return the planned timeline as SVG: of the updates that are proved, F = 1 and B = 2; by a
    `sheet` in seconds, of the first updates."""
    stages, name = plan.layout.mesh.stages, plan.run.schedule.name
    title = f"{name}, {counted(len(plan.layout.parts), 'block')} on {counted(stages, 'stage')}"
    if sheet is None:
        return picture(plan.proof.timeline, stages, f"{title}; forward 1, backward 2")
    spans = expected(plan, sheet, Books(plan))
    shortest = min((s.end - s.start for s in spans if s.action.kind == "F"), default=1.0)
    return picture(spans, stages, f"{title}; by {sheet.path.name}", "s", shortest or 1.0)


def counted(number: int, noun: str, several: str = "") -> str:
    """Return a number with its noun, in the plural where it needs one."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"


def plan_table(plan: Plan, sheet: Sheet | None = None) -> dict[str, Any]:
    """Return the plan as plain values, for ``--json``; with a `sheet`, what it predicts, too."""
    books = Books(plan)
    predicted = {} if sheet is None else {"prediction": predict(plan, sheet, books)}
    proof, rows = plan.proof, plan.shares.largest
    return describe(plan.layout, rows) | {
        "updates": plan.calendar.total,
        "updates_per_epoch": plan.calendar.per_epoch,
        "rows_per_micro": rows,
        "peak_live_micros": list(proof.peak_live),
        "staleness": list(proof.staleness),
        "bubble": proof.bubble,
        "memory": books.table(),
        "cautions": cautions(plan),
        "run": plan.run.table(),
        **predicted,
    }


def _blocks(told: dict[str, Any]) -> list[str]:
    total = sum(block["multiply_adds"] for block in told["blocks"]) or 1
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
        for block in told["blocks"]
    ]
    return _aligned(rows)


def _messages(messages: Sequence[dict[str, Any]]) -> list[str]:
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
    return _aligned(rows) if messages else ["none: one block"]


def _memory(memory: Sequence[dict[str, Any]]) -> list[str]:
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
    return _aligned([heads, *rows])


def _time(told: dict[str, Any]) -> list[str]:
    """Return what a costs file predicts."""
    whole, span = told["updates"] == told["segment_updates"], told["makespan_s"]
    rate = "" if told["samples_per_s"] is None else f", {told['samples_per_s']:,.0f} samples/s"
    rows = [("stage", "busy", "waiting", "mean over replicas, an update")]
    rows += [
        (
            str(each["stage"]),
            f"{each['busy_s'] / span if span else 0:.1%}",
            f"{each['wait_s'] / span if span else 0:.1%}",
            f"{each['mean_s']:.3g} s",
        )
        for each in told["stages"]
    ]
    links = [("link", "messages", "bytes")]
    links += [(k, f"{v['messages']:,}", f"{v['bytes']:,}") for k, v in told["links"].items()]
    return [
        "",
        f"Time by {told['file']}",
        f"{'a segment' if whole else 'the start of a segment'} of "
        f"{counted(told['updates'], 'update')}: {span:.4g} s{rate}; bubble {told['bubble']:.1%}",
        *_aligned(rows),
        "",
        *_aligned(links),
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as columns: numbers to the right, the last column and texts to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [all(_number(row[i]) for row in rows[1:]) for i in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _number(cell: str) -> bool:
    return cell.strip("-0123456789,.%") == ""


def exam_text(found: dict[str, Any]) -> str:
    """Return what `dtrain evaluate` found, for people."""
    per_block, samples = found["accuracy_per_block"], found["samples"]
    right = round(found["accuracy"] * samples)
    own = "the vote's" if found["prediction"] == "vote" else "the last block's"
    loss = "-" if found["loss"] is None else f"{found['loss']:.4f}"
    lines = [
        f"folder    {found['folder']}",
        f"model     {found['objective']}, after {counted(found['updates'], 'update')} "
        f"({counted(found['epochs'], 'epoch')}), from {found['checkpoint']}",
        f"tested    {counted(samples, 'sample')} of the {found['split']} split, "
        f"on {counted(found['ranks'], 'rank')}",
        f"loss      {loss}",
        f"accuracy  {percent(found['accuracy'])} ({right:,} of {samples:,}), {own}",
    ]
    if sum(each is not None for each in per_block) > 1:
        blocks = (f"{i}: {'-' if a is None else percent(a)}" for i, a in enumerate(per_block))
        lines += [f"vote      {percent(found['accuracy_vote'])}", f"blocks    {', '.join(blocks)}"]
    return "\n".join(lines) + "\n"


def percent(share: float) -> str:
    """Return a share of 1 in words."""
    return f"{share:.1%}".replace("%", " %")


UNTESTED = ("test_loss", "test_accuracy", "test_accuracy_vote", "accuracy_per_block")


def summary(plan: Plan, totals: Totals, status: str, digest: str | None = None) -> dict[str, Any]:
    """Return the contents of `summary.json`; what is not known yet is None.

    Lists that another layout of the same run left behind, of another length, are not known.
    """
    layout, stages = plan.layout, plan.layout.mesh.stages
    pairs = zip(totals.busy_s, totals.stage_s, strict=True)
    return {
        "status": status,
        "ranks": layout.mesh.ranks,
        "replicas": layout.mesh.replicas,
        "stages": layout.mesh.stages,
        "blocks": len(layout.parts),
        "epochs": totals.update // plan.calendar.per_epoch,
        "updates": totals.update,
        "samples": totals.samples,
        "attempts": totals.attempt,
        "wall_s": totals.wall_s,
        "samples_per_s": totals.samples_per_s,
        "train_loss": totals.train_loss,
        "train_loss_per_block": totals.losses(),
        **totals.measured(),
        **(totals.test or dict.fromkeys(UNTESTED)),
        "bytes_intra_node": totals.bytes_intra_node,
        "bytes_inter_node": totals.bytes_inter_node,
        **savings(totals.weights),
        "utilisation": _fit([busy / wall if wall else None for busy, wall in pairs], stages),
        "peak_live_micros": _fit(totals.peak_live, stages),
        "peak_memory_bytes": _fit(totals.peak_bytes, layout.mesh.ranks),
        "rss_bytes": _fit(totals.rss_bytes, layout.mesh.ranks),
        "staleness": list(plan.proof.staleness),
        "digest": digest,
    }


def savings(weights: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how much smaller a model is with its products as factors, and what that saved between
    nodes beside `every-step`; by weight, too, for those that were products."""

    def saved(entries: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
        numbers, held, sent, plain = (
            sum(entry[key] for entry in entries) for key in ("numbers", "held", "sent", "plain")
        )
        return {
            "compression": numbers / held if held else None,
            "traffic_saved": 1 - sent / plain if plain else None,
        }

    thin = {name: each for name, each in weights.items() if each["rank"] is not None}
    told = {name: {"rank": each["rank"], **saved([each])} for name, each in thin.items()}
    return {**saved([*weights.values()]), "low_rank": dict(sorted(told.items()))}


def _fit(values: Sequence[Any], length: int) -> list[Any]:
    return list(values) if len(values) == length else [None] * length
