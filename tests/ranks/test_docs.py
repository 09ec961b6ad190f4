"""The example of docs/adding-an-objective.md, as a reader would write it: it trains, by the laws.

Invariant: the example is read from the docs; a change of the docs changes what is tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import ConfigError
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.base import Objective
from dtrain.testing import LawError
from dtrain.testing.objective_laws import LAWS
from tests import tiny
from tests.docs_reader import documented_laws, load_example, python_blocks
from tests.harness import train_in_threads
from tests.outcome import close, model
from tests.ranks.test_isolation import test_one_block_is_ordinary_backprop as law_4
from tests.ranks.test_isolation import test_the_learning_of_a_block_moves_no_other as law_7
from tests.refusals import refuses

DOCS = Path(__file__).parents[2] / "docs" / "adding-an-objective.md"
SCRIPT, CODE, TEST = python_blocks(DOCS)


@pytest.fixture(autouse=True)
def margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the example as the docs say: a file in the package and a line in the dict."""
    module = load_example("dtrain.objectives.margin", CODE, tmp_path, monkeypatch)
    assert '`"margin": Margin,`' in DOCS.read_text(encoding="utf-8")
    kind: type[Objective] = module.Margin
    monkeypatch.setitem(OBJECTIVES, "margin", kind)


def make_run(**changes: Any) -> Any:
    return tiny.run(objective={"name": "margin", "margin": 0.5}, **changes)


def test_it_trains_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    """And not what Mono-Forward would."""
    runs = {n: train_in_threads(make_run(mesh__stages=n), tmp_path / f"{n}", n) for n in (1, 2, 3)}
    assert len({summary["digest"] for summary in runs.values()}) == 1
    train_in_threads(make_run(micro_batches=1), tmp_path / "whole")
    close(tmp_path / "1", tmp_path / "whole")
    other = train_in_threads(tiny.run(), tmp_path / "other")
    assert other["digest"] != runs[1]["digest"]
    assert model(tmp_path / "other").keys() ^ model(tmp_path / "1").keys() == {
        f"heads.{block}.1.bias" for block in (0, 1)
    }


def test_its_blocks_learn(tmp_path: Path) -> None:
    """Every block's own loss falls: the mean over the last of eight epochs."""
    losses = [
        train_in_threads(make_run(epochs=n), tmp_path / f"{n}")["train_loss_per_block"]
        for n in (1, 8)
    ]
    assert all(last < first for first, last in zip(*losses, strict=True))


def test_the_laws_hold_because_it_is_in_the_dict() -> None:
    law_4("margin")
    law_7("margin")


def test_a_wrong_key_is_refused() -> None:
    with refuses(ConfigError, "objective.margin-not-positive"):
        tiny.run(objective={"name": "margin", "margin": 0})


def test_its_own_test_passes_and_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_example("test_margin", TEST, tmp_path, monkeypatch)
    [formula] = [value for name, value in vars(module).items() if name.startswith("test_")]
    formula()
    monkeypatch.setattr(module, "Margin", lambda margin: OBJECTIVES["mono-forward"]())
    with pytest.raises(AssertionError):
        formula()


def test_the_script_keeps_all_laws_and_a_loss_that_is_a_sum_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_example("mine", SCRIPT, tmp_path, monkeypatch)
    laws = {"calls", *(law.name for law in LAWS)}
    assert set(documented_laws(DOCS)) == laws
    assert laws <= set(capsys.readouterr().out.split())
    with pytest.raises(LawError) as caught:
        load_example("mine", SCRIPT.replace(".mean()", ".sum()"), tmp_path, monkeypatch)
    assert caught.value.law == "micro-batches"
