"""The example of docs/adding-a-schedule.md trains and keeps the laws, as a reader would write it.

Invariant: the example is read from the docs, so a change of the docs changes what is tested.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.errors import ConfigError
from dtrain.schedules import SCHEDULES
from dtrain.testing import LawError
from dtrain.testing.schedule_laws import LAWS
from tests import tiny
from tests.docs_reader import documented_laws, load_example, python_blocks
from tests.harness import train_in_threads
from tests.refusals import refuses

DOCS = Path(__file__).parents[2] / "docs" / "adding-a-schedule.md"
SCRIPT, EXAMPLE, TEST = python_blocks(DOCS)


@pytest.fixture(autouse=True)
def register_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the example as the docs say: a file in the package and a line in the dict."""
    module = load_example("dtrain.schedules.capped", EXAMPLE, tmp_path, monkeypatch)
    assert '`"capped": Capped,`' in DOCS.read_text(encoding="utf-8")
    monkeypatch.setitem(SCHEDULES, "capped", module.Capped)


@pytest.mark.parametrize("live", [1, 2, 9])
def test_it_trains_as_1f1b_does(live: int, tmp_path: Path) -> None:
    def digest(name: str, **fields: int) -> str:
        schedule = {"name": name} | fields
        run = tiny.run(mesh__stages=3, schedule=schedule, objective__name="backprop")
        return str(train_in_threads(run, tmp_path / name)["digest"])

    assert digest("capped", live=live) == digest("1f1b")


def test_an_invalid_field_is_refused() -> None:
    with refuses(ConfigError, "schedule.live-too-small"):
        tiny.run(schedule={"name": "capped", "live": 0})


def test_its_own_test_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_example("test_capped", TEST, tmp_path, monkeypatch)
    [test] = [value for name, value in vars(module).items() if name.startswith("test_")]
    test()


def test_the_script_keeps_all_laws_and_too_few_warm_up_forwards_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_example("mine", SCRIPT, tmp_path, monkeypatch)
    laws = {"calls", *(law.name for law in LAWS)}
    assert set(documented_laws(DOCS)) == laws
    assert laws <= set(capsys.readouterr().out.split())
    reverse = SCRIPT.replace("stages - 1 - stage", "stage")
    with pytest.raises(LawError) as caught:
        load_example("mine", reverse.replace("extra=2", "extra=0"), tmp_path, monkeypatch)
    assert caught.value.law == "deadlock"
