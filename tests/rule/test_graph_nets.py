"""Graph networks: their matrices, layers, parts with history, and what a plan refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.models import MODELS
from dtrain.models.aggregation import aggregate
from dtrain.models.graph_nets import GraphNetwork
from dtrain.planning.plan import make_plan
from tests import tiny
from tests.refusals import refuses
from tests.small_graph import CLASSES, FEATURES, NODES, arrays, graph, graph_run, write_graph

D = torch.float64
ALL = torch.arange(NODES)
VIRTUAL = torch.arange(NODES, NODES + CLASSES)


def dense(normalisation: str) -> Tensor:
    """Return the square matrix of nodes and virtual nodes, by the formulas."""
    parts = arrays()
    a = torch.zeros(NODES, NODES, dtype=D)
    for i, j in parts["edges"]:
        a[i, j] = a[j, i] = 1
    whole = torch.zeros(NODES + CLASSES, NODES + CLASSES, dtype=D)
    if normalisation == "symmetric":
        root = (a.sum(1) + 1).rsqrt().diag()
        whole[:NODES, :NODES] = root @ (a + torch.eye(NODES, dtype=D)) @ root
    else:
        whole[:NODES, :NODES] = a / a.sum(1, keepdim=True).clamp(min=1)
    for label in range(CLASSES):
        members = [n for n in parts["train"] if parts["y"][n] == label]
        sources = [*members, NODES + label] if normalisation == "symmetric" else members
        whole[NODES + label, sources] = 1 / len(sources)
    return whole


def make_net(name: str = "gcn", **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    kind = MODELS[name]
    assert issubclass(kind, GraphNetwork)
    return kind(**fields).module((FEATURES,), CLASSES, graph()).to(D)


@pytest.mark.parametrize("normalisation", ["symmetric", "mean"])
def test_sums_over_neighbours_are_products_with_the_dense_matrix(normalisation: Any) -> None:
    rows = torch.cat([torch.randperm(NODES)[:9], VIRTUAL])
    x = torch.randn(NODES + CLASSES, 4, dtype=D, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    cotangent = torch.randn(len(rows), 4, dtype=D)
    for leaf, y in (
        (x, aggregate(graph(), normalisation, x, rows)),
        (other, dense(normalisation)[rows] @ other),
    ):
        y.backward(cotangent)
        assert leaf.grad is not None
    torch.testing.assert_close(aggregate(graph(), normalisation, x, rows), y, rtol=1e-13, atol=0)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ["gcn", "sage"])
def test_layers_are_the_papers(name: str) -> None:
    """GCN: relu(A X W); GraphSAGE: relu(mean(X) W + X V); the last layer is linear."""
    net, x = make_net(name, widths=(5, 5), residual=True), torch.randn(NODES, FEATURES, dtype=D)
    matrix = dense("symmetric" if name == "gcn" else "mean")[:NODES, :NODES]
    h, layers = x, list(net.children())
    for number, layer in enumerate(layers):
        weights = dict(layer.named_parameters())
        y = matrix @ h @ weights["linear.weight"].T + weights["linear.bias"]
        if name == "sage":
            y = y + h @ weights["self_linear.weight"].T
        y = y if number == 2 else y.relu()
        h = y + h if number == 1 else y
    torch.testing.assert_close(net(x, ALL), h, rtol=1e-12, atol=1e-14)


def test_no_node_depends_on_virtual_nodes() -> None:
    net, x = make_net(widths=(5, 4)), torch.randn(NODES + CLASSES, FEATURES, dtype=D)
    together = net(x, torch.cat([ALL, VIRTUAL]))
    assert torch.equal(together[:NODES], net(x[:NODES], ALL))
    assert together.shape == (NODES + CLASSES, CLASSES)


@pytest.mark.parametrize("name", ["gcn", "sage"])
def test_one_part_is_the_graph_to_the_bit(name: str) -> None:
    x = torch.randn(NODES, FEATURES, dtype=D)
    plain, keeping = make_net(name, widths=(5, 4)), make_net(name, widths=(5, 4), history=True)
    for _ in range(2):
        for net in (plain, keeping):
            net.zero_grad()
            net(x, ALL).square().sum().backward()
        for one, other in zip(plain.parameters(), keeping.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_parts_with_constant_weights_become_the_graph() -> None:
    """After a pass per layer, and no sooner; evaluation neither reads nor writes the history."""
    widths = (5, 4, 5)
    net = make_net(widths=widths, history=True, residual=True)
    x = torch.randn(NODES, FEATURES, dtype=D)
    whole = net.eval()(x, ALL).detach()
    assert not any(buffer.any() for buffer in net.buffers())
    assert torch.equal(make_net(widths=widths, residual=True)(x, ALL), whole)
    parts = torch.randperm(NODES).split([9, 2, 5, 7])
    errors = []
    net.train()
    for _ in range(len(widths) + 2):
        y = torch.empty_like(whole)
        for nodes in parts:
            y[nodes] = net(x[nodes], nodes).detach()
        errors.append((y - whole).abs().max().item())
    assert min(errors[: len(widths)]) > 1e-3
    assert max(errors[len(widths) :]) < 1e-14
    assert torch.equal(net.eval()(x, ALL), whole)


@pytest.mark.parametrize(
    ("key", "ranks", "changes"),
    [
        ("graph.parts-without-history", 1, {"micro_batches": 2}),
        ("graph.parts-without-history", 1, {"batch_size": NODES - 1}),
        ("graph.replicas", 2, {"mesh": {"stages": 1}}),
        (
            "graph.nodes-missing",
            1,
            {"data": {"name": "tests.small_graph:without_validation", "validation": 0.2}},
        ),
        ("graph.sampler", 1, {"data": {"sampler": "tests.small_graph:draw_evenly"}}),
        ("model.graph-widths", 1, {"model": {"widths": [0]}}),
        ("model.dropout-out-of-range", 1, {"model": {"dropout": 1.0}}),
        ("activation.unknown", 1, {"model": {"activation": "none"}}),
    ],
)
def test_runs_that_divide_the_graph_are_refused(
    key: str, ranks: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = write_graph(tmp_path / "small.h5")
    with refuses(ConfigError, key):
        make_plan(graph_run(path, **changes), ranks)


def test_parts_are_planned_where_layers_keep_history(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "small.h5")
    plan = make_plan(graph_run(path, micro_batches=3, model={"history": True}), 3)
    assert plan.batch_splitter.largest_micro_batch == -(-NODES // 3)
    make_plan(graph_run(path, model={"name": "mlp", "widths": [4, 4]}, batch_size=5), 1)


def test_graph_networks_need_nodes() -> None:
    with refuses(ConfigError, "model.needs-graph"):
        make_plan(tiny.run(model={"name": "gcn"}), 1)
    np.testing.assert_equal(graph().rows, NODES + CLASSES)
