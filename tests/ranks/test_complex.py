"""Complex parameters and buffers stay complex in training, means, checkpoints and exports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.checkpoint.export import export
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from tests import user_nets
from tests.harness import assert_close_model, assert_same_model, train_in_threads
from tests.outcome import model
from tests.single import one_thread  # noqa: F401

NAMES = ("0.weight", "0.phase")


def test_any_number_of_stages_trains_the_same_complex_numbers(tmp_path: Path) -> None:
    run = user_nets.run("complex_filter", partition={"blocks": 3})
    for stages in (1, 2, 3):
        train_in_threads(run, tmp_path / str(stages), stages=stages)
    tensors = model(tmp_path / "1")
    assert all(tensors[name].dtype == torch.complex128 for name in NAMES)
    assert tensors["0.weight"].imag.abs().min() > 0
    assert_same_model(tmp_path / "1", tmp_path / "2")
    assert_same_model(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_is_a_plain_loop_of_torch(optimizer: str, tmp_path: Path) -> None:
    fields = {"name": optimizer, "lr": 0.01, "weight-decay": 0.1}
    run = user_nets.run("complex_filter", optimizer=fields, data={"normalise": False}, epochs=1)
    train_in_threads(run, tmp_path / "run", replicas=2)
    torch.manual_seed(1)
    net = user_nets.complex_filter((8,), 4)
    user_nets.train_plainly(net, optimizer, lr=0.01, weight_decay=0.1)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(model(tmp_path / "run")[name], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["c8", ">c16"])
def test_complex_samples_are_those_of_a_plain_loop(dtype: str, tmp_path: Path) -> None:
    """Read from a file; the numbers between the blocks are complex, too."""
    x, y, x_test, y_test = user_nets.blobs()
    x, x_test = ((part * np.exp(1j * part)).astype(dtype) for part in (x, x_test))
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    data = {"name": "npz", "train": str(tmp_path / "a.npz"), "normalise": False}
    optimizer = {"name": "sgd", "lr": 0.1, "weight-decay": 0.0}
    for stages in (1, 2):
        run = user_nets.run(
            "complex_net", data=data, optimizer=optimizer, epochs=1, partition={"cuts": ["1"]}
        )
        train_in_threads(run, tmp_path / str(stages), stages=stages)
    assert_same_model(tmp_path / "1", tmp_path / "2")
    torch.manual_seed(1)
    net = user_nets.complex_net((8,), 4)
    user_nets.train_plainly(net, "sgd", x.astype("c16"), lr=0.1)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(model(tmp_path / "1")[name], tensor, rtol=1e-10, atol=1e-12)


SYNCS: list[dict[str, Any]] = [
    {"name": "every-step"},
    {"name": "local-sgd", "every": 2},
    {"name": "diloco", "every": 2},
    {"name": "daso", "warmup-epochs": 1, "cooldown-epochs": 1},
    {"name": "demo"},
    {"name": "int8"},
    {"name": "powersgd"},
    {"name": "terngrad"},
    {"name": "ab"},
    {"name": "oialr", "delay-updates": 1, "every": 1},
]


@pytest.mark.parametrize("sync", SYNCS, ids=lambda sync: sync["name"])
def test_replicas_resume_and_export_complex_numbers(sync: dict[str, Any], tmp_path: Path) -> None:
    """On two nodes, so that compressors compress."""
    tables = {"mesh": {"stages": 1}, "checkpoint": {"keep": 9}}
    run = user_nets.run("complex_filter", sync=sync, **tables)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_in_threads(run, whole, replicas=2, hosts=["a", "b"])
    shutil.copytree(whole, resumed)
    for newer in sorted((resumed / "checkpoints").iterdir())[1:]:
        shutil.rmtree(newer)
    train_in_threads(run, resumed, replicas=2, hosts=["a", "b"])
    assert_same_model(whole, resumed)
    state = export(tmp_path / "whole", tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=True)
    assert all(loaded[name].dtype == torch.complex128 for name in NAMES)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert state["0.weight"].shape == (5,)
    assert state["0.weight"].imag.abs().min() > 0


def test_two_replicas_train_what_one_trains(tmp_path: Path) -> None:
    run = user_nets.run("complex_filter", optimizer={"clip": 0.5})
    train_in_threads(run, tmp_path / "one")
    train_in_threads(run, tmp_path / "two", replicas=2)
    assert_close_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_mean_of_complex_numbers(dtype: torch.dtype) -> None:
    """Also of a conjugate view and of a transposed one; bytes are those of the numbers."""

    def work(comm: Comm) -> list[torch.Tensor]:
        values = torch.arange(6, dtype=torch.float64).view(2, 3).to(dtype) * (1 + 1j * comm.rank)
        transposed, conjugate = values.clone().T, values.clone().conj()
        comm.mean_([values, transposed])
        comm.mean_([conjugate])
        assert comm.traffic.bytes_intra == 3 * values.nbytes
        return [values, transposed, conjugate.resolve_conj()]

    expected = torch.arange(6, dtype=torch.float64).view(2, 3).to(dtype) * (1 + 0.5j)
    for values, transposed, conjugate in run_ranks(2, work):
        assert torch.equal(values, expected)
        assert torch.equal(transposed, expected.T)
        assert torch.equal(conjugate, expected.conj())
