"""Reports, status and comparison of runs, on recorded and on hostile run folders.

Invariant: `tests/pages/run_folders` holds the files of two real runs: `pipeline` (backpropagation
on two stages, with the trace of its last epoch) and `local` (a local objective on two replicas of
two stages). No test trains.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from dtrain import cli
from dtrain.checkpoint import ownership
from dtrain.errors import ConfigError
from dtrain.objectives import OBJECTIVES
from dtrain.planning.plan import Plan, make_plan
from dtrain.planning.report import plan_table, plan_text
from dtrain.run_report import charts, strategy_notes
from dtrain.run_report import page as page_module
from dtrain.run_report.compare import compare_runs, comparison_text
from dtrain.run_report.page import report
from dtrain.run_report.plan_file import parse_plan
from dtrain.run_report.run_record import make_history, read_run_record
from dtrain.run_report.run_table import is_higher_better, read_run_table, write_run_table
from dtrain.run_report.sections import make_sections
from dtrain.run_report.status import run_status, status_text
from dtrain.run_report.trace_file import read_measured_update
from dtrain.run_report.traffic import ALL, AVERAGES, traffic_by_kind
from dtrain.schedules import SCHEDULES
from dtrain.syncs import SYNCS
from dtrain.tasks.metrics import METRICS
from tests import tiny
from tests.conftest import ROOT
from tests.docs_reader import python_blocks
from tests.refusals import refuses

RECORDED = Path(__file__).parent / "run_folders"
FILES = ("summary.json", "metrics.jsonl", "run.toml", "plan.txt", "trace.json")
ANCHORS = (
    *("learning", "timeline", "waiting", "traffic", "memory", "network", "settings"),
    "environment",
)
SCRIPT = "<script>alert(1)</script>"
ATTACK = f'"><img src=x onerror=alert(1)>{SCRIPT}{{{{ 7 * 7 }}}}$\\frac{{1}}$_\x1b[31m'


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A copy of the recorded run on a pipeline."""
    return Path(shutil.copytree(RECORDED / "pipeline", tmp_path / "pipeline"))


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A copy of the recorded run with a local objective."""
    return Path(shutil.copytree(RECORDED / "local", tmp_path / "local"))


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make figures, but do not write them as files, which takes most of the time."""
    monkeypatch.setattr(charts, "svg_text", lambda figure: "<svg/>")
    monkeypatch.setattr(page_module, "save_figure", lambda figure, path: path.touch())


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """All text."""
        return " ".join(self.words)

    def values(self, name: str) -> list[str]:
        """Return the values of an attribute."""
        return [value for key, value in self.attributes if key == name]


def edit(folder: Path, **values: Any) -> None:
    """Change keys of the summary of a run."""
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_records(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change every record of a run."""
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_everything(folder: Path, page: Path) -> Page:
    """Return the report on a run; read its status and compare it, too."""
    json.dumps(run_status(folder))
    json.dumps(compare_runs(folder, RECORDED / "local"))
    assert "\x1b" not in status_text(folder) + comparison_text(folder, folder)
    return Page(report(folder, page))


# ---- the page


def test_a_page_needs_no_network_and_its_charts_are_pictures(
    pipeline: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Page(report(pipeline, tmp_path / "one.html", tmp_path / "png"))
    monkeypatch.setattr(charts, "svg_text", lambda figure: "<svg/>")
    two = Page(report([pipeline, local], tmp_path / "two.html"))
    for page in (one, two):
        assert set(page.values("id")) == set(ANCHORS)
        assert {"script", "link", "iframe", "object", "base"}.isdisjoint(page.tags)
        assert all(value.startswith("#") for value in page.values("href"))
        assert all(value.startswith("data:image/svg+xml;base64,") for value in page.values("src"))
        for source in page.values("src"):
            ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))
        assert page.tags.count("img") == page.tags.count("figcaption") > 5
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert len(names) == one.tags.count("img")
    assert all((tmp_path / "png" / n).read_bytes().startswith(b"\x89PNG") for n in names)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (pipeline, local)]
    for summary in summaries:
        assert f"{100 * summary['test_accuracy']:.1f} %" in two.text
        assert summary["digest"] in two.text


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("missing", [*FILES, FILES[1:]])
def test_a_missing_file_leaves_every_section_in_place(
    missing: str | tuple[str, ...], pipeline: Path, tmp_path: Path
) -> None:
    """The run file stands in the records, too."""
    full = Page(report(pipeline, tmp_path / "page.html"))
    for name in (missing,) if isinstance(missing, str) else missing:
        (pipeline / name).unlink()
    status_text(pipeline)
    page = Page(report(pipeline, tmp_path / "page.html"))
    assert set(page.values("id")) == set(ANCHORS)
    assert page.tags.count("img") <= full.tags.count("img")
    assert (page.tags == full.tags) == (missing in ("run.toml", "trace.json"))


@pytest.mark.usefixtures("no_drawing")
def test_a_failed_run_shows_its_error(pipeline: Path, tmp_path: Path) -> None:
    edit(pipeline, status="failed", error="NumericalError: the loss is nan", error_key="a.key")
    page = Page(report(pipeline, tmp_path / "page.html"))
    assert "NumericalError: the loss is nan" in page.text
    assert "a.key" in page.text
    assert "failed" in " ".join(page.values("class"))
    state = run_status(pipeline)
    assert (state["status"], state["error_key"]) == ("failed", "a.key")
    assert "NumericalError: the loss is nan [a.key]" in status_text(pipeline)


def test_equal_runs_give_equal_charts_in_the_style_of_the_page_alone(pipeline: Path) -> None:
    runs = [("run", read_run_record(pipeline))]
    before = dict(mpl.rcParams)
    drawings = []
    for style in ({"lines.linewidth": 9.0, "font.size": 30.0}, {}):
        with mpl.rc_context(style):
            sections = make_sections(runs)
            drawings.append([charts.svg_text(c.figure) for s in sections[1:3] for c in s.charts])
    assert drawings[0] == drawings[1]
    assert dict(mpl.rcParams) == before


# ---- hostile folders


def poison(value: Any) -> Any:
    """Replace every text of a value by markup, keys included."""
    if isinstance(value, dict):
        return {f"{key}{ATTACK}": poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return ATTACK if isinstance(value, str) else value


def poison_values(value: Any) -> Any:
    """Replace every text of a value by markup, but keep the keys."""
    if isinstance(value, dict):
        return {key: poison_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poison_values(item) for item in value]
    return ATTACK if isinstance(value, str) else value


def swap_types(value: Any) -> Any:
    """Replace every value by one of another type."""
    if isinstance(value, dict):
        return {key: swap_types(item) for key, item in value.items()}
    if isinstance(value, list):
        return {"list": ATTACK}
    return [value, None, 10**400, -1e308, True] if isinstance(value, int | float) else 7


def rewrite(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change all JSON files of a run, but leave kinds and positions of records."""
    for name in ("summary.json", "trace.json"):
        value = json.loads((folder / name).read_text())
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(change(item)) for item in value) + "\n]\n"
        else:
            text = json.dumps(change(value))
        (folder / name).write_text(text)

    def change_record(record: dict[str, Any]) -> None:
        kept = {key: record[key] for key in ("kind", "update", "attempt", "time_s")}
        changed = change(record) | kept
        record.clear()
        record.update(changed)

    edit_records(folder, change_record)


def truncate(folder: Path) -> None:
    """Cut all files in half."""
    for name in FILES:
        text = (folder / name).read_bytes()
        (folder / name).write_bytes(text[: len(text) // 2])


def nest(folder: Path) -> None:
    """Write files that are nested too deeply, and huge numbers."""
    for name in FILES:
        (folder / name).write_text("[" * 100_000)
    (folder / "metrics.jsonl").write_text('{"kind": "train", "update": 1e999, "loss": [NaN]}\n')
    (folder / "plan.txt").write_text("9,999,999 ranks = 9,999,999 replicas x 1 stage, here\n" * 9)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "keys": lambda folder: rewrite(folder, poison),
    "values": lambda folder: rewrite(folder, poison_values),
    "types": lambda folder: rewrite(folder, swap_types),
    "truncated": truncate,
    "nested": nest,
    "plan": lambda folder: _poison_text(folder),
    "binary": lambda folder: [(folder / n).write_bytes(bytes(range(256))) for n in FILES] and None,
}


def _poison_text(folder: Path) -> None:
    """Put markup into the plan and the run file."""
    plan = (folder / "plan.txt").read_text()
    plan = (
        plan.replace("fc1", ATTACK).replace("activation ", f"{SCRIPT}  ") + f"\nNotes\n{ATTACK}\n"
    )
    (folder / "plan.txt").write_text(plan)
    settings = (folder / "run.toml").read_text().replace('"digits"', json.dumps(SCRIPT))
    (folder / "run.toml").write_text(f'"{SCRIPT}" = 1\n{settings}')


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("kind", HOSTILE)
def test_no_text_of_a_folder_becomes_markup(kind: str, pipeline: Path, tmp_path: Path) -> None:
    HOSTILE[kind](pipeline)
    folder = pipeline.rename(tmp_path / "<script>alert(2)<")
    page = read_everything(folder, tmp_path / "page.html")
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:image/svg+xml;base64,") for value in page.values("src"))
    assert "<script>alert(2)<" in page.text
    if kind in ("values", "plan"):
        assert SCRIPT in page.text  # it is there, as text
        assert kind == "plan" or "{{ 7 * 7 }}" in page.text


def test_a_hostile_name_can_be_drawn(pipeline: Path, tmp_path: Path) -> None:
    rewrite(pipeline, poison_values)
    huge = {"loss": [1e308, -1e308], "test_loss": -1e308, "metrics": {"a": 1e-300}}
    edit_records(pipeline, lambda record: record.update(huge))
    edit(pipeline, peak_memory_bytes=[1e308, 5e-324], utilisation=[-1e308, 7])
    folder = pipeline.rename(tmp_path / "_$<script>$\\frac{")
    page = Page(report([folder, RECORDED / "local"], tmp_path / "page.html"))
    for source in page.values("src"):
        svg = base64.b64decode(source.partition(",")[2])
        assert not [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("script")]


@pytest.mark.usefixtures("no_drawing")
def test_nothing_outside_of_the_folder_is_read(pipeline: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(pipeline, outside / "run")
    edit(outside / "run", error="SECRET", status="failed", digest="SECRET")
    edit_records(outside / "run", lambda record: record.update(versions="SECRET"))
    (outside / "run" / "plan.txt").write_text("Notes\nSECRET\n")
    checkpoint = outside / "checkpoints" / "update-00000077"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    for name in FILES[:-1]:
        (pipeline / name).unlink()
        (pipeline / name).symlink_to(outside / "run" / name)
    (pipeline / "checkpoints").symlink_to(outside / "checkpoints")
    (pipeline / "owner.json").symlink_to("owner.json")
    (pipeline / "trace.json").unlink()
    os.mkfifo(pipeline / "trace.json")  # a reader would wait for its writer
    page = read_everything(pipeline, tmp_path / "page.html")
    assert "SECRET" not in page.text
    state = run_status(pipeline)
    assert (state["status"], state["checkpoint"], state["update"]) == ("unknown", None, 0)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").touch()  # a run file is not yet a run
    for read in (run_status, report, lambda folder: compare_runs(folder, folder)):
        with pytest.raises(ConfigError) as caught:
            read(tmp_path)
        assert caught.value.key == "report.no-run"


# ---- the facts of a run


PLANS = [("backprop", "1f1b"), ("backprop", "fill-drain"), ("mono-forward", "stream")]


def plan(objective: str, schedule: str, ranks: int) -> Plan:
    """Return a plan with a block on each stage, and several replicas if there are more ranks."""
    run = tiny.run(objective={"name": objective}, schedule={"name": schedule}, mesh={"stages": 3})
    return make_plan(run, ranks)


@pytest.mark.parametrize(("objective", "schedule"), PLANS)
def test_a_plan_is_read_as_it_was_written(objective: str, schedule: str) -> None:
    made = plan(objective, schedule, 6)
    table, parsed = plan_table(made), parse_plan(plan_text(made))
    assert parsed.mesh == made.layout.mesh
    assert parsed.updates == table["updates"]
    assert parsed.updates_per_epoch == table["updates_per_epoch"]
    assert parsed.rows_per_micro_batch == table["rows_per_micro"]
    assert parsed.bubble == pytest.approx(table["bubble"], abs=6e-4)
    assert [block["layers"] for block in parsed.blocks] == [
        " ".join(block["layers"]) for block in table["blocks"]
    ]
    assert [(m.route, m.source_stage, m.target_stage, m.size) for m in parsed.messages] == [
        (m["route"], m["from_stage"], m["to_stage"], m["bytes"]) for m in table["messages"]
    ]
    peaks = {stage: parts["total"] for stage, parts in parsed.memory.items()}
    assert peaks == {
        stage: max(r["peak_bytes"] for r in table["memory"] if r["stage"] == stage)
        for stage in range(3)
    }


@pytest.mark.parametrize(("objective", "schedule"), PLANS)
def test_a_drawn_timeline_has_the_actions_of_the_plan(objective: str, schedule: str) -> None:
    made = plan(objective, schedule, 3)
    drawn = parse_plan(plan_text(made)).timeline
    end = min(max(a.end for a in drawn if a.row == stage) for stage in range(3)) - 2
    kinds = {"F": "F", "B": "B", "U": "U"}
    expected = {
        (span.stage, span.start, span.end, kinds[span.action.kind])
        for span in made.proof.timeline
        if span.end <= end
    }
    found = {(a.row, a.start, a.end, a.kind) for a in drawn if a.end <= end}
    assert found == expected != set()


def test_the_measured_update_is_one_of_the_trace() -> None:
    folder = RECORDED / "pipeline"
    measured = read_measured_update(folder, 1)
    assert measured is not None
    events = [e for e in json.loads((folder / "trace.json").read_text()) if e["ph"] == "X"]
    own = [e for e in events if e["args"].get("update") == measured.update]
    begin, end = min(e["ts"] for e in own), max(e["ts"] + e["dur"] for e in own)
    assert measured.measured_s == pytest.approx((end - begin) / 1e6)
    stages = [[a for a in measured.measured if a.row == s and a.kind != "wait"] for s in (0, 1)]
    for actions in stages:
        assert {"F", "B", "U"} == {action.kind for action in actions}
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(actions))
    assert all(0 <= a.start <= a.end <= measured.measured_s + 1e-9 for a in measured.measured)
    kinds = [action.kind for action in measured.planned]
    assert (kinds.count("F"), kinds.count("B"), kinds.count("U")) == (8, 8, 2)
    assert read_measured_update(RECORDED / "local", 2) is None


def test_the_kinds_of_traffic_add_up_to_the_counted_bytes(local: Path) -> None:
    """Two hosts with a replica each: activations stay inside, averages do not."""
    edit_records(local, lambda r: r.get("hosts") and r.update(hosts=["a", "a", "b", "b"]))
    summary = read_run_record(local).summary
    total = summary["bytes_intra_node"]
    activations = sum(m.size for m in read_run_record(local).plan.messages) * summary["samples"]
    activations //= read_run_record(local).plan.rows_per_micro_batch
    edit(local, bytes_intra_node=activations, bytes_inter_node=total - activations)
    assert set(traffic_by_kind(read_run_record(local))) == {
        ("activation", activations, 0),
        (AVERAGES, 0, total - activations),
    }
    edit_records(local, lambda r: r.get("hosts") and r.update(nodes=[0, 1, 0, 1]))
    assert [kind.kind for kind in traffic_by_kind(read_run_record(local))] == [ALL]
    (local / "plan.txt").unlink()
    assert traffic_by_kind(read_run_record(local)) == [(ALL, activations, total - activations)]


def test_a_later_attempt_replaces_the_history_from_where_it_resumed() -> None:
    """The first attempt did updates 1 to 4; the second resumed after 2 and did one so far."""

    def records(attempt: int, updates: range) -> Iterator[dict[str, Any]]:
        yield {"kind": "run", "update": updates[0] - 1}
        for update in updates:
            yield {"kind": "train", "update": update, "loss": [attempt, None], "goodness": [0.5, 1]}
            yield {"kind": "eval", "update": update, "test_loss": 0.1, "metrics": {"r2": update}}

    history = make_history([*records(1, range(1, 5)), *records(2, range(3, 4))], 2)
    assert [entry["train_loss_per_block"][0] for entry in history] == [1, 1, 2]
    assert [entry["epoch"] for entry in history] == [0.5, 1, 1.5]
    assert history[-1]["metrics"] == {"r2": 3}
    assert history[-1]["block_metrics"] == {"goodness": [0.5, 1]}


def test_every_strategy_has_a_sentence() -> None:
    assert strategy_notes.OBJECTIVES.keys() == OBJECTIVES.keys()
    assert strategy_notes.SCHEDULES.keys() == SCHEDULES.keys()
    assert strategy_notes.SYNCS.keys() == SYNCS.keys()


# ---- status


def test_a_running_run_tells_its_pace_and_its_end(pipeline: Path) -> None:
    edit(pipeline, status="running")
    lines = (pipeline / "metrics.jsonl").read_text().splitlines(keepends=True)
    first_epoch = [line for line in lines if json.loads(line)["update"] <= 3]
    (pipeline / "metrics.jsonl").write_text("".join(first_epoch) + '{"kind": "train", "upd')
    last = json.loads(first_epoch[-1])
    seconds = last["time_s"] - json.loads(first_epoch[0])["time_s"]
    checkpoint = pipeline / "checkpoints" / "update-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    os.utime(checkpoint / "manifest.json", (last["unix_s"] - 5,) * 2)
    (pipeline / "checkpoints" / "update-00000006.part").mkdir()

    owner = ownership.acquire(pipeline)
    state = run_status(pipeline, last["unix_s"] + seconds / 4)
    assert (state["status"], state["update"], state["updates"]) == ("running", 3, 6)
    assert (state["epoch"], state["epochs"]) == (1, 2)
    assert state["updates_per_s"] == pytest.approx(3 / seconds)
    assert state["left_s"] == pytest.approx(0.75 * seconds, abs=1e-5)
    assert state["checkpoint"]["update"] == 3
    assert state["checkpoint"]["age_s"] == pytest.approx(5 + seconds / 4, abs=1e-3)
    assert state["slowest"]["rank"] in (0, 1)
    assert str(owner["process"]) in status_text(pipeline)

    text = json.dumps(owner | {"since": "0"})
    (pipeline / "owner.json").write_text(text)  # of a process that has ended
    state = run_status(pipeline)
    assert (state["status"], state["left_s"]) == ("lost", None)


def test_status_and_compare_load_neither_torch_nor_mpi() -> None:
    folder = RECORDED / "pipeline"
    code = (
        "import sys; from dtrain.cli import main\n"
        f"main(['status', {str(folder)!r}]); main(['compare', {str(folder)!r}, {str(folder)!r}])\n"
        "print([name for name in ('torch', 'mpi4py', 'numpy', 'h5py') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


# ---- several runs in one table


def test_the_best_of_several_runs_comes_first_and_none_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failed and waiting runs have rows; a folder that was set aside has none."""
    sweep, accuracies = tmp_path / "sweep", {"a": 0.7, "b": 0.9, "b.old-1": 1.0}
    for name, accuracy in accuracies.items():
        shutil.copytree(RECORDED / "local", sweep / name)
        edit(sweep / name, metrics={"accuracy": accuracy}, test_loss=accuracy)
    (sweep / "seed=3").mkdir()
    (sweep / "broken").mkdir()
    (sweep / "broken" / "summary.json").write_text(
        '{"status": "failed", "error_key": "data.missing"}'
    )
    assert cli.main(["compare", str(sweep), "--csv", str(sweep / "t.csv")]) == 0
    printed = capsys.readouterr().out
    lines = (sweep / "t.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["run", "b", "a", "broken", "seed=3"]
    assert [line.split(",")[1] for line in lines[3:]] == ["failed", "not started"]
    assert "data.missing" in lines[3]
    assert "data.missing" in printed
    rows = {name: printed.index(f"\n{name} ") for name in ("b", "a", "broken", "seed=3")}
    assert sorted(rows, key=lambda name: rows[name]) == [*rows]
    assert cli.main(["compare", str(sweep), "--sort", "test_loss", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in table[:2]] == ["a", "b"]
    pair = [str(sweep / "a"), str(RECORDED / "pipeline")]
    assert cli.main(["compare", *pair, str(sweep / "b"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {row["settings"]["objective.name"] for row in table} == {"backprop", "mono-forward"}
    with refuses(ConfigError, "compare.unknown-value"):
        read_run_table([sweep], "accuracy")
    with refuses(ConfigError, "compare.unwritable"):
        write_run_table([sweep], sweep / "absent" / "t.csv")


def test_the_direction_of_a_metric_is_that_of_the_task() -> None:
    for name, metric in METRICS.items():
        assert is_higher_better(f"test_{name}") == metric().higher_is_better, name
    assert not is_higher_better("validation_loss")


# ---- compare


def test_compare_lists_what_differs(pipeline: Path, local: Path) -> None:
    result = compare_runs(pipeline, local)
    assert result["settings"]["objective.name"] == ["backprop", "mono-forward"]
    assert "seed" not in result["settings"]
    assert result["digest_equal"] is False
    losses = [json.loads((f / "summary.json").read_text())["test_loss"] for f in (pipeline, local)]
    assert result["results"]["test_loss"] == {"values": losses, "ratio": losses[1] / losses[0]}
    assert "metrics.accuracy" in result["results"]
    same = compare_runs(pipeline, pipeline)
    assert (same["settings"], same["digest_equal"]) == ({}, True)
    assert {pair["ratio"] for pair in same["results"].values()} <= {1.0, None}
    edit(local, digest=None)
    assert compare_runs(pipeline, local)["digest_equal"] is None


# ---- commands and functions


def run_cli(*argv: object) -> int:
    """Run a command in this process."""
    return cli.main([str(argument) for argument in argv])


@pytest.mark.usefixtures("no_drawing")
def test_the_command_writes_the_page_that_it_names(
    pipeline: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("report", pipeline, local, "sub/out.html") == 0
    assert run_cli("report", pipeline) == 0
    assert (tmp_path / "sub" / "out.html").exists()
    assert (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("no_drawing")
def test_the_commands_and_the_code_of_the_docs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, source in (("demo", "local"), ("a", "pipeline"), ("b", "local")):
        shutil.copytree(RECORDED / source, tmp_path / "runs" / name)
    docs = ROOT / "docs" / "reports.md"
    commands = re.findall(r"^dtrain ([^#\n]*)", docs.read_text(encoding="utf-8"), re.MULTILINE)
    assert {command.split()[0] for command in commands} == {"status", "compare", "report"}
    for command in commands:
        assert run_cli(*command.split()) == 0, command
    assert capsys.readouterr().err == ""
    [code] = python_blocks(docs)
    exec(compile(code, str(docs), "exec"), {})
    assert {"report.html", "out.html", "a.html", "charts"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["report", "out.html"], "report.no-folder"),
        (["report", "{run}", "{run}/summary.json/out.html"], "report.unwritable"),
        (["report", "{run}", "out.html", "--png", "{run}/summary.json"], "report.unwritable"),
        (["status", "{run}/none"], "report.no-run"),
    ],
)
@pytest.mark.usefixtures("no_drawing")
def test_wrong_arguments_are_refused(
    argv: list[str],
    key: str,
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(*(argument.format(run=pipeline) for argument in argv)) == ConfigError.code
    assert f"[{key}]" in capsys.readouterr().err


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_the_extra(
    package: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        report(pipeline, tmp_path / "page.html")
    assert caught.value.key == "report.extra-missing"
    assert "dtrain[report]" in str(caught.value)
    assert package in str(caught.value)
    assert not (tmp_path / "page.html").exists()


def test_a_history_is_drawn_into_a_file(pipeline: Path, tmp_path: Path) -> None:
    history = read_run_record(pipeline).history
    charts.plot_history(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    charts.plot_history([{"train_loss": 1.0}, {"train_loss": 0.5}], tmp_path / "loss.svg")
    ElementTree.parse(tmp_path / "loss.svg")
    for name in ("none/loss.png", "loss.what"):
        with pytest.raises(ConfigError) as caught:
            charts.plot_history(history, tmp_path / name)
        assert caught.value.key == "plot.unwritable"


def test_losses_of_blocks_are_drawn_and_a_metric_cannot_replace_them(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective of a user may report a metric under any name."""
    edit_records(local, lambda r: r["kind"] == "train" and r.update(value=[1, 2]))
    drawn: list[dict[str, charts.Points]] = []
    draw = charts.curve_chart

    def note(curves: Any, label: str, **options: Any) -> Any:
        drawn.append(dict(curves))
        return draw(curves, label, **options)

    monkeypatch.setattr(charts, "curve_chart", note)
    run = read_run_record(local)
    make_sections([("run", run)])
    expected = [r["loss"] for r in run.records if r["kind"] == "train"]
    losses = {f"block {b}": [(n, loss[b]) for n, loss in enumerate(expected, 1)] for b in (0, 1)}
    assert losses in drawn
    assert {"block 0": [(1, 1), (2, 1)], "block 1": [(1, 2), (2, 2)]} in drawn
