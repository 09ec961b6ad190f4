"""The sections on resources: computing and waiting, bytes between ranks, memory of the ranks.

Invariant: pure functions of run records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from dtrain.planning.formatting import percent
from dtrain.run_report import bar_charts, charts
from dtrain.run_report.page_parts import MAX_ROWS, Runs, Section, TableView, is_long
from dtrain.run_report.run_record import RunRecord
from dtrain.run_report.texts import UNKNOWN, absence_text, bytes_text, count_text, note_text
from dtrain.run_report.traffic import ALL, traffic_by_kind

T = TypeVar("T")


def waiting_section(runs: Runs) -> Section:
    """Return the share of time in which stages compute."""
    section = Section(
        "waiting",
        "Computing and waiting",
        "A stage waits while it has no input yet, or while replicas average. The share in which it "
        "computes is its utilisation. The bubble is the waiting that the schedule alone causes, if "
        "a backward takes twice as long as a forward and all stages are equally costly.",
    )
    names, shares, rows = [], [], []
    for name, run in runs:
        values = run.numbers("utilisation")
        if not any(value is not None for value in values):
            section.notes.append(note_text(runs, name, f"no utilisation; {absence_text(run)}."))
        for stage, share in enumerate(values):
            if share is not None:
                prefix = f"{charts.short_name(name, 14)}, " if len(runs) > 1 else ""
                names.append(f"{prefix}stage {stage}")
                shares.append(min(max(share, 0.0), 1.0))
                row = _stage_row(run, stage, share)
                rows.append([name, *row] if len(runs) > 1 else row)
        if run.plan.bubble is not None:
            schedule = run.strategy("schedule") or "its schedule"
            text = f"the bubble of {schedule} is {percent(run.plan.bubble)} of the time."
            section.notes.append(note_text(runs, name, text))
    if shares:
        shown = sorted(sorted(range(len(shares)), key=lambda row: shares[row])[:MAX_ROWS])
        figure = bar_charts.utilisation_chart([names[n] for n in shown], [shares[n] for n in shown])
        caption = "Share of the training time in which each stage computed, averaged over the run."
        section.add_chart("stages", figure, caption)
        if len(shares) > MAX_ROWS:
            section.notes.append(f"The {MAX_ROWS} stages that wait most are drawn.")
        header = ["run"] if len(runs) > 1 else []
        header += ["stage", "computing", "waiting", "live micro-batches", "staleness"]
        note = (
            "Live micro-batches are stored between their forward and their backward. Staleness is "
            "the number of updates by which a gradient is late."
        )
        section.tables.append(
            TableView("Stages", header, rows, len(rows) > MAX_ROWS, note, labels=len(header) - 4)
        )
    return section


def _stage_row(run: RunRecord, stage: int, share: float) -> list[str]:
    row = [str(stage), percent(share), percent(1 - share)]
    for key in ("peak_live_micros", "staleness"):
        values = run.numbers(key)
        row.append(count_text(values[stage]) if stage < len(values) else UNKNOWN)
    return row


def traffic_section(runs: Runs) -> Section:
    """Return the bytes that ranks sent."""
    section = Section(
        "traffic",
        "Bytes between ranks",
        "Ranks send activations (outputs of a stage) forward, gradients backward, and averages "
        "between replicas. A node is one computer; traffic between nodes uses the network, which "
        "is slower than memory.",
    )
    shown, rows = [], []
    for name, run in runs:
        kinds = traffic_by_kind(run)
        total = sum(kind.intra_node + kind.inter_node for kind in kinds)
        if not total:
            reason = "the ranks sent nothing" if kinds else absence_text(run)
            section.notes.append(note_text(runs, name, f"no bytes; {reason}."))
            continue
        shown.append((name, kinds))
        updates = run.count("updates") or 1
        for kind in kinds:
            size = kind.intra_node + kind.inter_node
            row = [name] if len(runs) > 1 else []
            row += [kind.kind, bytes_text(kind.intra_node), bytes_text(kind.inter_node)]
            rows.append([*row, bytes_text(size / updates), percent(size / total, 0)])
    if shown:
        section.add_chart(
            "bytes",
            bar_charts.traffic_chart(shown[: MAX_ROWS // 2]),
            "Bytes that all ranks sent during training, by kind.",
        )
        header = [*(["run"] if len(runs) > 1 else []), "kind", "inside nodes", "between nodes"]
        note = (
            ""
            if any(kind.kind == ALL for _, kinds in shown for kind in kinds)
            else "The totals are counted. The kinds of messages are planned bytes times samples, "
            "and averages are the rest."
        )
        header += ["per update", "share"]
        section.tables.append(
            TableView("Bytes by kind", header, rows, note=note, labels=len(header) - 4)
        )
    return section


def memory_section(runs: Runs) -> Section:
    """Return planned and counted memory of the ranks."""
    section = Section(
        "memory",
        "Memory of the ranks",
        "Before training, dtrain plans the peak memory of each rank from shapes; during training "
        "it counts the same. Live activations are stored for the backward.",
    )
    for number, (name, run) in enumerate(runs):
        title = name if len(runs) > 1 else ""
        counted, planned = run.numbers("peak_memory_bytes"), _planned_memory(run)
        if not planned and not any(value is not None for value in counted):
            section.notes.append(note_text(runs, name, f"no memory; {absence_text(run)}."))
            continue
        shown = _fullest_ranks(planned, counted)
        figure = bar_charts.memory_chart(
            [f"rank {rank}" for rank in shown],
            [_without_total(_item(planned, rank) or {}) for rank in shown],
            [_item(counted, rank) for rank in shown],
            title,
        )
        caption = "Planned peak by part; the diamond is the counted peak."
        section.add_chart(str(number), figure, caption)
        table = _memory_table(name, run, planned, counted)
        folded = is_long(runs, table.rows)
        section.tables.append(dataclasses.replace(table, folded=folded))
        if len(shown) < max(len(planned), len(counted)):
            text = f"the {MAX_ROWS} ranks with most memory are drawn."
            section.notes.append(note_text(runs, name, text))
    return section


def _planned_memory(run: RunRecord) -> list[dict[str, int]]:
    """Return the planned bytes of each rank by part, those of its stage."""
    mesh = run.plan.mesh
    if mesh is None or mesh.ranks > 100_000 or not run.plan.memory:
        return []
    return [run.plan.memory.get(mesh.coords(rank)[1], {}) for rank in range(mesh.ranks)]


def _fullest_ranks(planned: Sequence[dict[str, int]], counted: Sequence[float | None]) -> list[int]:
    """Return the ranks with most memory, in their order."""

    def size(rank: int) -> float:
        total = (_item(planned, rank) or {}).get("total", 0)
        peak: float | None = _item(counted, rank)
        return max(peak or 0.0, total)

    ranks = range(max(len(planned), len(counted)))
    return sorted(sorted(ranks, key=size, reverse=True)[:MAX_ROWS])


def _item(values: Sequence[T], index: int) -> T | None:
    """Return an item of a list, None where the list is shorter."""
    return values[index] if index < len(values) else None


def _without_total(parts: dict[str, int]) -> dict[str, int]:
    return {part: size for part, size in parts.items() if part != "total"}


def _memory_table(
    name: str,
    run: RunRecord,
    planned: Sequence[dict[str, int]],
    counted: Sequence[float | None],
) -> TableView:
    resident, hosts, mesh = run.numbers("rss_bytes"), run.hosts, run.plan.mesh
    rows = []
    for rank in range(min(max(len(planned), len(counted)), 1024)):
        stage = UNKNOWN if mesh is None or rank >= mesh.ranks else str(mesh.coords(rank)[1])
        total = (_item(planned, rank) or {}).get("total")
        sizes = total, _item(counted, rank), _item(resident, rank)
        rows.append([str(rank), stage, _item(hosts, rank) or UNKNOWN, *map(bytes_text, sizes)])
    header = ["rank", "stage", "host", "planned peak", "counted peak", "resident"]
    note = (
        "Planned is the peak of the replica that needs most. Resident memory is that of the whole "
        "process, libraries included."
    )
    return TableView(f"Memory of {name}", header, rows, note=note, labels=3)
