"""Local objectives where a target has positions: the identities with their rows, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError, DataError
from dtrain.objectives.base import ERROR, Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.aux_heads import NetworkHead
from dtrain.objectives.common.reconstruction import Reconstruction
from dtrain.objectives.deep_supervision import DeepSupervision
from dtrain.objectives.dfa import Dfa
from dtrain.objectives.infopro import InfoPro
from dtrain.objectives.local_head import LocalHead
from dtrain.objectives.mono_forward import MonoForward
from dtrain.rng import seeded
from dtrain.tasks.task import Task
from tests.refusals import refuses

D = torch.float64
ROWS, POSITIONS, WIDTH, CLASSES, IGNORED = 5, 4, 6, 3, 7
HEADS: list[Objective] = [
    LocalHead(),
    LocalHead("dgl", "none", hidden=1),
    LocalHead("dgl", "batch", hidden=1),
    LocalHead("1c2f"),
    MonoForward(),
    InfoPro(lambda_first=(0.0, 1.0)),
    InfoPro("greedy", lambda_first=(0.0, 1.0)),
]
LAYOUTS = {
    "steps": ((POSITIONS, WIDTH), (CLASSES, POSITIONS), False),
    "steps, classes last": ((POSITIONS, WIDTH), (POSITIONS, CLASSES), True),
    "channels first": ((WIDTH, POSITIONS), (CLASSES, POSITIONS), False),
    "channels first, classes last": ((WIDTH, POSITIONS), (POSITIONS, CLASSES), True),
}
every_head = pytest.mark.parametrize("objective", HEADS, ids=lambda o: type(o).__name__)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def position_spec(layout: str, **changes: Any) -> BlockSpec:
    """Return the spec of an earlier block whose targets have positions, some of them ignored."""
    inner, outer, classes_last = LAYOUTS[layout]
    task = Task(classes_last=classes_last, ignore_index=IGNORED).bind(
        (POSITIONS,), torch.int64, CLASSES
    )
    spec = BlockSpec(0, 2, inner, inner, D, CLASSES, prediction_shape=outer, task=task)
    return replace(spec, **changes)


ROW_SPEC = BlockSpec(0, 2, (WIDTH,), (WIDTH,), D, CLASSES)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Outputs (rows, positions, width) and targets (rows, positions), one row without any."""
    with seeded("batch"):
        h, y = torch.randn(ROWS, POSITIONS, WIDTH, dtype=D), torch.randint(3, (ROWS, POSITIONS))
    y[1], y[2, :2] = IGNORED, IGNORED
    return h, y


def make_head(objective: Objective, spec: BlockSpec) -> nn.Module:
    with seeded("head"):
        head = objective.make_head(spec)
    assert head is not None
    return head.to(D)


def head_gradients(
    objective: Objective, spec: BlockSpec, h: Tensor, y: Tensor, task: Task
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the loss of an earlier block, the gradients of its head, and that at its output."""
    h = h.clone().requires_grad_()
    block = Block(0, {"layer": nn.Identity()}, make_head(objective, spec), sgd)
    micro_batch = MicroBatch(h, h, y, task=task)
    [(loss, scale)] = objective.backward_pairs(spec, block, micro_batch)
    weights = [p for p in block.trainable_parameters if p.requires_grad]
    *ours, at_output = torch.autograd.grad([loss], [*weights, h], [scale])
    return loss.detach(), ours, at_output


@every_layout
@every_head
def test_a_head_on_positions_is_the_head_on_as_many_rows(
    objective: Objective, layout: str, batch: tuple[Tensor, Tensor]
) -> None:
    """The loss and all gradients, with the positions that do not count left out of the rows."""
    h, y = batch
    spec, channels = position_spec(layout), 1 if layout.startswith("channels") else -1
    if isinstance(objective, NetworkHead | Reconstruction) and objective.norm == "batch":
        y = y.clamp(max=2)  # batch statistics are over all positions
    counted = (y != IGNORED).flatten()
    loss, ours, at_output = head_gradients(objective, spec, h.movedim(-1, channels), y, spec.task)
    rows = h.reshape(-1, WIDTH)[counted]
    labels = y.flatten()[counted]
    expected, theirs, at_rows = head_gradients(objective, ROW_SPEC, rows, labels, Task())
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for mine, other in zip(ours, theirs, strict=True):  # a convolution has dimensions of size 1
        torch.testing.assert_close(mine.view(other.shape), other, rtol=1e-12, atol=1e-15)
    at_output = at_output.movedim(channels, -1).reshape(-1, WIDTH)
    torch.testing.assert_close(at_output[counted], at_rows, rtol=1e-12, atol=1e-15)
    assert not at_output[~counted].any()


@pytest.mark.parametrize(
    "objective", [*HEADS, Dfa(per_position=True), DeepSupervision("dgl", "none")]
)
def test_one_block_on_positions_is_backpropagation(
    objective: Objective, batch: tuple[Tensor, Tensor]
) -> None:
    h, y = batch
    spec = position_spec("steps, classes last", blocks=1)
    with seeded("layer"):
        layer = nn.Linear(WIDTH, CLASSES).to(D)
    block = Block(0, {"layer": layer}, objective.make_head(spec), sgd)
    micro_batch = MicroBatch(h, block.forward(h, ()), y, task=spec.task)
    block.backward(objective.backward_pairs(spec, block, micro_batch))
    loss = cross_entropy(layer(h).movedim(-1, 1), y, ignore_index=IGNORED)
    expected = torch.autograd.grad(loss, list(layer.parameters()))
    assert all(map(torch.equal, block.gradients(), expected))


@every_layout
def test_dfa_projects_the_error_of_each_position(layout: str, batch: tuple[Tensor, Tensor]) -> None:
    """e_p B / sqrt(d) at position p, with one matrix B (C, d) for all positions."""
    h, y = batch
    channels = 1 if layout.startswith("channels") else -1
    objective, spec = Dfa(per_position=True), position_spec(layout)
    head = make_head(objective, spec)
    assert head.feedback.shape == (CLASSES, WIDTH)
    block = Block(0, {"layer": nn.Identity()}, head, sgd)
    with seeded("error"):
        error = torch.randn(ROWS, POSITIONS, CLASSES, dtype=D)
    sent = error if spec.task.classes_last else error.movedim(-1, 1)
    y_block = h.movedim(-1, channels)
    micro_batch = MicroBatch(h, y_block, y, task=spec.task, received={ERROR: sent.flatten(1)})
    [(tensor, cotangent)] = objective.backward_pairs(spec, block, micro_batch)
    assert tensor is y_block
    expected = (error @ head.feedback) / WIDTH**0.5
    torch.testing.assert_close(cotangent.movedim(channels, -1), expected, rtol=1e-14, atol=1e-16)


def test_a_matrix_per_position_needs_positions_that_fit() -> None:
    with refuses(ConfigError, "objective.no-positions"):
        Dfa(per_position=True).build_head(ROW_SPEC)
    coarse = replace(position_spec("channels first"), output_shape=(WIDTH, 2))
    with refuses(ConfigError, "task.head-positions"):
        Dfa(per_position=True).build_head(coarse)
    [warning] = Dfa().warnings([position_spec("steps", output_shape=(4, 10**6))], 1)
    assert "per-position" in warning
    assert "48,000,000" in warning
    assert not Dfa(per_position=True).warnings([position_spec("steps")], 1)


def token_spec() -> BlockSpec:
    """Return the spec of a language model's block: the samples are tokens, as the targets are."""
    tokens: dict[str, Any] = {"sample_shape": (POSITIONS,), "integer_samples": True}
    return position_spec("steps, classes last", **tokens)


def test_tokens_are_reconstructed_by_their_cross_entropy(batch: tuple[Tensor, Tensor]) -> None:
    """A sample counts as it does in the loss, so any split into micro-batches adds up."""
    h, y = batch
    objective, spec = InfoPro("greedy", lambda_first=(1.0, 0.0)), token_spec()
    head = make_head(objective, spec)
    with seeded("tokens"):
        tokens = torch.randint(CLASSES, (ROWS, POSITIONS))

    def loss_of(rows: slice, loss_scale: float) -> Tensor:
        block = Block(0, {"layer": nn.Identity()}, head, sgd)
        micro_batch = MicroBatch(
            h[rows], h[rows], y[rows], loss_scale, samples=tokens[rows], task=spec.task
        )
        [(loss, scale)] = objective.backward_pairs(spec, block, micro_batch)
        return loss * scale

    counts = (y != IGNORED).sum(1).to(D)
    [linear] = [module for module in head.modules() if isinstance(module, nn.Linear)]
    losses = cross_entropy(linear(h).movedim(-1, 1), tokens, reduction="none").mean(1)
    expected = (losses * counts).sum() / counts.sum()
    torch.testing.assert_close(loss_of(slice(None), 1.0), expected, rtol=1e-13, atol=0)
    parts = [slice(0, 2), slice(2, 5)]
    split = [loss_of(part, float(counts[part].sum() / counts.sum())) for part in parts]
    torch.testing.assert_close(sum(split), expected, rtol=1e-13, atol=0)
    tokens[0, 0] = CLASSES
    with refuses(DataError, "objective.token-out-of-range"):
        loss_of(slice(None), 1.0)
