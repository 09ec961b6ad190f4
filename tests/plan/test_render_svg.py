"""The picture of a plan: valid SVG with every action in its place."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from dtrain.cli import main
from dtrain.schedules.base import Schedule
from dtrain.schedules.gpipe_1f1b import OneFOneB
from dtrain.schedules.pipedream import PipeDream
from dtrain.schedules.render_svg import COLOURS, LABELS, LEFT, timeline_svg
from dtrain.schedules.verify import verify_schedule
from tests.plan.test_schedules import backprop
from tests.witness.split import Split

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("schedule", [OneFOneB(), PipeDream(), Split()])
def test_bars_are_as_long_as_their_actions(schedule: Schedule) -> None:
    micro_batches = [1] * 9 if isinstance(schedule, PipeDream) else [4, 4]
    report = verify_schedule(schedule, range(3), [micro_batches], backprop(3))
    root = ElementTree.fromstring(timeline_svg(report.timeline, 3, "a & b"))
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None]
    assert len(bars) == len(report.timeline)
    tooltips = [bar.findtext(f"{SVG}title") for bar in bars]
    assert "F2.0 of update 0: 2 to 3" in tooltips
    right = max(float(bar.get("x", 0)) + float(bar.get("width", 0)) for bar in bars)
    scale = (right - LEFT) / report.makespan
    drawn = sum(float(b.get("width", 0)) for b in bars if b.get("fill") in COLOURS.values())
    busy = sum(span.end - span.start for span in report.timeline)
    assert drawn == pytest.approx(scale * busy, rel=0.01)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "a & b" in texts
    assert [f"stage {stage}" for stage in range(3)] == [t for t in texts if t and t[:5] == "stage"]
    assert (LABELS["W"] in texts) == schedule.splits_backward


def test_the_axis_has_four_to_eleven_lines() -> None:
    for micros in (1, 3, 30, 300):
        report = verify_schedule(OneFOneB(), range(2), [[micros]], backprop(2))
        root = ElementTree.fromstring(timeline_svg(report.timeline, 2, ""))
        assert 4 <= len(list(root.iter(f"{SVG}line"))) <= 11


def test_the_plan_command_writes_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    missing = tmp_path / "missing" / "plan.svg"
    assert main(["plan", str(run), "--ranks", "2", "--plot", str(missing)]) == 2
    assert str(missing) in capsys.readouterr().err
