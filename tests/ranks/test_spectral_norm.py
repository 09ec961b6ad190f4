"""Buffers without a mean, such as the singular vectors of spectral norm, are one replica's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import user_nets
from tests.harness import train_in_threads
from tests.outcome import model
from tests.ranks.sync_runs import replica_tensors
from tests.single import one_thread  # noqa: F401

VECTORS = {
    "spectral": (
        "0.parametrizations.weight.0._u",
        "0.parametrizations.weight.0._v",
        "2.weight_u",
        "2.weight_v",
    ),
    "centred": ("0.signs",),
}

SYNCS: list[dict[str, Any]] = [
    {"name": "local-sgd", "every": 3},
    {"name": "diloco", "every": 3},
    {"name": "every-step"},
    {"name": "ab", "warmup-updates": 4},
    {"name": "int8", "inner": {"name": "local-sgd", "every": 3}},
]


@pytest.mark.parametrize("net", VECTORS)
@pytest.mark.parametrize("sync", SYNCS, ids=lambda sync: sync["name"])
def test_they_are_those_of_the_first_replica(
    sync: dict[str, Any], net: str, tmp_path: Path
) -> None:
    run = user_nets.run(net, sync=sync, mesh={"stages": 1}, epochs=4)
    train_in_threads(run, tmp_path, replicas=2, hosts=["a", "b"])
    tensors, (first, *_) = model(tmp_path), replica_tensors(tmp_path, 2)
    for name in VECTORS[net]:
        if name in first:  # a sync that keeps replicas equal saves one of them
            assert torch.equal(tensors[name], first[name])
        if net == "spectral":
            assert float(tensors[name].norm()) == pytest.approx(1.0)
        else:
            assert set(tensors[name].abs().tolist()) == {1.0}


def test_the_mean_model_is_as_good_as_its_replicas(tmp_path: Path) -> None:
    """Means of vectors that cancel divide a weight by a norm near 0: a loss in the thousands."""
    sync = {"name": "local-sgd", "every": 8}
    run = user_nets.run("orthogonal", sync=sync, mesh={"stages": 1}, epochs=30)
    assert train_in_threads(run, tmp_path, replicas=4)["test_loss"] < 1.0
