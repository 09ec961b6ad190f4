"""Local SGD: its identities with other syncs, and its clock, which is that of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.config.run import RunConfig
from tests.outcome import close, model
from tests.ranks.sync_runs import MOMENTUM, SGD, replica_tensors, sync_run, train_on

FOREVER = 1000


def local_run(every: int, warmup: int = 0, **changes: Any) -> RunConfig:
    """Return a tiny run with local SGD."""
    return sync_run("local-sgd", sync={"every": every, "warmup-updates": warmup}, **changes)


@pytest.mark.parametrize("objective", ["backprop", "mono-forward"])
@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM], ids=["sgd", "momentum"])
def test_a_mean_after_every_step_is_every_step(
    objective: str, optimizer: dict[str, Any], tmp_path: Path
) -> None:
    """Linear optimizers commute with the mean where replicas have equal parts, as two have here."""
    changes = {"objective__name": objective, **optimizer}
    train_on(sync_run("every-step", **changes), tmp_path / "gradients", "aa")
    train_on(local_run(1, **changes), tmp_path / "parameters", "aa")
    close(tmp_path / "gradients", tmp_path / "parameters")


def test_with_adam_it_is_another_method(tmp_path: Path) -> None:
    """The identity above could not fail otherwise: Adam is not linear in the gradient."""
    train_on(sync_run("every-step"), tmp_path / "gradients", "aa")
    train_on(local_run(1), tmp_path / "parameters", "aa")
    with pytest.raises(AssertionError):
        close(tmp_path / "gradients", tmp_path / "parameters")


def test_without_any_mean_it_is_never(tmp_path: Path) -> None:
    never = train_on(sync_run("never"), tmp_path / "never", "aaa")
    local = train_on(local_run(FOREVER), tmp_path / "local", "aaa")
    assert local["digest"] == never["digest"]


@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (3, 0), (3, 2)])
def test_one_replica_is_the_identity(every: int, warmup: int, tmp_path: Path) -> None:
    plain = train_on(sync_run("every-step"), tmp_path / "every-step", "a")
    local = train_on(local_run(every, warmup), tmp_path / "local", "a")
    assert local["digest"] == plain["digest"]


@pytest.mark.parametrize(("every", "warmup"), [(3, 2), (8, 0)])
def test_segments_move_no_mean(every: int, warmup: int, tmp_path: Path) -> None:
    """Drained after 1, 2, 3 updates or an epoch of 4: the same bits."""
    digests = {
        train_on(local_run(every, warmup, segment=length), tmp_path / str(length), "aa")["digest"]
        for length in (1, 2, 3, 0)
    }
    assert len(digests) == 1


def test_a_finished_run_is_evaluated_the_same_again(tmp_path: Path) -> None:
    """It ends on a mean of three: another mean of equal thirds would change bits."""
    first = train_on(local_run(4), tmp_path, "aaa")
    assert train_on(local_run(4), tmp_path, "aaa")["digest"] == first["digest"]


def test_replicas_synchronise_by_the_clock_and_never_else(tmp_path: Path) -> None:
    """Eight updates: after means every 4 all hold the same, after means every 3 they do not."""
    train_on(local_run(4), tmp_path / "equal", "aa")
    train_on(local_run(3), tmp_path / "diverged", "aa")
    one, two = replica_tensors(tmp_path / "equal", 2)
    for name, tensor in model(tmp_path / "equal").items():
        assert torch.equal(one[name], two[name])
        assert torch.equal(one[name], tensor)
    moments = [name for name in one if name.endswith("exp_avg")]
    assert moments
    assert not any(torch.equal(one[name], two[name]) for name in moments)  # they stay local
    one, two = replica_tensors(tmp_path / "diverged", 2)
    assert not torch.equal(one["fc1.weight"], two["fc1.weight"])
    for name, mean in model(tmp_path / "diverged").items():
        torch.testing.assert_close(mean, (one[name] + two[name]) / 2, rtol=1e-14, atol=0)


def test_bytes_are_the_formula(tmp_path: Path) -> None:
    """A warm-up of 2 updates, then means after updates 2 and 5 of 8: four times the parameters."""
    summary = train_on(local_run(3, 2), tmp_path, "aa")
    assert summary["replicas"] == 2
    elements = sum(tensor.numel() for tensor in model(tmp_path).values())
    assert summary["bytes_intra_node"] == 4 * elements * 8 * 2 * (2 - 1)
    assert summary["staleness"] == [0]


def test_batch_statistics_are_averaged_for_evaluation(tmp_path: Path) -> None:
    changes = {"model": {"name": "tests.tiny:normalised"}, "partition__blocks": 2}
    train_on(local_run(4, **changes, micro_batches=1), tmp_path, "aa")
    one, two = replica_tensors(tmp_path, 2)
    (name,) = (name for name in one if name.endswith("running_mean"))
    assert not torch.equal(one[name], two[name])
    expected = (one[name] + two[name]) / 2
    torch.testing.assert_close(model(tmp_path)[name], expected, rtol=1e-14, atol=0)


def test_a_run_resumes_with_another_number_of_replicas(tmp_path: Path) -> None:
    """All start from the evaluation weights."""
    first = train_on(local_run(3, epochs=1), tmp_path, "aa")
    again = train_on(local_run(3, epochs=1), tmp_path, "aaa")
    assert again["digest"] == first["digest"]
    assert train_on(local_run(3), tmp_path, "aaa")["updates"] == 8
