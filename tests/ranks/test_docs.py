"""The example of docs/adding-an-objective.md, as a reader would write it: it trains, by the laws.

Invariant: nothing of the example stands here; a change of the docs is a change of what is tested.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dtrain.errors import DtrainError
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.base import Objective
from tests import tiny
from tests.outcome import close, model
from tests.ranks.test_isolation import test_one_block_is_ordinary_backprop as law_4
from tests.ranks.test_isolation import test_the_learning_of_a_block_moves_no_other as law_7
from tests.ranks.test_laws import trained

DOCS = Path(__file__).parents[2] / "docs" / "adding-an-objective.md"
CODE, TEST = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.M | re.S)
LINES = range(15, 26)
"""Of an example's class that is short and tells something."""


def module(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module `name` made of `code`, which others can import in this test."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(autouse=True)
def margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Objective]:
    """Put the example where the docs say: a file in the package and a line in the dict."""
    made = module("dtrain.objectives.margin", CODE, tmp_path, monkeypatch)
    assert '`"margin": Margin,`' in DOCS.read_text(encoding="utf-8")
    monkeypatch.setitem(OBJECTIVES, "margin", made.Margin)
    kind: type[Objective] = made.Margin
    return kind


def asked(**told: Any) -> dict[str, Any]:
    return {"objective": {"name": "margin", "margin": 0.5}, **told}


def test_it_trains_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    """And better than chance, and not what Mono-Forward would."""
    runs = {n: trained(tiny.run(**asked(mesh__stages=n)), tmp_path / f"{n}", n) for n in (1, 2, 3)}
    assert len({each["digest"] for each in runs.values()}) == 1
    trained(tiny.run(**asked(micro_batches=1)), tmp_path / "whole")
    close(tmp_path / "1", tmp_path / "whole")
    other = trained(tiny.run(), tmp_path / "other")
    assert other["digest"] != runs[1]["digest"]
    assert model(tmp_path / "other").keys() ^ model(tmp_path / "1").keys() == {
        f"heads.{block}.1.bias" for block in (0, 1)
    }


def test_its_blocks_learn(tmp_path: Path) -> None:
    """Every block's own signal improves: the mean over the last epoch, after twenty."""
    loss = [
        trained(tiny.run(**asked(epochs=n)), tmp_path / f"{n}")["train_loss_per_block"]
        for n in (1, 20)
    ]
    assert all(last < first for first, last in zip(*loss, strict=True))


def test_the_laws_hold_by_its_being_in_the_dict() -> None:
    law_4("margin")
    law_7("margin")


def test_a_wrong_key_is_refused() -> None:
    with pytest.raises(DtrainError, match=r"margin = 0\.0: give more than 0"):
        tiny.run(objective={"name": "margin", "margin": 0})


def test_its_own_test_passes_and_can_fail(
    margin: type[Objective], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module("test_margin", TEST, tmp_path, monkeypatch)
    [work] = [each for name, each in vars(made).items() if name.startswith("test_")]
    work()
    monkeypatch.setattr(made, "Margin", lambda margin: OBJECTIVES["mono-forward"]())
    with pytest.raises(AssertionError):
        work()


def test_it_is_short() -> None:
    """Counted without what a module of dtrain has anyway: docstring and imports."""
    [kind] = [node for node in ast.parse(CODE).body if isinstance(node, ast.ClassDef)]
    assert kind.end_lineno is not None
    assert kind.end_lineno - kind.lineno + 1 in LINES
