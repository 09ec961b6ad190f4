"""The objective `forward-gnn`: its scores, gradients and virtual nodes, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.build import build_rank
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.forward import backward_pairs, forward_micro_batch
from dtrain.objectives.forward_gnn import ForwardGnn
from dtrain.planning.plan import make_plan
from tests import tiny
from tests.refusals import refuses
from tests.rule.blocks_in_process import build_blocks, sgd, train_micro_batch
from tests.small_graph import CLASSES, IGNORED, NODES, arrays, graph_run, write_graph

D = torch.float64
TAU = 0.7


def test_scores_are_products_with_the_virtual_rows_and_nothing_is_sent_back() -> None:
    """By autograd, block by block, with detached and normalised inputs."""
    torch.manual_seed(0)
    objective = ForwardGnn(temperature=TAU)
    x, y = torch.randn(5, 6, dtype=D), torch.randint(0, 3, (5,))
    parts = [[nn.Linear(6, 4), nn.Tanh()], [nn.Linear(4, 7), nn.ReLU()], [nn.Linear(7, 3)]]
    blocks = build_blocks(objective, [[m.to(D) for m in part] for part in parts], x, 3)
    micro_batches = train_micro_batch(objective, blocks, x, y, loss_scale=0.3)
    head = blocks[0][1].head
    assert head is not None
    assert [name for name, _ in head.named_parameters()] == []
    h = torch.cat([x, next(head.buffers())])
    for index, ((spec, block), part) in enumerate(zip(blocks, parts, strict=True)):
        h = layer_norm(h.detach(), h.shape[1:]) if index else h
        h = nn.Sequential(*part)(h)
        scores = h[:5] if index == 2 else h[:5] @ h[5:].T / TAU
        predicted = objective.predict(spec, block, micro_batches[index])
        torch.testing.assert_close(predicted, scores, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(objective.vote(spec, predicted), scores.softmax(1))
        parameters = list(block.parameters.values())
        expected = torch.autograd.grad(0.3 * cross_entropy(scores, y), parameters)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)


def test_one_block_has_no_virtual_rows() -> None:
    objective, spec = ForwardGnn(), BlockSpec(0, 1, (6,), (3,), D, 3, sample_shape=(6,))
    assert objective.make_head(spec) is None
    block = Block(0, {"head": nn.Linear(6, 3).to(D)}, None, sgd)
    x, y = torch.randn(5, 6, dtype=D), torch.randint(0, 3, (5,))
    micro_batch = MicroBatch(samples=x, targets=y)
    micro_batch.x = objective.make_input(spec, block, micro_batch)
    block.run_forward(micro_batch)
    [(loss, _)] = objective.backward_pairs(spec, block, micro_batch)
    assert torch.equal(loss, cross_entropy(block.layers["head"](x), y))


def test_virtual_nodes_aggregate_the_training_nodes_of_their_class(tmp_path: Path) -> None:
    """Block 0 of a GCN: v_c = relu(W mean of {its features, its members} + b); loss of 8 nodes."""
    run = graph_run(write_graph(tmp_path / "small.h5"), objective={"name": "forward-gnn"})
    job = build_rank(make_plan(run, 1), Comm(SingleBackend()))
    engine, block = job.engine, job.engine.blocks[0]
    dataset, nodes = job.train_loader.dataset, torch.arange(NODES)
    x, y = dataset.inputs(nodes.numpy()).to(D), dataset.targets(nodes.numpy())
    micro_batch = MicroBatch(
        targets=y, samples=x, other_samples=(nodes,), task=engine.engine_spec.task
    )
    spec = engine.block_specs[0]
    forward_micro_batch(
        engine.objective, spec, block, micro_batch, saved_tensors=engine.saved_tensors
    )
    weight, bias = block.parameters["conv1.linear.weight"], block.parameters["conv1.linear.bias"]
    parts = arrays()
    assert block.head is not None
    features: Tensor = next(block.head.buffers())
    for label in range(CLASSES):
        members = [n for n in parts["train"] if parts["y"][n] == label]
        mean = torch.cat([features[label : label + 1], x[members]]).mean(0)
        expected = (weight @ mean + bias).relu()
        torch.testing.assert_close(micro_batch.y[NODES + label], expected)
    [(loss, _)] = backward_pairs(engine.objective, spec, block, micro_batch, engine.saved_tensors)
    scores = micro_batch.y[:NODES] @ micro_batch.y[NODES:].T
    expected = cross_entropy(scores[y != IGNORED], y[y != IGNORED])
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("objective.temperature-not-positive", {"objective__temperature": 0.0}),
        (
            "objective.virtual-nodes-not-real",
            {
                "data": {"name": "tests.graph_nets:masked_tokens"},
                "model": {"name": "tests.graph_nets:MaskedMean"},
            },
        ),
        ("task.objective-needs-classes", {"task__loss": "mse"}),
    ],
)
def test_what_has_no_virtual_node_is_refused(key: str, changes: dict[str, Any]) -> None:
    with refuses(ConfigError, key):
        make_plan(tiny.run(objective__name="forward-gnn", **changes), 1)
