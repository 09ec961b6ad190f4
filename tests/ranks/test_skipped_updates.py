"""`[numerics] non-finite = "skip-update"`: an update whose loss or gradient is not finite is left
out, by all ranks that share it, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain.errors import DataError, NumericalError
from dtrain.objectives import OBJECTIVES
from dtrain.syncs import SYNCS
from tests import tiny
from tests.harness import is_legal, train_in_threads
from tests.outcome import model
from tests.refusals import refuses

MARK = 30.0
"""The last number of a marked sample, which the layer `Marked` knows by it in any scale."""


UNMARKED = ("scalable-ff", "diffusion-blocks", "forward-gnn", "noprop")
"""Objectives under which no block sees the mark: pictures of labels, and normalised features."""


class NotFinite(torch.autograd.Function):
    """The identity, whose output or whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: str) -> Tensor:
        ctx.part = part
        return x * torch.nan if part == "loss" else x.clone()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent * torch.nan

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * torch.nan, None


class Marked(nn.Module):
    """A layer that is not finite where a micro-batch in training has the marked sample."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().abs()
        is_marked = (
            self.training and not x.is_meta and bool((rows[:, -1] > 0.97 * rows.norm(dim=1)).any())
        )
        x = x.clamp(-4.0, 4.0)
        return NotFinite.apply(x, self.part) if is_marked and self.part else x  # type: ignore[no-untyped-call, no-any-return]


def net(part: str) -> nn.Sequential:
    """Return a net of three blocks, of which the second has the layer `Marked`."""
    first, second = nn.Linear(10, 10), nn.Linear(10, 10)
    with torch.no_grad():  # a marked sample is known behind them
        for layer in (first, second):
            layer.weight.copy_(torch.eye(10))
            layer.bias.zero_()
    last = nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)
    return nn.Sequential(nn.Flatten(), first, second, Marked(part), *last)


def loss() -> nn.Sequential:
    """Return a net whose loss is NaN in some updates."""
    return net("loss")


def gradient() -> nn.Sequential:
    """Return a net whose gradients are NaN in some updates, and its losses are not."""
    return net("gradient")


def plain() -> nn.Sequential:
    """Return the same net without NaN."""
    return net("")


def samples(marked: int = 1) -> Any:
    """Return the tiny samples with the first ones marked."""
    x, y, x_test, y_test = tiny.samples()
    x[:marked, 1, 4] = MARK
    return x, y, x_test, y_test


def many() -> Any:
    """Return samples of which one is marked in every update."""
    return samples(50)


def trained(out: Path, net: str, stages: int, replicas: int = 1, **changes: Any) -> Any:
    """Train a net on the marked samples, with updates that may be skipped; return the summary."""
    threads = {key: changes.pop(key) for key in ("hosts", "seed") if key in changes}
    table = {
        "mesh__stages": stages,
        "data__name": f"{__name__}:samples",
        "data__normalise": False,
        "model": {"name": f"{__name__}:{net}"},
        "partition__blocks": None,
        "partition__cuts": [2, 7],
        "optimizer": {"name": "sgd", "lr": 0.01},
        "numerics": {"non-finite": "skip-update"},
    }
    return train_in_threads(tiny.run(**(table | changes)), out, stages, replicas, **threads)


def skip_marked(update: int, per_epoch: int, total: int) -> float:
    """Return a rate that is 0 in the updates of the marked sample."""
    return 0.0 if update in (1, 4) else 1.0


def finite(out: Path) -> bool:
    """Return whether all saved tensors are finite."""
    return all(bool(tensor.double().isfinite().all()) for tensor in model(out).values())


@pytest.mark.parametrize("net", ["loss", "gradient"])
def test_a_shared_update_is_skipped_by_all_blocks(net: str, tmp_path: Path) -> None:
    """The weights are those of a run whose rate is 0 in these updates; running statistics are not
    those, since the update has not been."""
    backprop = {"objective__name": "backprop", "schedule__name": "1f1b"}
    skipped = trained(tmp_path / "a", net, 3, 2, seed=1, **backprop)
    assert skipped["skipped_updates"] == [2, 2, 2]
    rate = {"lr__name": f"{__name__}:skip_marked", "numerics": {}}
    trained(tmp_path / "b", "plain", 1, 2, **backprop, **rate)
    ours, theirs = model(tmp_path / "a"), model(tmp_path / "b")
    for name in ours:
        is_statistic = name.startswith(("5.running", "5.num"))
        assert torch.equal(ours[name], theirs[name]) is not is_statistic, name
    assert theirs["5.num_batches_tracked"] - ours["5.num_batches_tracked"] == 2 * 3


@pytest.mark.parametrize("net", ["loss", "gradient"])
def test_a_local_update_is_skipped_by_its_blocks(net: str, tmp_path: Path) -> None:
    """Blocks before the NaN train on; any number of stages trains the same bits."""
    counts = {"loss": [0, 2, 2], "gradient": [0, 2, 0]}[net]
    results = [trained(tmp_path / f"{n}", net, n, 2, seed=n) for n in (1, 3)]
    assert [result["skipped_updates"] for result in results] == [counts, counts]
    assert results[0]["digest"] == results[1]["digest"]
    assert all(loss is not None for loss in results[0]["train_loss_per_block"])
    trained(tmp_path / "plain", "plain", 1, 2)
    ours, others = model(tmp_path / "1"), model(tmp_path / "plain")
    assert torch.equal(ours["1.weight"], others["1.weight"])
    assert not torch.equal(ours["4.weight"], others["4.weight"])


@pytest.mark.parametrize("objective", ["backprop", "mono-forward"])
def test_a_resumed_run_is_the_uninterrupted_one(objective: str, tmp_path: Path) -> None:
    """With a limit that the uninterrupted run does not reach; without NaN it changes no bit."""
    numerics = {"non-finite": "skip-update", "max-skipped": 1}
    changes = {"objective__name": objective, "numerics": numerics, "checkpoint__every": 3}
    whole = trained(tmp_path / "whole", "loss", 2, epochs=2, **changes)
    trained(tmp_path / "out", "loss", 3, epochs=1, **changes)
    resumed = trained(tmp_path / "out", "loss", 2, epochs=2, **changes)
    for key in ("digest", "skipped_updates", "train_loss"):
        assert resumed[key] == whole[key]
    with_policy = trained(tmp_path / "with", "plain", 1, 2, **changes)
    without = trained(tmp_path / "no", "plain", 1, 2, **changes | {"numerics": {}})
    assert with_policy["digest"] == without["digest"]
    assert (tmp_path / "out" / "run.toml").read_text().count("[numerics]") == 1


@pytest.mark.parametrize("sync", SYNCS)
def test_replicas_skip_together_under_every_sync(sync: str, tmp_path: Path) -> None:
    """The debug mode compares them wherever the sync keeps them equal; one has no samples in the
    last update of an epoch."""
    changes = {"sync": {"name": sync}, "debug": True}
    result = trained(tmp_path, "loss", 1, 3, hosts=["a", "a", "b"], **changes)
    assert result["skipped_updates"][1:] == [2, 2]
    assert finite(tmp_path)
    assert result["test_loss"] is not None


@pytest.mark.parametrize("objective", sorted({*OBJECTIVES} - {"dual-propagation"}))
def test_nothing_that_is_not_finite_stays(objective: str, tmp_path: Path) -> None:
    """Neither in weights nor in state of heads; under a schedule with late gradients, too.

    `dual-propagation` takes no layer of a user, so none that returns NaN.
    """
    named = {"objective__name": objective, "micro_batches": 1, "epochs": 1}
    is_late = objective in tiny.PATTERNS and is_legal(objective, "pipelined")
    for schedule in [{}, {"schedule__name": "pipelined"}][: 1 + is_late]:
        out = tmp_path / str(len(schedule))
        result = trained(out, "loss", 3, **named, **schedule)
        assert finite(out)
        assert max(result["skipped_updates"]) >= (objective not in UNMARKED)
        assert result["test_loss"] is not None


@pytest.mark.parametrize("objective", ["backprop", "mono-forward"])
def test_too_many_in_a_row_end_the_run(objective: str, tmp_path: Path) -> None:
    numerics = {"non-finite": "skip-update", "max-skipped": 2}
    changes = {"objective__name": objective, "numerics": numerics}
    changes["data__name"] = f"{__name__}:many"
    with refuses(NumericalError, "training.too-many-skipped-updates") as caught:
        trained(tmp_path, "loss", 2, 2, **changes)
    assert "update 2" in caught.value.message
    assert caught.value.code == 4


def spoilt() -> Any:
    """Return samples of which one of the last is not finite."""
    x, y, x_test, y_test = tiny.samples()
    x[43, 1, 3] = torch.nan
    return x, y, x_test, y_test


def overflowing(sample: Tensor, index: int, epoch: int, generator: torch.Generator) -> Tensor:
    """Return a sample that is not finite, for one index."""
    return sample * torch.inf if index == 43 else sample


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ({"data__name": f"{__name__}:spoilt"}, "data.not-finite", ["sample 43", "channel 1"]),
        ({"data__augment": f"{__name__}:overflowing"}, "data.augmented-not-finite", ["augment"]),
    ],
)
@pytest.mark.parametrize("objective", ["backprop", "mono-forward"])
def test_a_loss_that_the_data_spoil_is_blamed_on_them(
    objective: str,
    change: dict[str, str],
    key: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check at the start had no time for the sample. A stage that does not read inputs in
    training finds it, too; the ranks alone that read inputs know those of an augmentation."""
    monkeypatch.setattr("dtrain.session.data_notes.CHECK_S", 0.0)
    is_read = key == "data.not-finite" or objective == "mono-forward"
    stages = 2 if is_read else 1
    changes = {"objective__name": objective, "numerics": {}, "partition__cuts": [2]}
    with refuses(DataError, key) as caught:
        trained(tmp_path / "stop", "plain", stages, **changes | change)
    assert all(word in caught.value.message for word in words)
    changes["numerics"] = {"non-finite": "skip-update"}
    result = trained(tmp_path / "skip", "plain", stages, **changes | change)
    assert max(result["skipped_updates"]) == 2
    records = (tmp_path / "skip" / "metrics.jsonl").read_text()
    assert words[0] in records
