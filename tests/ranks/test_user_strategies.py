"""A user's own objective, schedule and sync: by name in a run file, or as instances in Python."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dtrain.comm.backends.threads import run_ranks
from dtrain.config.parse import read_run
from dtrain.config.run import RunConfig
from dtrain.evaluation import evaluate_run
from dtrain.schema import dump_toml
from dtrain.user_code import import_object
from tests import tiny
from tests.conftest import ROOT
from tests.harness import train_in_threads

MODULE = "strategies_of_a_user"
SOURCE = '''
"""Strategies of a user; only the objective is declared as a dataclass."""

import math
from dataclasses import dataclass

from torch import nn

from dtrain.objectives.mono_forward import MonoForward
from dtrain.schedules.gpipe_1f1b import Flush
from dtrain.syncs.common.local_updates import PeriodicSync


@dataclass(frozen=True)
class DeepHead(MonoForward):
    hidden: int = 4

    def head_network(self, spec):
        width = math.prod(spec.output_shape)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(width, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, spec.classes),
        )


class Capped(Flush):
    live: int = 2

    def warmup_forwards(self, stage, stages, micro_batches):
        return min(micro_batches, stages - 1 - stage, self.live - 1)


class EverySecond(PeriodicSync):
    def is_due(self, clock):
        return clock.update % 2 == 1
'''
TABLES: dict[str, Any] = {
    "objective": {"name": f"{MODULE}:DeepHead", "hidden": 5},
    "schedule": {"name": f"{MODULE}:Capped", "live": 1},
    "sync": {"name": f"{MODULE}:EverySecond"},
}


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the user's module, which lies beside the run file."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    import_object(f"{MODULE}:DeepHead", tmp_path, "objective")
    yield sys.modules[MODULE]
    del sys.modules[MODULE]


def read(folder: Path, **changes: Any) -> RunConfig:
    """Return the tiny run with the user's strategies, from a run file in `folder`."""
    path = folder / "mine.toml"
    path.write_text(dump_toml(tiny.TABLE | TABLES | changes))
    return read_run(path)


def trained(run: RunConfig, out: Path) -> dict[str, Any]:
    """Train on two stages and two replicas; return the summary."""
    run = replace(run, mesh=replace(run.mesh, stages=2))
    return train_in_threads(run, out, 2, 2)


@pytest.mark.usefixtures("user")
def test_a_run_file_names_them_by_module_and_class(tmp_path: Path) -> None:
    """Trained, resumed on other ranks and evaluated; the run folder has their names and keys."""
    uninterrupted = trained(read(tmp_path), tmp_path / "whole")
    trained(read(tmp_path, epochs=1), tmp_path / "out")
    resumed = trained(read(tmp_path), tmp_path / "out")
    assert resumed["attempts"] == 2
    assert resumed["digest"] == uninterrupted["digest"]
    (result,) = run_ranks(1, lambda comm: evaluate_run(tmp_path / "out", comm))
    assert result["accuracy"] == resumed["test_accuracy"]
    assert result["objective"] == f"{MODULE}:DeepHead"
    tables = read(tmp_path).to_table()
    assert tables["objective"] == TABLES["objective"] | {"prediction": "final", "features": 2048}
    assert tables["schedule"] == TABLES["schedule"]
    assert tables["sync"] == TABLES["sync"]
    assert dump_toml(tables["objective"]) in (tmp_path / "out" / "run.toml").read_text()


def test_instances_are_the_same_run(user: ModuleType, tmp_path: Path) -> None:
    """Both classes of the user and classes of dtrain."""
    named = read(tmp_path)
    instances: dict[str, Any] = {
        "objective": user.DeepHead(hidden=5),
        "schedule": named.schedule.instance,
        "sync": user.EverySecond(),
        "lr_schedule": named.lr_schedule.instance,
    }
    run = replace(read(tmp_path, objective={"name": "backprop"}), **instances)
    assert run.to_table() == named.to_table()
    assert run.lr_schedule.name == "constant"
    digests = [
        trained(variant, tmp_path / name)["digest"] for name, variant in (("a", run), ("b", named))
    ]
    assert len(set(digests)) == 1


def test_every_block_has_a_sync_of_its_own() -> None:
    run = tiny.run(sync={"name": "warmup", "inner": {"name": "local-sgd"}})
    first, second = run.new_sync(), run.new_sync()
    assert first is not second
    assert first == second == run.sync.instance


def test_the_example_of_the_guide_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/training.md: its module and its run file."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = guide.partition("## Use your own strategies")[2]
    (tmp_path / "mine.py").write_text(section.partition("```python\n")[2].partition("```")[0])
    table = tomllib.loads(section.partition("```toml\n")[2].partition("```")[0])
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(tiny.TABLE | table))
    run = read_run(path)
    assert run.to_table()["sync"] == {"name": "mine:EveryNth", "n": 2}
    assert trained(run, tmp_path / "out")["status"] == "finished"
