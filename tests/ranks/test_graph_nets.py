"""Runs on a graph: a deep GCN in parts over four ranks, streamed blocks with virtual nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.evaluation import evaluate_run
from dtrain.models.graph_nets import Gcn
from dtrain.prediction import predict_run
from tests.harness import assert_same_model, train_in_threads
from tests.outcome import model
from tests.small_graph import CLASSES, FEATURES, NODES, arrays, graph, graph_run, write_graph

DEEP: dict[str, Any] = {
    "model": {"widths": [4] * 15, "dropout": 0.2, "residual": True, "history": True},
    "partition": {"blocks": 4},
    "micro_batches": 4,
}
"""A GCN of 16 layers; an update is four parts of the graph."""


def test_a_deep_gcn_in_parts_is_the_same_on_one_rank_and_four(tmp_path: Path) -> None:
    """Law 1, and the bytes: every part crosses three borders of width 4, forth and back. Forwards
    that the four ranks compute again read the history of their time."""
    path, changes = write_graph(tmp_path / "small.h5"), {**DEEP, "epochs": 2}
    one = train_in_threads(graph_run(path, **changes), tmp_path / "one")
    run = graph_run(path, **{**changes, "partition": {"blocks": 4, "recompute": True}})
    four = train_in_threads(run, tmp_path / "four", 4, seed=1)
    assert_same_model(tmp_path / "one", tmp_path / "four")
    for key in ("digest", "train_loss", "test_loss", "test_accuracy", "validation_accuracy"):
        assert one[key] == four[key], key
    assert four["bytes_intra_node"] == 8 * 2 * 3 * 4 * NODES * 2
    assert one["bytes_intra_node"] == 0


def test_a_resumed_run_has_the_history_of_its_layers(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "small.h5")
    net = {"widths": [4] * 5, "residual": True, "history": True}
    run = {**DEEP, "model": net, "epochs": 2}
    whole = train_in_threads(graph_run(path, **run), tmp_path / "whole", 2)
    train_in_threads(graph_run(path, **{**run, "epochs": 1}), tmp_path / "parts", 4)
    parts = train_in_threads(graph_run(path, **run), tmp_path / "parts", 2)
    assert (parts["digest"], parts["attempts"]) == (whole["digest"], 2)
    histories = [tensor for name, tensor in model(tmp_path / "whole").items() if "history" in name]
    assert len(histories) == 6
    assert all(history[:NODES].any() for history in histories)


def test_virtual_nodes_stream_over_ranks(tmp_path: Path) -> None:
    """Laws 1 and 4 on a graph: the same bits; a virtual node of each class crosses both borders."""
    path, changes = write_graph(tmp_path / "small.h5"), {"objective": {"name": "forward-gnn"}}
    ends = [
        train_in_threads(graph_run(path, **changes), tmp_path / str(n), n, seed=n) for n in (1, 3)
    ]
    for key in ("digest", "train_loss", "test_loss", "test_accuracy_vote", "accuracy_per_block"):
        assert ends[0][key] == ends[1][key], key
    assert ends[1]["bytes_intra_node"] == 8 * (5 + 4) * (NODES + CLASSES) * 3


def test_accuracy_is_that_of_the_nodes_of_a_split(tmp_path: Path) -> None:
    """Against the layers in one process; predictions and evaluations see the whole graph."""
    path = write_graph(tmp_path / "small.h5")
    model_fields = {"widths": [4] * 5, "history": True, "residual": True}
    run = graph_run(path, model=model_fields, micro_batches=3, epochs=1)
    summary = train_in_threads(run, tmp_path / "out", 2)
    net = Gcn((4,) * 5, residual=True).module((FEATURES,), CLASSES, graph()).double()
    tensors = model(tmp_path / "out")
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})
    parts = arrays()
    x = torch.from_numpy(parts["x"] / parts["x"].sum(1, keepdims=True)).double()
    predicted = net(x, torch.arange(NODES)).argmax(1).numpy()
    for split in ("test", "validation"):
        nodes = parts[split]
        accuracy = (predicted[nodes] == parts["y"][nodes]).mean()
        assert summary[f"{split}_accuracy"] == pytest.approx(accuracy)
    comm = Comm(SingleBackend())
    assert evaluate_run(tmp_path / "out", comm)["accuracy"] == summary["test_accuracy"]
    outputs = predict_run(tmp_path / "out", comm, "test")
    assert outputs is not None
    assert (outputs.argmax(1) == predicted).all()
