"""The table of `f3`: the same on any layout, however segments are cut, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.errors import DtrainError
from tests import tiny
from tests.outcome import close, model
from tests.ranks.test_laws import trained

FOUR: dict[str, Any] = {"objective__name": "f3", "partition__blocks": 4, "epochs": 3}
KINDS: list[dict[str, Any]] = [{}, {"one-hot": True, "error": "output"}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["softmax", "one-hot-output"])


def asked(kind: dict[str, Any], **told: Any) -> Any:
    return tiny.run(**FOUR | told, objective={"name": "f3", **kind})


@every_kind
@pytest.mark.parametrize("replicas", [1, 2])
def test_all_stages_get_the_table_of_the_last_block(
    replicas: int, kind: dict[str, Any], tmp_path: Path
) -> None:
    """Four blocks on 1, 2, 3 and 4 stages, several on one rank, three epochs: the same bits."""
    digests = set()
    for stages in (1, 2, 3, 4):
        out = tmp_path / str(stages)
        run = asked(kind, mesh__stages=stages)
        digests.add(trained(run, out, stages, replicas, seed=stages)["digest"])
        held = model(out)
        tables = [held[f"heads.{block}.answers"] for block in range(4)]
        assert all(torch.equal(each, tables[0]) for each in tables)
        assert tables[0].reshape(50, -1).any(1).all(), "every sample was seen"
        assert not held["heads.3.fresh"].any()
        assert not held["heads.3.seen"].any()
    assert len(digests) == 1


@every_kind
@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_share_what_they_saw(replicas: int, kind: dict[str, Any], tmp_path: Path) -> None:
    trained(asked(kind, mesh__stages=2), tmp_path / "one", 2)
    trained(asked(kind, mesh__stages=2), tmp_path / "many", 2, replicas)
    close(tmp_path / "one", tmp_path / "many")


@every_kind
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_segments_end_is_not_felt(replicas: int, kind: dict[str, Any], tmp_path: Path) -> None:
    """No sample is seen twice in an epoch, so what it learns from is that of the one before."""
    digests = {
        trained(asked(kind, segment=n, mesh__stages=2), tmp_path / str(n), 2, replicas)["digest"]
        for n in (0, 1, 2)
    }
    assert len(digests) == 1


@every_kind
def test_resumed_in_the_middle_of_an_epoch(kind: dict[str, Any], tmp_path: Path) -> None:
    """The table is in the checkpoint; 4 updates are an epoch."""
    told: dict[str, Any] = {"epochs": None, "checkpoint__every": 2, "mesh__stages": 2}
    whole = trained(asked(kind, **told, updates=12), tmp_path / "whole", 2, 2)
    for updates in (2, 6, 7, 12):
        parts = trained(asked(kind, **told, updates=updates), tmp_path / "parts", 2, 2)
    assert parts["attempts"] == 4
    assert parts["digest"] == whole["digest"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_first_epoch_is_drtp_and_the_second_is_not(epochs: int, tmp_path: Path) -> None:
    run = asked({}, mesh__stages=2, epochs=epochs)
    trained(run, tmp_path / "f3", 2)
    trained(tiny.run(**FOUR | {"objective__name": "drtp", "epochs": epochs}), tmp_path / "drtp")
    mine, theirs = model(tmp_path / "f3"), model(tmp_path / "drtp")
    near = [torch.allclose(mine[name], each, rtol=1e-12) for name, each in theirs.items()]
    assert all(near) is (epochs == 1)


@pytest.mark.parametrize("sync", ["never", "local-sgd"])
def test_replicas_that_train_apart_have_one_table(sync: str, tmp_path: Path) -> None:
    told = {"sync": {"name": sync, **({"every": 3} if sync == "local-sgd" else {})}}
    trained(asked({}, mesh__stages=2, **told), tmp_path, 2, 2)
    held = model(tmp_path)
    assert held["heads.0.answers"].any(1).all()
    torch.testing.assert_close(held["heads.0.answers"].sum(1), torch.ones(50, dtype=torch.float64))


def test_tables_pass_between_blocks_of_other_dtypes(tmp_path: Path) -> None:
    """Answers are rounded to each block's own dtype."""
    told = {"model": {"name": "tests.tiny:converting"}, "partition": {"cuts": [2, 4]}}
    digests = {
        trained(asked({}, **told, mesh__stages=n), tmp_path / str(n), n)["digest"]
        for n in (1, 2, 3)
    }
    assert len(digests) == 1


def test_an_unknown_error_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match="softmax"):
        trained(asked({"error": "raw"}), tmp_path)
