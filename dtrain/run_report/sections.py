"""The sections of a report: charts, tables and sentences about one or several runs.

Invariant: pure functions of run records. A section explains each of its charts in one sentence, and
says in one sentence why a part is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dtrain.checkpoint.safe_files import Table, as_number, as_table, as_text
from dtrain.planning.formatting import pluralise
from dtrain.run_report import charts
from dtrain.run_report.page_parts import MAX_ROWS, Chart, Runs, Section, TableView, is_long
from dtrain.run_report.plan_file import DrawnAction
from dtrain.run_report.resource_sections import memory_section, traffic_section, waiting_section
from dtrain.run_report.run_record import RunRecord, differing_settings, flatten
from dtrain.run_report.texts import (
    UNKNOWN,
    absence_text,
    count_text,
    date_text,
    duration_text,
    hosts_text,
    metric_text,
    note_text,
    number_text,
    short_time_text,
)
from dtrain.run_report.timeline_chart import timeline_chart
from dtrain.run_report.trace_file import (
    MeasuredUpdate,
    read_measured_update,
    waiting_by_stage,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MIN_UNITS, MAX_UNITS = 16, 60
"""Length of a planned timeline, in units."""


def make_sections(runs: Runs) -> list[Section]:
    """Return all sections that follow the overview."""
    makers: list[Callable[[Runs], Section]] = [
        *(learning_section, timeline_section, waiting_section, traffic_section),
        *(memory_section, network_section, settings_section, environment_section),
    ]
    return [make(runs) for make in makers]


def overview_charts(runs: Runs) -> list[Chart]:
    """Return the charts of the first screen: training and test loss, and the first test metric."""
    several = len(runs) > 1
    curves: dict[str, charts.Points] = {}
    colours, dashes = [], []
    for number, (name, run) in enumerate(runs):
        for index, (kind, points) in enumerate(charts.loss_curves(run.history).items()):
            curves[f"{name}, {kind}" if several else kind] = points
            colours.append(charts.COLOURS[number % len(charts.COLOURS)])
            dashes.append(charts.DASHES[index % len(charts.DASHES)])
    if not several:
        colours = [charts.COLOURS[n % len(charts.COLOURS)] for n in range(len(curves))]
    figure = charts.curve_chart(curves, "loss", colours=colours, dashes=dashes)
    caption = (
        "The loss measures the error of the network, so lower is better. An epoch is one pass over "
        "all training samples; test samples are never trained on."
    )
    shown = [] if figure is None else [Chart("loss", figure, caption)]
    for metric in _metric_names(runs)[:1]:
        shown += [Chart("metric-0", *chart) for chart in _metric_chart(runs, metric)]
    return shown


def _metric_names(runs: Runs) -> list[str]:
    """Return the names of all test metrics."""
    entries = [entry for _, run in runs for entry in run.history]
    return list(dict.fromkeys(name for entry in entries for name in entry.get("metrics") or {}))


def _metric_chart(runs: Runs, metric: str) -> list[tuple[Figure, str]]:
    """Return the chart of a test metric and its sentence, empty where it has no value."""
    curves = {name: charts.metric_series(run.history, metric) for name, run in runs}
    is_percent = "accuracy" in metric
    label = f"test {charts.metric_label(metric)}"
    figure = charts.curve_chart(curves, label, percent=is_percent)
    if figure is None:
        return []
    text = f"Test {charts.short_name(metric)} over epochs"
    if metric == "accuracy":
        text += ": the share of test samples for which the network gives the right answer"
    return [(figure, f"{text}.")]


def learning_section(runs: Runs) -> Section:
    """Return losses and metrics over epochs, per run and per block."""
    section = Section(
        "learning",
        "Losses and metrics",
        "A block is a part of the network that is trained as one. Blocks with losses or "
        "predictions of their own are shown one by one.",
    )
    for number, metric in enumerate(_metric_names(runs)[1:], 1):
        for figure, caption in _metric_chart(runs, metric):
            section.add_chart(f"metric-{number}", figure, caption)
    for number, (name, run) in enumerate(runs):
        _add_block_charts(section, number, name if len(runs) > 1 else "", run)
    speeds = {name: charts.series(run.history, "samples_per_s") for name, run in runs}
    section.add_chart(
        "speed",
        charts.curve_chart(speeds, "samples per second", from_zero=True),
        "Training speed over epochs, without evaluation and checkpoints.",
    )
    for name, run in runs:
        if run.history:
            section.tables.append(_history_table(name, run))
        else:
            section.notes.append(note_text(runs, name, f"no losses yet; {absence_text(run)}."))
    return section


def _add_block_charts(section: Section, number: int, name: str, run: RunRecord) -> None:
    """Add a chart per value that blocks have: loss, accuracy, metrics of the objective."""
    values: list[tuple[str, str, list[Table]]] = [
        ("Training loss of each block.", "loss", _per_block(run, "train_loss_per_block")),
        (
            "Test accuracy of the prediction that each block makes alone.",
            "accuracy (%)",
            _per_block(run, "accuracy_per_block"),
        ),
    ]
    names = dict.fromkeys(m for entry in run.history for m in entry.get("block_metrics") or {})
    for metric in names:
        caption = f"{charts.short_name(metric)} of each block, as the objective reports it."
        values.append((caption, metric, _per_block(run, "block_metrics", metric)))
    for index, (caption, label, entries) in enumerate(values):
        blocks = max((len(entry["value"]) for entry in entries), default=0)
        curves = {f"block {b}": charts.series(entries, "value", b) for b in range(blocks)}
        curves = {block: points for block, points in curves.items() if points}
        if len(curves) > 1:
            figure = charts.curve_chart(
                curves,
                charts.short_name(label),
                percent=label == "accuracy (%)",
                colours=charts.block_colours(len(curves)),
                title=name,
            )
            section.add_chart(f"blocks-{number}-{index}", figure, caption)


def _per_block(run: RunRecord, key: str, metric: str | None = None) -> list[Table]:
    """Return epochs with the values of all blocks as `value`."""
    entries = []
    for entry in run.history:
        value = entry.get(key)
        value = value if metric is None else as_table(value).get(metric)
        entries.append({"epoch": entry["epoch"], "value": value or []})
    return entries


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
        update = read_measured_update(run.folder, max(run.count("replicas"), 1))
        if update is not None:
            figure = _measured_chart(title, update)
            section.add_chart(str(number), figure, _measured_caption(update.update, run), True)
            section.notes.append(note_text(runs, name, _measured_note(update)))
        elif timeline := _first_update(run.plan.timeline):
            unit = "units: a forward takes 1, a backward 2"
            figure = timeline_chart([(f"{title}planned", timeline)], unit)
            caption = "The first updates of an epoch, as the schedule plans them."
            section.add_chart(str(number), figure, caption, True)
            section.notes.append(note_text(runs, name, _NO_TRACE))
        else:
            text = f"no timeline; {absence_text(run)}."
            section.notes.append(note_text(runs, name, text))
        if run.count("stages") > MAX_ROWS:
            text = f"the first {MAX_ROWS} stages are shown."
            section.notes.append(note_text(runs, name, text))
    return section


_NO_TRACE = (
    "this run recorded no measured timeline. To record one, set trace = true in the run file and "
    "train again."
)


def _measured_chart(title: str, update: MeasuredUpdate) -> Figure:
    """Return the planned timeline above the measured one."""
    scale = 1e3 if update.measured_s < 1 else 1.0
    planned, measured = (_scaled(a, scale) for a in (update.planned, update.measured))
    panels = [(f"{title}planned", planned)] if planned else []
    panels.append((f"{title}measured", measured))
    return timeline_chart(panels, "ms" if scale > 1 else "s")


def _measured_caption(update: int, run: RunRecord) -> str:
    replica = " of the first replica" if run.count("replicas") > 1 else ""
    return (
        f"Update {update + 1:,}{replica}, an update of median length. In the plan each action "
        "takes its measured median time and messages take none, so the difference is waiting, "
        "messages and scatter."
    )


def _measured_note(update: MeasuredUpdate) -> str:
    """Return the lengths of an update, and the stage that waits most in it."""
    text = f"the update takes {short_time_text(update.measured_s)} measured"
    if update.planned_s:
        text += f", {short_time_text(update.planned_s)} planned"
    waits = waiting_by_stage(update.measured)
    if not waits:
        return f"{text}."
    stage = max(waits, key=lambda stage: waits[stage])
    return (
        f"{text}. Stage {stage} waits longest for messages and replicas: "
        f"{short_time_text(waits[stage])}."
    )


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
            header = list(dict.fromkeys(["block", "layers", *blocks[0]]))
            rows = [[block.get(column, "") for column in header] for block in blocks]
            title, folded = f"Blocks of {name}", is_long(runs, rows)
            section.tables.append(TableView(title, header, rows, folded, labels=2))
        else:
            section.notes.append(note_text(runs, name, f"no blocks; {absence_text(run)}."))
        notes = [f"note of the plan: {note}" for note in run.plan.notes]
        layers = run.start_record.get("layer_notes")
        texts = [as_text(note) for note in layers] if isinstance(layers, list) else []
        notes += [f"note on layers: {note}" for note in texts]
        section.notes += [note_text(runs, name, note) for note in notes]
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
            section.tables.append(
                TableView("Keys that differ", ["key", *names], rows, labels=1 + len(runs))
            )
        else:
            section.notes.append("The run files do not differ in any key.")
    tables = [flatten(run.settings) for run in records]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [[key, *(table.get(key, UNKNOWN) for table in tables)] for key in keys]
    if rows:
        section.tables.append(
            TableView("All keys", ["key", *names], rows, True, labels=1 + len(runs))
        )
    section.notes += [
        note_text(runs, name, f"no run file; {absence_text(run)}.")
        for name, run in runs
        if not run.settings
    ]
    return section


def environment_section(runs: Runs) -> Section:
    """Return place, time and software of each run."""
    section = Section(
        "environment",
        "Environment",
        "Place, time and software of the run. The digest is a fingerprint of the trained weights: "
        "equal digests mean equal weights, bit for bit.",
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
    section.tables.append(TableView("", ["", *names], rows, labels=1 + len(runs)))
    if len(runs) > 1:
        digests = {as_text(run.summary.get("digest")) for _, run in runs}
        if "" not in digests:
            equal = "are equal" if len(digests) == 1 else "differ"
            section.notes.append(
                f"The trained weights of the {pluralise(len(runs), 'run')} {equal}."
            )
    return section


def _time(run: RunRecord, index: int) -> float | None:
    return as_number(run.records[index].get("unix_s")) if run.records else None


def _seconds(run: RunRecord, key: str) -> float | None:
    """Return the sum of a time over all records."""
    values = [as_number(record.get(key)) for record in run.records]
    known = [value for value in values if value is not None]
    return sum(known) if known else None
