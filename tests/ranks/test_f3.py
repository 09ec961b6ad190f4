"""The table of `f3`: equal on any layout, with any segments, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.errors import ConfigError
from tests import tiny
from tests.harness import train_in_threads
from tests.outcome import close, model

FOUR: dict[str, Any] = {"objective__name": "f3", "partition__blocks": 4, "epochs": 3}
VARIANTS: list[dict[str, Any]] = [{}, {"one-hot": True, "error": "output"}]
every_variant = pytest.mark.parametrize("fields", VARIANTS, ids=["softmax", "one-hot-output"])


def make_run(fields: dict[str, Any], **changes: Any) -> Any:
    return tiny.run(**FOUR | changes, objective={"name": "f3", **fields})


@every_variant
@pytest.mark.parametrize("replicas", [1, 2])
def test_all_stages_get_the_table_of_the_last_block(
    replicas: int, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Four blocks on 1, 3 and 4 stages, several on one rank, three epochs: the same bits."""
    digests = set()
    for stages in (1, 3, 4):
        out = tmp_path / str(stages)
        run = make_run(fields, mesh__stages=stages)
        digests.add(train_in_threads(run, out, stages, replicas, seed=stages)["digest"])
        final = model(out)
        tables = [final[f"heads.{block}.answers"] for block in range(4)]
        assert all(torch.equal(table, tables[0]) for table in tables)
        assert tables[0].reshape(50, -1).any(1).all(), "a sample was not seen"
        assert not final["heads.3.fresh"].any()
        assert not final["heads.3.seen"].any()
    assert len(digests) == 1


@every_variant
@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_train_the_same_model(
    replicas: int, fields: dict[str, Any], tmp_path: Path
) -> None:
    train_in_threads(make_run(fields, mesh__stages=2), tmp_path / "one", 2)
    train_in_threads(make_run(fields, mesh__stages=2), tmp_path / "many", 2, replicas)
    close(tmp_path / "one", tmp_path / "many")


@every_variant
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_length_of_segments_has_no_effect(
    replicas: int, fields: dict[str, Any], tmp_path: Path
) -> None:
    """No sample is seen twice in an epoch, so its error is always that of the epoch before."""
    digests = {
        train_in_threads(
            make_run(fields, segment=n, mesh__stages=2), tmp_path / str(n), 2, replicas
        )["digest"]
        for n in (0, 1, 2)
    }
    assert len(digests) == 1


@every_variant
def test_resumed_in_the_middle_of_an_epoch(fields: dict[str, Any], tmp_path: Path) -> None:
    """The table is in the checkpoint; 4 updates are an epoch."""
    changes: dict[str, Any] = {"epochs": None, "checkpoint__every": 2, "mesh__stages": 2}
    whole = train_in_threads(make_run(fields, **changes, updates=12), tmp_path / "whole", 2, 2)
    for updates in (2, 7, 12):
        parts = train_in_threads(
            make_run(fields, **changes, updates=updates), tmp_path / "parts", 2, 2
        )
    assert parts["attempts"] == 3
    assert parts["digest"] == whole["digest"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_first_epoch_is_drtp_and_the_second_is_not(epochs: int, tmp_path: Path) -> None:
    run = make_run({}, mesh__stages=2, epochs=epochs)
    train_in_threads(run, tmp_path / "f3", 2)
    train_in_threads(
        tiny.run(**FOUR | {"objective__name": "drtp", "epochs": epochs}), tmp_path / "drtp"
    )
    mine, theirs = model(tmp_path / "f3"), model(tmp_path / "drtp")
    matches = [torch.allclose(mine[name], tensor, rtol=1e-12) for name, tensor in theirs.items()]
    assert all(matches) is (epochs == 1)


@pytest.mark.parametrize("sync", ["never", "local-sgd"])
def test_replicas_with_local_updates_have_one_table(sync: str, tmp_path: Path) -> None:
    changes = {"sync": {"name": sync, **({"every": 3} if sync == "local-sgd" else {})}}
    train_in_threads(make_run({}, mesh__stages=2, **changes), tmp_path, 2, 2)
    final = model(tmp_path)
    assert final["heads.0.answers"].any(1).all()
    torch.testing.assert_close(final["heads.0.answers"].sum(1), torch.ones(50, dtype=torch.float64))


def test_tables_are_copied_between_blocks_of_different_dtypes(tmp_path: Path) -> None:
    """Answers are rounded to each block's own dtype."""
    changes = {"model": {"name": "tests.tiny:converting"}, "partition": {"cuts": [2, 4]}}
    digests = {
        train_in_threads(make_run({}, **changes, mesh__stages=n), tmp_path / str(n), n)["digest"]
        for n in (1, 2, 3)
    }
    assert len(digests) == 1


def test_an_unknown_error_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        train_in_threads(make_run({"error": "raw"}), tmp_path)
