"""The example of docs/adding-a-sync.md, as a reader would write it: it trains, and keeps the laws.

Invariant: the code of the example is read from the docs, so a change of the docs is tested.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.errors import ConfigError
from dtrain.syncs import SYNCS
from dtrain.syncs.base import Sync
from dtrain.testing import LawError
from dtrain.testing.sync_laws import LAWS
from tests.docs_reader import documented_laws, load_example, python_blocks
from tests.ranks.killed import killed
from tests.ranks.sync_runs import sync_run, train_on
from tests.refusals import refuses

DOCS = Path(__file__).parents[2] / "docs" / "adding-a-sync.md"
SCRIPT, EXAMPLE, TEST = python_blocks(DOCS)


@pytest.fixture(autouse=True)
def elastic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Sync]:
    """Put the example where the docs say: a file in the package and a line in the dict."""
    module = load_example("dtrain.syncs.elastic", EXAMPLE, tmp_path, monkeypatch)
    assert '`"elastic": Elastic,`' in DOCS.read_text(encoding="utf-8")
    monkeypatch.setitem(SYNCS, "elastic", module.Elastic)
    kind: type[Sync] = module.Elastic
    return kind


def test_one_replica_is_the_identity(tmp_path: Path) -> None:
    plain = train_on(sync_run("every-step"), tmp_path / "plain", "a")
    assert train_on(sync_run("elastic"), tmp_path / "elastic", "a")["digest"] == plain["digest"]


def test_killed_between_averages_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole = train_on(sync_run("elastic"), tmp_path / "whole")
    run = sync_run("elastic", checkpoint__every=3)
    killed(run, tmp_path / "parts", 6, "ab")
    assert train_on(run, tmp_path / "parts")["digest"] == whole["digest"]
    never = train_on(sync_run("never"), tmp_path / "never")
    assert never["digest"] != whole["digest"]


def test_a_wrong_key_is_refused() -> None:
    with refuses(ConfigError, "sync.too-small"):
        sync_run("elastic", sync={"every": 0})


def test_its_own_test_passes_and_can_fail(
    elastic: type[Sync], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_example("test_elastic", TEST, tmp_path, monkeypatch)
    [test] = [value for name, value in vars(module).items() if name.startswith("test_")]
    test(tmp_path / "one")

    def average_nothing(self: Sync, clock: object) -> None:
        self.in_sync = False

    monkeypatch.setitem(
        SYNCS, "elastic", type("Loose", (elastic,), {"after_update": average_nothing})
    )
    with pytest.raises(AssertionError):
        test(tmp_path / "two")


def test_the_script_keeps_all_laws_and_a_stateful_choice_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_example("mine", SCRIPT, tmp_path, monkeypatch)
    laws = {"calls", *(law.name for law in LAWS)}
    assert set(documented_laws(DOCS)) == laws
    assert laws <= set(capsys.readouterr().out.split())
    stateful = SCRIPT.replace("return (clock", "self.n = 7 - self.n\n        return (clock")
    with pytest.raises(LawError) as caught:
        load_example("mine", stateful, tmp_path, monkeypatch)
    assert caught.value.law == "due"
