"""`dtrain report`, `status` and `compare` on the folder of a real run, as programs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import ROOT
from tests.outcome import summary
from tests.process import start
from tests.system.conftest import Shared
from tests.system.programs import DTRAIN


def test_the_folder_of_a_run_is_read_and_left_as_it_is(shared: Shared, tmp_path: Path) -> None:
    out, page_path, charts = shared.folder / "out", tmp_path / "page.html", tmp_path / "charts"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    ended = start([*DTRAIN, "status", out, "--json"], cwd=ROOT)
    state = json.loads(ended.out)
    assert (ended.code, state["status"], state["update"]) == (0, "finished", state["updates"])
    assert state["updates"] == state["checkpoint"]["update"] == summary(out)["updates"]
    ended = start([*DTRAIN, "compare", out, out, "--json"], cwd=ROOT)
    result = json.loads(ended.out)
    assert (result["digest_equal"], result["settings"]) == (True, {})
    ended = start([*DTRAIN, "report", out, page_path, "--png", charts], cwd=ROOT)
    assert (ended.code, ended.err, ended.left) == (0, "", ())
    page = page_path.read_text(encoding="utf-8")
    assert summary(out)["digest"] in page
    assert page.count("data:image/svg+xml;base64,") == len([*charts.iterdir()])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
