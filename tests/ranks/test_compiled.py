"""Layers under `torch.compile`: plain names, the results of the layers themselves, and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo  # before a test starts threads, in which a half of it could be imported

from dtrain.checkpoint.export import export
from tests import user_nets
from tests.harness import train_in_threads
from tests.outcome import model
from tests.single import one_thread  # noqa: F401


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()
    user_nets.COMPILED_GRAPHS.clear()


@pytest.mark.parametrize("stages", [1, 2])
def test_a_compiled_net_trains_what_the_net_trains(stages: int, tmp_path: Path) -> None:
    tables = {"partition": {"blocks": 2}, "dtype": "float32"}
    digests = [
        train_in_threads(user_nets.run(net, **tables), tmp_path / net, stages=stages)["digest"]
        for net in ("uncompiled", "compiled")
    ]
    assert user_nets.COMPILED_GRAPHS
    assert digests[0] == digests[1]


def test_names_are_those_of_the_net(tmp_path: Path) -> None:
    """So the export loads into a net that is not compiled, and a compiled run resumes."""
    for epochs in (1, 2):
        run = user_nets.run("compiled", epochs=epochs, dtype="float32")
        train_in_threads(run, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "net.pt")
    net = user_nets.uncompiled((8,), 4)
    net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert net.state_dict().keys() == model(tmp_path / "run").keys()


def test_low_rank_leaves_compiled_layers_alone(tmp_path: Path) -> None:
    sync = {"name": "oialr", "delay-updates": 1, "every": 1}
    run = user_nets.run("compiled", sync=sync, mesh={"stages": 1}, dtype="float32")
    assert train_in_threads(run, tmp_path, replicas=2)["low_rank"] == {}
