"""Local SGD: its identities with other syncs, and that its clock is the run's, over whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.config.run import RunConfig
from dtrain.syncs.base import UpdateClock
from dtrain.syncs.local_sgd import LocalSGD
from tests import tiny
from tests.outcome import close, model
from tests.ranks.test_laws import trained

SGD: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 0.05}}
MOMENTUM: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
FOREVER = 1000


def run(**told: Any) -> RunConfig:
    """Return a tiny run whose ranks are all replicas."""
    return tiny.run(mesh__stages=1, **told)


def local(every: int, warmup: int = 0, **told: Any) -> RunConfig:
    """Return a tiny run with local SGD, whose ranks are all replicas."""
    return run(sync={"name": "local-sgd", "every": every, "warmup-updates": warmup}, **told)


def replicas(out: Path, count: int) -> list[dict[str, Tensor]]:
    """Return what each replica holds in the newest checkpoint."""
    manifest = latest_checkpoint(out / "checkpoints")
    assert manifest is not None
    return [manifest.load_prefix(f"replica/{replica}/") for replica in range(count)]


@pytest.mark.parametrize("objective", ["backprop", "mono-forward"])
@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM], ids=["sgd", "momentum"])
def test_a_mean_after_every_step_is_every_step(
    objective: str, optimizer: dict[str, Any], tmp_path: Path
) -> None:
    """Linear optimizers commute with the mean where replicas have equal parts, as two have here."""
    told = {"objective__name": objective, **optimizer}
    trained(run(**told), tmp_path / "gradients", 1, 2)
    trained(local(1, **told), tmp_path / "parameters", 1, 2)
    close(tmp_path / "gradients", tmp_path / "parameters")


def test_with_adam_it_is_another_method(tmp_path: Path) -> None:
    """What the identity above would miss: Adam is not linear in the gradient."""
    trained(run(), tmp_path / "gradients", 1, 2)
    trained(local(1), tmp_path / "parameters", 1, 2)
    with pytest.raises(AssertionError):
        close(tmp_path / "gradients", tmp_path / "parameters")


@pytest.mark.parametrize("count", [2, 3])
def test_an_endless_warm_up_is_every_step_bit_for_bit(count: int, tmp_path: Path) -> None:
    """Three replicas: one of them has no sample in an epoch's last update."""
    one = trained(run(), tmp_path / "every-step", 1, count)
    other = trained(local(3, FOREVER), tmp_path / "local", 1, count)
    assert other["digest"] == one["digest"]


def test_means_that_never_come_are_never(tmp_path: Path) -> None:
    one = trained(run(sync__name="never"), tmp_path / "never", 1, 3)
    other = trained(local(FOREVER), tmp_path / "local", 1, 3)
    assert other["digest"] == one["digest"]


@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (3, 0), (3, 2)])
def test_one_replica_is_the_identity(every: int, warmup: int, tmp_path: Path) -> None:
    one = trained(run(), tmp_path / "every-step")
    assert trained(local(every, warmup), tmp_path / "local")["digest"] == one["digest"]


@pytest.mark.parametrize(("every", "warmup"), [(3, 0), (3, 2), (8, 0), (5, 0)])
def test_segments_move_no_mean(every: int, warmup: int, tmp_path: Path) -> None:
    """Drained after 1, 2, 3 updates or an epoch of 4: the same bits."""
    digests = {
        trained(local(every, warmup, segment=step), tmp_path / str(step), 1, 2)["digest"]
        for step in (1, 2, 3, 0)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("warmup", [0, 4])
def test_resumed_anywhere_is_uninterrupted(warmup: int, tmp_path: Path) -> None:
    """Ends in the warm-up, before, at and after a mean, on three replicas."""
    told = {"epochs": None, "checkpoint__every": 3}
    whole = trained(local(3, warmup, **told, updates=11), tmp_path / "whole", 1, 3)
    for updates in (2, 5, 6, 11):
        parts = trained(local(3, warmup, **told, updates=updates), tmp_path / "parts", 1, 3)
    assert parts["attempts"] == 4
    for key in ("digest", "train_loss", "test_loss", "bytes_intra_node", "samples"):
        assert parts[key] == whole[key], key


def test_a_finished_run_shows_the_same_view_again(tmp_path: Path) -> None:
    """Ends on a mean of three: averaging equal thirds once more would change bits."""
    first = trained(local(4), tmp_path, 1, 3)
    assert trained(local(4), tmp_path, 1, 3)["digest"] == first["digest"]


def test_replicas_meet_at_the_clock_and_nowhere_else(tmp_path: Path) -> None:
    """Eight updates: after a mean every 4 all hold the same, after one every 3 they do not."""
    trained(local(4), tmp_path / "met", 1, 2)
    trained(local(3), tmp_path / "apart", 1, 2)
    one, two = replicas(tmp_path / "met", 2)
    for name, tensor in model(tmp_path / "met").items():
        assert torch.equal(one[name], two[name])
        assert torch.equal(one[name], tensor)
    moments = [name for name in one if name.endswith("exp_avg")]
    assert moments
    assert not any(torch.equal(one[name], two[name]) for name in moments)  # each keeps its own
    one, two = replicas(tmp_path / "apart", 2)
    assert not torch.equal(one["fc1.weight"], two["fc1.weight"])
    for name, mean in model(tmp_path / "apart").items():
        torch.testing.assert_close(mean, (one[name] + two[name]) / 2, rtol=1e-14, atol=0)


def test_bytes_are_the_formula(tmp_path: Path) -> None:
    """Warm-up of 2 updates, then means after updates 2, 5 of 8: four times the parameters."""
    summary = trained(local(3, 2), tmp_path, 1, 2)
    assert summary["replicas"] == 2
    elements = sum(tensor.numel() for tensor in model(tmp_path).values())
    assert summary["bytes_intra_node"] == 4 * elements * 8 * 2 * (2 - 1)
    assert summary["staleness"] == [0]


def test_batch_statistics_are_averaged_for_the_view(tmp_path: Path) -> None:
    told: dict[str, Any] = {"model": {"name": "tests.tiny:normalised"}, "partition__blocks": 2}
    trained(local(4, **told, micro_batches=1), tmp_path, 1, 2)
    one, two = replicas(tmp_path, 2)
    (name,) = (name for name in one if name.endswith("running_mean"))
    assert not torch.equal(one[name], two[name])
    found = model(tmp_path)[name]
    torch.testing.assert_close(found, (one[name] + two[name]) / 2, rtol=1e-14, atol=0)


def test_a_run_goes_on_with_another_number_of_replicas(tmp_path: Path) -> None:
    """All start from the view."""
    first = trained(local(3, epochs=1), tmp_path, 1, 2)
    again = trained(local(3, epochs=1), tmp_path, 1, 3)
    assert again["digest"] == first["digest"]
    assert trained(local(3), tmp_path, 1, 3)["updates"] == 8


def test_its_state_is_whether_replicas_are_equal() -> None:
    sync, fresh = LocalSGD(every=3), LocalSGD(every=3)
    assert bool(sync.state()["equal"])
    sync.after_update(UpdateClock(0, 0, 4, 8, 0.1, 0.1, False, (1,)))
    assert not bool(sync.state()["equal"])
    fresh.restore(sync.state())
    assert fresh.state() == sync.state()
