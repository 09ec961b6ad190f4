"""The example of docs/adding-a-schedule.md, as a reader would write it: it trains, by the laws.

Invariant: nothing of the example stands here; a change of the docs is a change of what is tested.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtrain.errors import DtrainError
from dtrain.schedules import SCHEDULES
from dtrain.schedules.base import Schedule
from tests import tiny
from tests.docs_reader import load_example as module
from tests.ranks.test_rounds import trained

DOCS = Path(__file__).parents[2] / "docs" / "adding-a-schedule.md"
CODE, TEST = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(autouse=True)
def capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Schedule]:
    """Put the example where the docs say: a file in the package and a line in the dict."""
    made = module("dtrain.schedules.capped", CODE, tmp_path, monkeypatch)
    assert '`"capped": Capped,`' in DOCS.read_text(encoding="utf-8")
    monkeypatch.setitem(SCHEDULES, "capped", made.Capped)
    kind: type[Schedule] = made.Capped
    return kind


@pytest.mark.parametrize("live", [1, 2, 9])
def test_it_trains_as_1f1b_does(live: int, tmp_path: Path) -> None:
    def digest(name: str, **fields: int) -> str:
        told = {"schedule": {"name": name} | fields, "objective__name": "backprop"}
        run = tiny.run(mesh__stages=3, **told)
        return str(trained(run, tmp_path / name, "aaa")["digest"])

    assert digest("capped", live=live) == digest("1f1b")


def test_a_wrong_key_is_refused() -> None:
    with pytest.raises(DtrainError, match=r"\[schedule\] live = 0 is too small: give at least 1"):
        tiny.run(schedule={"name": "capped", "live": 0})


def test_its_own_test_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("test_capped", TEST, tmp_path, monkeypatch)
    [work] = [each for name, each in vars(made).items() if name.startswith("test_")]
    work()
