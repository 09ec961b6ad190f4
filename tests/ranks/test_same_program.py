"""Ranks that do not run the same thing are named before they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.comm.backends.threads import run_ranks
from dtrain.errors import ConfigError
from dtrain.session import same_program
from dtrain.training import train
from tests import tiny
from tests.refusals import refuses

CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 7}, "seed"),
    ({"optimizer__lr": 0.5}, "optimizer.lr"),
    ({"optimizer__name": "sgd"}, "optimizer.name"),
    ({"data__shuffle": "chunks"}, "data.shuffle"),
    ({"epochs": 9}, "epochs"),
    ({"micro_batches": 5}, "micro-batches"),
    ({"segment": 2}, "segment"),
    ({"checkpoint__every": 3}, "checkpoint.every"),
    ({"objective__name": "backprop"}, "objective.name"),
    ({"sync__name": "never"}, "sync.name"),
]


@pytest.mark.parametrize(("change", "key"), CHANGES, ids=[key for _, key in CHANGES])
def test_a_stale_run_file_on_one_rank_is_named(
    change: dict[str, Any], key: str, tmp_path: Path
) -> None:
    runs = [tiny.run(mesh__stages=1), tiny.run(mesh__stages=1, **change)]
    with refuses(ConfigError, "ranks.program-differs") as caught:
        run_ranks(2, lambda comm: train(runs[comm.rank], comm, tmp_path / "out"))
    assert f"rank 1 on {caught.value.message.split()[3]} " in caught.value.message
    assert f" {key} is " in caught.value.message
    assert caught.value.on_all_ranks
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["_versions", "source_hashes", "_environment"])
def test_another_version_or_text_on_one_rank_is_named(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter(["one", "other"])
    monkeypatch.setattr(same_program, part, lambda *_: {"the part": next(values)})
    with refuses(ConfigError, "ranks.program-differs") as caught:
        run_ranks(2, lambda comm: train(tiny.run(), comm, tmp_path / "out"))
    assert "the part" in caught.value.message
