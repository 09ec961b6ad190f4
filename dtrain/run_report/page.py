"""`dtrain report`: one self-contained HTML page about one or several runs.

Invariant: the page loads nothing and runs no script, and every text of a run folder is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, final

from dtrain.checkpoint.safe_files import as_count
from dtrain.errors import ConfigError
from dtrain.planning.formatting import pluralise
from dtrain.rank_process import writes_files
from dtrain.run_report.charts import missing_extra, require_matplotlib, save_figure
from dtrain.run_report.page_parts import Chart, Runs, Section
from dtrain.run_report.run_record import RunRecord, read_run_record
from dtrain.run_report.sections import make_sections, overview_charts
from dtrain.run_report.strategy_notes import strategy_note
from dtrain.run_report.texts import (
    STATUS_TITLES,
    UNKNOWN,
    absence_text,
    count_text,
    distinct_names,
    duration_text,
    hosts_text,
    length_text,
    metric_text,
    number_text,
    parameters_text,
    ranks_text,
)

TEMPLATE = "page.html.jinja"


@final
class Fact(NamedTuple):
    """A line of the first screen.

    Attributes
    ----------
    values, details : sequence of str
        One per run; a detail explains the value.
    explanation : str
        Meaning of the label.
    """

    label: str
    values: Sequence[str]
    explanation: str = ""
    details: Sequence[str] = ()


def report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path = "report.html",
    png: str | Path | None = None,
) -> Path:
    """Write a report on runs as one HTML page, which needs no network; in a script rank 0 alone
    writes it.

    Parameters
    ----------
    runs : path or sequence of path
        Run folders.
    out : path
        The page; an earlier one is replaced.
    png : path, optional
        A folder for the charts as PNG files.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ConfigError
        A folder is no run folder, the extra `report` is not installed, or a file cannot be written.
    """
    if not writes_files():
        return Path(out)
    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    require_matplotlib()
    records = [read_run_record(Path(folder)) for folder in folders]
    named = list(zip(distinct_names(records), records, strict=True))
    first_charts, sections = overview_charts(named), make_sections(named)
    text = _page_text(named, first_charts, sections)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "report.unwritable", f"cannot write {out}: {error.strerror}; choose another file"
        ) from error
    if png is not None:
        _write_charts(Path(png), [*first_charts, *_charts(sections)])
    return out


def _charts(sections: Sequence[Section]) -> Iterator[Chart]:
    for section in sections:
        yield from section.charts


def _write_charts(folder: Path, charts: Sequence[Chart]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "report.unwritable", f"cannot write {folder}: {error.strerror}; choose another folder"
        ) from error
    for chart in charts:
        save_figure(chart.figure, folder / f"{chart.name}.png")


def _page_text(runs: Runs, first_charts: Sequence[Chart], sections: Sequence[Section]) -> str:
    """Return the page."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise missing_extra("jinja2") from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [name for name, _ in runs]
    title = names[0] if len(runs) == 1 else f"{pluralise(len(runs), 'run')}: {', '.join(names)}"
    return environment.get_template(TEMPLATE).render(
        title=title,
        names=names,
        statuses=[(run.status, STATUS_TITLES[run.status]) for _, run in runs],
        sentences=[run_sentence(run) for _, run in runs],
        errors=[(name, run.status, run.error, run.error_key) for name, run in runs if run.error],
        tiles=_tiles(runs[0][1]) if len(runs) == 1 else [],
        results=_results(runs) if len(runs) > 1 else [],
        facts=_facts(runs),
        charts=first_charts,
        missing_chart=absence_text(runs[0][1]),
        sections=sections,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("dtrain"),
    )


def run_sentence(run: RunRecord) -> str:
    """Return in one sentence how a run went."""
    updates, total = run.count("updates"), run.plan.updates
    progress = f"{updates:,} of {total:,} updates" if total else pluralise(updates, "update")
    match run.status:
        case "finished":
            return f"The run finished: all {pluralise(updates, 'update')} are done.{_result(run)}"
        case "failed":
            return f"The run failed. Until its last record it had done {progress}."
        case "stopped":
            return f"The run was stopped after {progress}. The same command resumes it."
        case "running":
            return f"The run is going on: {progress} are done."
        case "lost":
            return (
                f"The process of the run ended after {progress}, without a record of the reason. "
                "See the log of the job; the same command resumes the run."
            )
    return "The folder does not say how the run went."


def _result(run: RunRecord) -> str:
    """Return the accuracy as a sentence, empty where there is none."""
    accuracy = run.metrics.get("accuracy")
    if accuracy is None:
        return ""
    return (
        f" The network gives the right answer for {metric_text('accuracy', accuracy)} of the test "
        "samples, which it was not trained on."
    )


def _tiles(run: RunRecord) -> list[tuple[str, str]]:
    """Return the main results of one run."""
    metrics = {f"test {name}": metric_text(name, v) for name, v in run.metrics.items()}
    tiles = [
        *[*metrics.items()][:3],
        ("test loss", number_text(run.number("test_loss"), 3)),
        ("total time", duration_text(run.number("wall_s") or None)),
        ("samples per second", count_text(run.number("samples_per_s") or None)),
    ]
    return [tile for tile in tiles if tile[1] != UNKNOWN]


def _results(runs: Runs) -> list[Fact]:
    """Return the main results of several runs."""
    records = [run for _, run in runs]
    names = dict.fromkeys(name for run in records for name in run.metrics)
    return [
        *(
            Fact(f"test {name}", [metric_text(name, run.metrics.get(name)) for run in records])
            for name in names
        ),
        Fact("test loss", [number_text(run.number("test_loss")) for run in records]),
        Fact("total time", [duration_text(run.number("wall_s") or None) for run in records]),
        Fact(
            "samples per second",
            [count_text(run.number("samples_per_s") or None) for run in records],
        ),
        Fact("length", [length_text(run) for run in records]),
    ]


def _facts(runs: Runs) -> list[Fact]:
    """Return what was trained, with the words explained."""
    records = [run for _, run in runs]

    def strategy(label: str, section: str, explanation: str) -> Fact:
        names = [run.strategy(section) or UNKNOWN for run in records]
        details = [strategy_note(section, name) for name in names]
        if section == "model":
            names = [_model_text(run) for run in records]
        elif section == "data":
            names = [_data_text(run) for run in records]
        return Fact(label, names, explanation, details)

    lengths = [] if len(runs) > 1 else [Fact("Length", [length_text(records[0])], _LENGTH)]
    return [
        strategy("Model", "model", "The network that is trained."),
        strategy("Data", "data", "The samples that it learns from."),
        *lengths,
        strategy("Objective", "objective", _OBJECTIVE),
        Fact("Ranks", [ranks_text(run) for run in records], _RANKS),
        strategy("Sync", "sync", "How replicas keep their weights together."),
        strategy("Schedule", "schedule", "The order in which stages compute."),
        Fact("Optimizer", [_optimizer_text(run) for run in records], _OPTIMIZER),
        Fact("Hosts", [hosts_text(run, 3) for run in records], "The computers with their ranks."),
    ]


_LENGTH = "In an update, all weights change once."
_OBJECTIVE = "The rule by which each part of the network changes."
_RANKS = (
    "A rank is one process. A replica is a copy of the network with a share of the samples; "
    "a stage is the part of a copy that one rank holds."
)
_OPTIMIZER = "The formula of the update; lr is its step size."


def _model_text(run: RunRecord) -> str:
    parameters = parameters_text(run)
    name = run.strategy("model") or UNKNOWN
    return f"{name}, {parameters}" if parameters else name


def _data_text(run: RunRecord) -> str:
    """Return the data set, with its number of samples where an epoch was recorded."""
    name = run.strategy("data") or UNKNOWN
    for record in run.records:
        samples = as_count(record.get("samples"))
        if samples and run.plan.updates_per_epoch == record.get("update"):
            return f"{name}, {samples:,} training samples"
    return name


def _optimizer_text(run: RunRecord) -> str:
    lr = run.setting("optimizer", "lr")
    name = run.strategy("optimizer") or UNKNOWN
    return f"{name}, lr {lr:g}" if isinstance(lr, int | float) else name
