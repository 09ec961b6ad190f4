"""The picture of a plan: an SVG that can be parsed, with every action where it belongs."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from dtrain.cli import main
from dtrain.schedules.base import Schedule
from dtrain.schedules.gpipe_1f1b import OneFOneB
from dtrain.schedules.pipedream import PipeDream
from dtrain.schedules.render_svg import COLOURS, LEFT, timeline_svg
from dtrain.schedules.verify import verify_schedule
from tests.plan.test_schedules import backprop
from tests.witness.split import Split

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("schedule", [OneFOneB(), PipeDream(), Split()])
def test_every_action_is_drawn_as_long_as_it_takes(schedule: Schedule) -> None:
    sizes = [1] * 9 if isinstance(schedule, PipeDream) else [4, 4]
    report = verify_schedule(schedule, range(3), [sizes], backprop(3))
    text = timeline_svg(report.timeline, 3, "a & b")
    root = ElementTree.fromstring(text)
    bars = [each for each in root.iter(f"{SVG}rect") if each.find(f"{SVG}title") is not None]
    assert len(bars) == len(report.timeline)
    titles = [each.findtext(f"{SVG}title") for each in bars]
    assert f"F2.0 of update 0: {2} to {3}" in titles
    longest = max(float(each.get("x", 0)) + float(each.get("width", 0)) for each in bars)
    scale = (longest - LEFT) / report.makespan
    drawn = sum(float(b.get("width", 0)) for b in bars if b.get("fill") in COLOURS.values())
    busy = sum(span.end - span.start for span in report.timeline)
    assert drawn == pytest.approx(scale * busy, rel=0.01)
    words = [each.text for each in root.iter(f"{SVG}text")]
    assert "a & b" in words
    assert [f"stage {stage}" for stage in range(3)] == [w for w in words if w and w[:5] == "stage"]
    assert ("of the weights" in words) == schedule.splits_backward


def test_the_axis_has_round_numbers() -> None:
    for micros in (1, 3, 30, 300):
        report = verify_schedule(OneFOneB(), range(2), [[micros]], backprop(2))
        root = ElementTree.fromstring(timeline_svg(report.timeline, 2, ""))
        lines = list(root.iter(f"{SVG}line"))
        assert 4 <= len(lines) <= 11


def test_plan_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.toml"
    run.write_text(
        'epochs = 1\nbatch-size = 32\n[data]\nname = "digits"\n'
        '[model]\nname = "mlp"\nwidths = [9, 9]\n'
        '[objective]\nname = "backprop"\n[optimizer]\nname = "sgd"\nlr = 0.1\n'
        '[schedule]\nname = "pipelined"\n'
    )
    out = tmp_path / "plan.svg"
    assert main(["plan", str(run), "--ranks", "2", "--plot", str(out)]) == 0
    assert "pipelined" in capsys.readouterr().out
    assert ElementTree.parse(out).getroot().tag == f"{SVG}svg"
    assert main(["plan", str(run), "--ranks", "2", "--plot", str(tmp_path / "no" / "x.svg")]) == 2
    assert "cannot write" in capsys.readouterr().err
