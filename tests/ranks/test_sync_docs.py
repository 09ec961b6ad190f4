"""The example of docs/adding-a-sync.md, as a reader would write it: it trains, by the laws.

Invariant: nothing of the example stands here; a change of the docs is a change of what is tested.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtrain.errors import DtrainError
from dtrain.syncs import SYNCS
from dtrain.syncs.base import Sync
from tests import tiny
from tests.docs_reader import load_example as module
from tests.ranks.killed import killed
from tests.ranks.test_rounds import run, trained

DOCS = Path(__file__).parents[2] / "docs" / "adding-a-sync.md"
CODE, TEST = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(autouse=True)
def elastic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Sync]:
    """Put the example where the docs say: a file in the package and a line in the dict."""
    made = module("dtrain.syncs.elastic", CODE, tmp_path, monkeypatch)
    assert '`"elastic": Elastic,`' in DOCS.read_text(encoding="utf-8")
    monkeypatch.setitem(SYNCS, "elastic", made.Elastic)
    kind: type[Sync] = made.Elastic
    return kind


def test_one_replica_is_the_identity(tmp_path: Path) -> None:
    plain = trained(run("every-step"), tmp_path / "plain", "a")
    assert trained(run("elastic"), tmp_path / "elastic", "a")["digest"] == plain["digest"]


def test_killed_between_meetings_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole = trained(run("elastic"), tmp_path / "whole")
    often = run("elastic", checkpoint__every=3)
    killed(often, tmp_path / "parts", 6, "ab")
    assert trained(often, tmp_path / "parts")["digest"] == whole["digest"]
    never = trained(run("never"), tmp_path / "never")
    assert never["digest"] != whole["digest"]


def test_a_wrong_key_is_refused() -> None:
    with pytest.raises(DtrainError, match=r"\[sync\] every = 0 is too small: give at least 1"):
        tiny.run(sync={"name": "elastic", "every": 0}).make_sync()


def test_its_own_test_passes_and_can_fail(
    elastic: type[Sync], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module("test_elastic", TEST, tmp_path, monkeypatch)
    [work] = [each for name, each in vars(made).items() if name.startswith("test_")]
    work(tmp_path / "one")
    monkeypatch.setitem(SYNCS, "elastic", type("Loose", (elastic,), {"after_update": _slack}))
    with pytest.raises(AssertionError):
        work(tmp_path / "two")


def _slack(self: Sync, clock: object) -> None:
    """Meet never."""
    self.in_sync = False
