"""The sections of a report: charts, tables and sentences about one or several runs.

Invariant: pure functions of run records. A section explains each of its charts in one sentence, and
says in one sentence why a part is missing.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from dtrain.planning.formatting import percent, pluralise
from dtrain.run_report import charts
from dtrain.run_report.plan_file import DrawnAction
from dtrain.run_report.run_record import RunRecord, differing_settings, flatten
from dtrain.run_report.safe_files import as_number, as_text
from dtrain.run_report.texts import (
    UNKNOWN,
    absence_text,
    bytes_text,
    count_text,
    date_text,
    duration_text,
    hosts_text,
    metric_text,
    number_text,
    short_time_text,
)
from dtrain.run_report.trace_file import read_measured_update, waiting_by_stage
from dtrain.run_report.traffic import ALL, traffic_by_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_ROWS = 16
"""Stages or ranks that a chart shows."""


MIN_UNITS, MAX_UNITS = 16, 60
"""Length of a planned timeline, in units."""


@final
@dataclass(frozen=True)
class Chart:
    """A figure with its name, for a file, and the sentence that explains it."""

    name: str
    figure: Figure
    caption: str
    wide: bool = False

    @property
    def uri(self) -> str:
        """The figure as a data URI; an image runs no script."""
        data = base64.b64encode(charts.svg_text(self.figure).encode()).decode("ascii")
        return f"data:image/svg+xml;base64,{data}"


@final
@dataclass(frozen=True)
class TableView:
    """A table; a folded one shows its title only, until it is opened."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    note: str = ""


@final
@dataclass
class Section:
    """A part of the page.

    Attributes
    ----------
    intro : str
        Words and purpose of the section, in plain words.
    notes : list of str
        Sentences below the charts.
    """

    anchor: str
    title: str
    intro: str
    charts: list[Chart] = field(default_factory=list)
    tables: list[TableView] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_chart(self, name: str, figure: Figure | None, caption: str, wide: bool = False) -> None:
        """Add a chart, if there is one."""
        if figure is not None:
            self.charts.append(Chart(f"{self.anchor}-{name}", figure, caption, wide))


Runs = Sequence[tuple[str, RunRecord]]
"""Runs with their names."""


def make_sections(runs: Runs) -> list[Section]:
    """Return all sections that follow the overview."""
    makers: list[Callable[[Runs], Section]] = [
        *(learning_section, timeline_section, waiting_section, traffic_section),
        *(memory_section, network_section, settings_section, environment_section),
    ]
    return [make(runs) for make in makers]


def loss_chart(runs: Runs) -> Chart | None:
    """Return the chart of the first screen: training and test loss."""
    several = len(runs) > 1
    curves: dict[str, charts.Points] = {}
    colours, dashes = [], []
    for number, (name, run) in enumerate(runs):
        for kind, key in (("training", "train_loss"), ("test", "test_loss")):
            points = charts.series(run.history, key)
            if points:
                curves[f"{name}, {kind}" if several else kind] = points
                colours.append(charts.COLOURS[number % len(charts.COLOURS)])
                dashes.append(charts.DASHES[kind == "test"])
    if not several:
        colours = list(charts.COLOURS[: len(curves)])
    figure = charts.curve_chart(curves, "loss", colours=colours, dashes=dashes)
    caption = (
        "The loss measures the error of the network, so lower is better. An epoch is one pass over "
        "all training samples; test samples are never trained on."
    )
    return None if figure is None else Chart("loss", figure, caption)


def learning_section(runs: Runs) -> Section:
    """Return losses and metrics over epochs, per run and per block."""
    section = Section(
        "learning",
        "How it learned",
        "A block is a part of the network that is trained as one. Where blocks have losses or "
        "predictions of their own, they are shown one by one.",
    )
    names = dict.fromkeys(
        name for _, run in runs for entry in run.history for name in entry.get("metrics") or {}
    )
    for number, metric in enumerate(names):
        curves = {name: charts.metric_series(run.history, metric) for name, run in runs}
        is_percent = "accuracy" in metric
        figure = charts.curve_chart(
            curves, f"test {charts.metric_label(metric)}", percent=is_percent
        )
        text = "the share of test samples that are classified correctly" if is_percent else ""
        caption = f"Test {metric}: {text}." if text else f"Test {metric} over epochs."
        section.add_chart(f"metric-{number}", figure, caption)
    for number, (name, run) in enumerate(runs):
        _add_block_charts(section, number, name if len(runs) > 1 else "", run)
    speeds = {name: charts.series(run.history, "samples_per_s") for name, run in runs}
    section.add_chart(
        "speed",
        charts.curve_chart(speeds, "samples per second"),
        "Training speed over epochs, without evaluation and checkpoints.",
    )
    for name, run in runs:
        if run.history:
            section.tables.append(_history_table(name, run))
        else:
            section.notes.append(f"{name}: no losses yet; {absence_text(run)}.")
    return section


def _add_block_charts(section: Section, number: int, name: str, run: RunRecord) -> None:
    """Add a chart per value that blocks have: loss, accuracy, metrics of the objective."""
    history = run.history
    block_metrics = dict.fromkeys(m for entry in history for m in entry.get("block_metrics") or {})
    flat = [{**entry, **(entry.get("block_metrics") or {})} for entry in history]
    keys = {"train_loss_per_block": "loss", "accuracy_per_block": "accuracy (%)"}
    keys |= {metric: metric for metric in block_metrics}
    captions = {
        "train_loss_per_block": "Training loss of each block.",
        "accuracy_per_block": "Test accuracy of the prediction that each block makes alone.",
    }
    for key, label in keys.items():
        blocks = max((len(entry.get(key) or []) for entry in flat), default=0)
        curves = {f"block {block}": charts.series(flat, key, block) for block in range(blocks)}
        curves = {block: points for block, points in curves.items() if points}
        if len(curves) > 1:
            figure = charts.curve_chart(
                curves,
                label,
                percent=key == "accuracy_per_block",
                colours=charts.block_colours(len(curves)),
                title=name,
            )
            caption = captions.get(key, f"{key} of each block, as the objective reports it.")
            section.add_chart(f"blocks-{number}-{list(keys).index(key)}", figure, caption)


def _history_table(name: str, run: RunRecord) -> TableView:
    """Return all values over epochs."""
    history = run.history
    blocks = max(len(entry.get("train_loss_per_block") or []) for entry in history)
    metrics = list(dict.fromkeys(m for entry in history for m in entry.get("metrics") or {}))
    header = ["epoch", "update", "training loss"]
    header += [f"block {block}" for block in range(blocks)] if blocks > 1 else []
    header += ["test loss", *(f"test {metric}" for metric in metrics), "samples/s"]
    rows = []
    for entry in history:
        losses = entry.get("train_loss_per_block") or []
        row = [number_text(entry["epoch"]), count_text(entry["update"])]
        row.append(number_text(entry.get("train_loss")))
        if blocks > 1:
            row += [number_text(loss) for loss in losses] + [UNKNOWN] * (blocks - len(losses))
        row.append(number_text(entry.get("test_loss")))
        values = entry.get("metrics") or {}
        row += [metric_text(metric, values.get(metric)) for metric in metrics]
        rows.append([*row, count_text(entry.get("samples_per_s"))])
    return TableView(f"All values of {name}, epoch by epoch", header, rows, folded=True)


def timeline_section(runs: Runs) -> Section:
    """Return one update of each run, planned and measured."""
    section = Section(
        "timeline",
        "One update, planned and measured",
        "The samples of an update are split into micro-batches, which pass through the stages one "
        "after the other. In a forward a stage computes its output, in a backward the gradients, "
        "in the update it changes its weights. Each row is one stage, time runs to the right, and "
        "numbers count micro-batches. Grey is idle time.",
    )
    for number, (name, run) in enumerate(runs):
        title = f"{name}: " if len(runs) > 1 else ""
        measured = read_measured_update(run.folder, max(run.count("replicas"), 1))
        if measured is not None:
            scale = 1e3 if measured.measured_s < 1 else 1.0
            planned, drawn = (_scaled(a, scale) for a in (measured.planned, measured.measured))
            panels = [(f"{title}planned", planned)] if planned else []
            figure = charts.timeline_chart(
                [*panels, (f"{title}measured", drawn)], "ms" if scale > 1 else "s"
            )
            section.add_chart(str(number), figure, _measured_caption(measured.update, run), True)
            section.notes += list(_measured_notes(title, measured))
        elif timeline := _first_update(run.plan.timeline):
            figure = charts.timeline_chart(
                [(f"{title}planned", timeline)], "units: a forward takes 1, a backward 2"
            )
            section.add_chart(str(number), figure, "The first update as the schedule plans it.", True)
            section.notes.append(
                f"{title}the run recorded no measured timeline. To record one, set trace = true in "
                "the run file and train again."
            )
        else:
            section.notes.append(f"{title}no timeline; {absence_text(run)}.")
        if run.count("stages") > MAX_ROWS:
            section.notes.append(f"{title}the first {MAX_ROWS} stages are shown.")
    return section


def _measured_caption(update: int, run: RunRecord) -> str:
    replica = " of the first replica" if run.count("replicas") > 1 else ""
    return (
        f"Update {update + 1:,}{replica}, an update of median length. In the plan each action takes "
        "its measured median time and messages take none, so the difference is waiting, messages "
        "and scatter."
    )


def _measured_notes(title: str, measured: object) -> Iterator[str]:
    """Yield the lengths, and the stage that waits most."""
    from dtrain.run_report.trace_file import MeasuredUpdate

    assert isinstance(measured, MeasuredUpdate)
    lengths = f"{short_time_text(measured.measured_s)} measured"
    if measured.planned_s:
        lengths += f", {short_time_text(measured.planned_s)} planned"
    waits = waiting_by_stage(measured.measured)
    text = f"{title}the update takes {lengths}."
    if waits:
        stage = max(waits, key=lambda stage: waits[stage])
        text += (
            f" Stage {stage} waits longest inside its actions: {short_time_text(waits[stage])}."
        )
    yield text


def _scaled(actions: Sequence[DrawnAction], scale: float) -> list[DrawnAction]:
    return [
        action._replace(start=scale * action.start, end=scale * action.end)
        for action in actions
        if action.row < MAX_ROWS
    ]


def _first_update(timeline: Sequence[DrawnAction]) -> list[DrawnAction]:
    """Return the part of a planned timeline in which all stages do their first update."""
    first: dict[int, float] = {}
    for action in timeline:
        if action.kind == "U":
            first[action.row] = min(first.get(action.row, action.end), action.end)
    end = min(max([*first.values(), MIN_UNITS]), MAX_UNITS)
    return [
        action._replace(end=min(action.end, end))
        for action in timeline
        if action.row < MAX_ROWS and (action.start < end or action.end <= end)
    ]


def waiting_section(runs: Runs) -> Section:
    """Return the share of time in which stages compute."""
    section = Section(
        "waiting",
        "Computing and waiting",
        "A stage waits while it has no input yet, or while replicas average. The share in which it "
        "computes is its utilisation. The bubble is the waiting that the schedule alone causes.",
    )
    names, shares, rows = [], [], []
    for name, run in runs:
        values = run.numbers("utilisation")
        if not any(value is not None for value in values):
            section.notes.append(f"{name}: no utilisation; {absence_text(run)}.")
        for stage, share in enumerate(values):
            label = f"{name}, stage {stage}" if len(runs) > 1 else f"stage {stage}"
            if share is not None:
                names.append(f"{charts.short_name(name, 14)}, {stage}" if len(runs) > 1 else label)
                shares.append(min(max(share, 0.0), 1.0))
                rows.append(_stage_row(label, run, stage, share))
        if run.plan.bubble is not None:
            section.notes.append(
                f"{name}: by its schedule ({run.strategy('schedule') or 'unnamed'}) stages wait "
                f"{percent(run.plan.bubble)} of the time, if a backward takes twice as long as a "
                "forward and all stages are equally costly."
            )
    if shares:
        section.add_chart(
            "stages",
            charts.utilisation_chart(names[:MAX_ROWS], shares[:MAX_ROWS]),
            "Share of the training time in which each stage computed, averaged over the run.",
        )
        header = ["stage", "computing", "waiting", "live micro-batches", "staleness (updates)"]
        note = (
            "Live micro-batches are stored between their forward and their backward. Staleness is "
            "the number of updates by which a gradient is late."
        )
        section.tables.append(TableView("Stages", header, rows, len(rows) > MAX_ROWS, note))
    return section


def _stage_row(label: str, run: RunRecord, stage: int, share: float) -> list[str]:
    row = [label, percent(share), percent(1 - share)]
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
            section.notes.append(f"{name}: no bytes; {reason}.")
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
            charts.traffic_chart(shown[: MAX_ROWS // 2]),
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
        section.tables.append(TableView("Bytes by kind", header, rows, note=note))
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
        ranks = max(len(counted), len(planned))
        if not planned and not any(value is not None for value in counted):
            section.notes.append(f"{name}: no memory; {absence_text(run)}.")
            continue
        shown = range(min(ranks, MAX_ROWS))
        figure = charts.memory_chart(
            [f"rank {rank}" for rank in shown],
            [_without_total(planned[rank]) if rank < len(planned) else {} for rank in shown],
            [counted[rank] if rank < len(counted) else None for rank in shown],
            title,
        )
        caption = "Planned peak by part; the diamond is the counted peak."
        section.add_chart(str(number), figure, caption)
        section.tables.append(_memory_table(name, run, planned, counted))
        if ranks > MAX_ROWS:
            section.notes.append(f"{name}: the first {MAX_ROWS} of {ranks:,} ranks are drawn.")
    return section


def _planned_memory(run: RunRecord) -> list[dict[str, int]]:
    """Return the planned bytes of each rank by part, those of its stage."""
    mesh = run.plan.mesh
    if mesh is None or mesh.ranks > 100_000 or not run.plan.memory:
        return []
    return [run.plan.memory.get(mesh.coords(rank)[1], {}) for rank in range(mesh.ranks)]


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
        total = planned[rank].get("total") if rank < len(planned) else None
        row = [str(rank), stage, hosts[rank] if rank < len(hosts) else UNKNOWN, bytes_text(total)]
        row.append(bytes_text(counted[rank]) if rank < len(counted) else UNKNOWN)
        rows.append([*row, bytes_text(resident[rank]) if rank < len(resident) else UNKNOWN])
    header = ["rank", "stage", "host", "planned peak", "counted peak", "resident"]
    note = (
        "Planned is the peak of the replica that needs most. Resident memory is that of the whole "
        "process, libraries included."
    )
    return TableView(f"Memory of {name}", header, rows, len(rows) > 8, note)


def network_section(runs: Runs) -> Section:
    """Return the blocks of the network, and the notes of the plan."""
    section = Section(
        "network",
        "The network and its blocks",
        "A layer is the smallest part that can be cut off. Layers form blocks, and stages hold "
        "blocks. A multiply-add is one multiplication with one addition, the usual measure of "
        "computing work. A local head is an extra output layer for the own loss of a block.",
    )
    for name, run in runs:
        blocks = run.plan.blocks
        if blocks:
            header = [*blocks[0]]
            rows = [[block.get(column, "") for column in header] for block in blocks]
            section.tables.append(TableView(f"Blocks of {name}", header, rows, len(blocks) > 12))
        else:
            section.notes.append(f"{name}: no blocks; {absence_text(run)}.")
        section.notes += [f"{name}, a note of the plan: {note}" for note in run.plan.notes]
        layers = run.start_record.get("layer_notes")
        texts = [as_text(note) for note in layers] if isinstance(layers, list) else []
        section.notes += [f"{name}, a note on layers: {note}" for note in texts]
    return section


def settings_section(runs: Runs) -> Section:
    """Return the keys of the run files that differ, and all keys."""
    section = Section(
        "settings",
        "Settings",
        "The run file describes a run. Keys are written section.key, with the defaults filled in.",
    )
    records = [run for _, run in runs]
    names = [name for name, _ in runs]
    if len(runs) > 1:
        differences = differing_settings(records)
        if differences:
            rows = [[key, *values] for key, values in differences.items()]
            section.tables.append(TableView("Keys that differ", ["key", *names], rows))
        else:
            section.notes.append("The run files do not differ in any key.")
    tables = [flatten(run.settings) for run in records]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [[key, *(table.get(key, UNKNOWN) for table in tables)] for key in keys]
    if rows:
        section.tables.append(TableView("All keys", ["key", *names], rows, folded=True))
    section.notes += [f"{name}: no run file; {absence_text(r)}." for name, r in runs if not r.settings]
    return section


def environment_section(runs: Runs) -> Section:
    """Return where, when and with which software each run was made."""
    section = Section(
        "environment",
        "Environment",
        "Where, when and with which software the run was made. The digest is a fingerprint of the "
        "trained weights: equal digests mean equal weights, bit for bit.",
    )
    facts: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("folder", lambda run: as_text(str(run.folder))),
        ("started", lambda run: date_text(_time(run, 0))),
        ("last record", lambda run: date_text(_time(run, -1))),
        ("starts (first and resumed)", lambda run: count_text(run.number("attempts"))),
        ("hosts", hosts_text),
        ("Slurm job", lambda run: as_text(run.start_record.get("job")) or "none"),
        ("software", lambda run: as_text(run.start_record.get("versions")) or UNKNOWN),
        ("device", lambda run: as_text(run.setting("device")) or UNKNOWN),
        ("number type", lambda run: as_text(run.setting("dtype")) or UNKNOWN),
        ("time in evaluations", lambda run: duration_text(_seconds(run, "eval_s"))),
        ("time in checkpoints", lambda run: duration_text(_seconds(run, "save_s"))),
        ("digest", lambda run: as_text(run.summary.get("digest")) or UNKNOWN),
    ]
    rows = [[label, *(fact(run) for _, run in runs)] for label, fact in facts]
    names = [name for name, _ in runs]
    section.tables.append(TableView("", ["", *names], rows))
    if len(runs) > 1:
        digests = {as_text(run.summary.get("digest")) for _, run in runs}
        if "" not in digests:
            equal = "are equal" if len(digests) == 1 else "differ"
            section.notes.append(f"The trained weights of the {pluralise(len(runs), 'run')} {equal}.")
    return section


def _time(run: RunRecord, index: int) -> float | None:
    return as_number(run.records[index].get("unix_s")) if run.records else None


def _seconds(run: RunRecord, key: str) -> float | None:
    """Return the sum of a time over all records."""
    values = [as_number(record.get(key)) for record in run.records]
    known = [value for value in values if value is not None]
    return sum(known) if known else None
