"""8-bit messages between blocks: their error, their bytes, and that no layout changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.comm.wire_format import EXACT, WireFormat
from dtrain.config.run import RunConfig
from dtrain.planning.plan import make_plan
from dtrain.planning.report import plan_table
from dtrain.schedules.actions import Point, Route
from tests import tiny
from tests.harness import train_in_threads
from tests.outcome import close
from tests.ranks.killed import killed

ROUTE = Route(Point(0, "F"), Point(1, "F"), "activation")
INT8 = WireFormat("int8")


def make_run(
    objective: str = "mono-forward", compression: str = "int8", **changes: Any
) -> RunConfig:
    """Return a run of four blocks whose messages are compressed."""
    partition = {"blocks": 4, "activation-compression": compression}
    return tiny.run(objective__name=objective, partition=partition, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_of_a_row_is_that_of_a_byte(dtype: torch.dtype) -> None:
    """Within half a step of the largest magnitude; zeros and that magnitude are exact."""
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1], x[2, 0, :7] = 0, 0
    x[3] *= 1e-3
    spec = tuple(x.shape), dtype
    data = INT8.encode(ROUTE, x)
    assert (tuple(data.shape), data.dtype) == ((5, 124), torch.uint8)
    assert INT8.encoded_spec(ROUTE, spec) == ((5, 124), torch.uint8)
    decoded = INT8.decode(ROUTE, data, spec)
    assert (decoded.shape, decoded.dtype) == (x.shape, dtype)
    scale = x.abs().flatten(1).amax(1).view(-1, 1, 1)
    assert ((decoded - x).abs() <= 0.0075 * scale).all()
    assert decoded[1].eq(0).all()
    assert decoded[2, 0, :7].eq(0).all()
    largest = x.abs() == scale
    torch.testing.assert_close(decoded[largest], x[largest], rtol=1e-6, atol=0)
    again = INT8.decode(ROUTE, INT8.encode(ROUTE, decoded), spec)
    assert torch.equal(again, decoded)


def test_a_row_is_quantised_by_itself() -> None:
    x = torch.randn(6, 17, generator=torch.Generator().manual_seed(1))
    data = INT8.encode(ROUTE, x)
    assert torch.equal(data, torch.cat([INT8.encode(ROUTE, part) for part in x.split(2)]))


def test_labels_weights_and_exact_messages_are_sent_unchanged() -> None:
    labels, x = torch.arange(4), torch.randn(4, 3)
    weights = Route(Point(1, "U"), Point(0, "U"), "weight")
    for wire_format, route, tensor in (
        (INT8, ROUTE, labels),
        (INT8, ROUTE, labels.double()),
        (INT8, weights, x),
        (EXACT, ROUTE, x),
    ):
        spec = tuple(tensor.shape), tensor.dtype
        assert wire_format.encode(route, tensor) is tensor
        assert wire_format.decode(route, tensor, spec) is tensor
        assert wire_format.encoded_spec(route, spec) == spec


@pytest.mark.parametrize("objective", tiny.PATTERNS)
def test_any_number_of_stages_trains_the_same_bits(objective: str, tmp_path: Path) -> None:
    digests = set()
    for stages in (1, 2, 4):  # one micro-batch: some schedules update after each
        run = make_run(objective, mesh__stages=stages, micro_batches=1)
        digests.add(train_in_threads(run, tmp_path / str(stages), stages)["digest"])
    assert len(digests) == 1
    exact = make_run(objective, "exact", mesh__stages=1, micro_batches=1)
    assert train_in_threads(exact, tmp_path / "exact", 1)["digest"] not in digests


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    """A value next to a boundary may be rounded to its other side, one step away."""
    for micros in (1, 4):
        run = make_run("backprop", micro_batches=micros, mesh__stages=1)
        train_in_threads(run, tmp_path / str(micros), 1)
    close(tmp_path / "1", tmp_path / "4", 1e-9)


@pytest.mark.parametrize("objective", ["mono-forward", "backprop"])
def test_bytes_are_one_per_number_and_four_per_sample(objective: str, tmp_path: Path) -> None:
    """As counted, and as planned; outputs, and gradients, cross three boundaries of blocks."""
    run = make_run(objective, mesh__stages=4)
    summary = train_in_threads(run, tmp_path, 4)
    plan = make_plan(run, 4)
    widths = [part.spec.output_shape[0] for part in plan.layout.block_layouts[:-1]]
    message_widths = 2 * widths if objective == "backprop" else widths
    assert summary["bytes_intra_node"] == summary["samples"] * sum(w + 4 for w in message_widths)
    table = plan_table(plan)
    assert [message["bytes"] for message in table["messages"]] == [
        table["rows_per_micro"] * (width + 4) for width in message_widths
    ]


def test_killed_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    uninterrupted = make_run(mesh__stages=1, epochs=2)
    run = make_run(mesh__stages=1, epochs=2, checkpoint__every=1)
    killed(run, tmp_path / "parts", 3, "ab")
    resumed = train_in_threads(run, tmp_path / "parts", 1, 2, hosts="ab")
    whole = train_in_threads(uninterrupted, tmp_path / "whole", 1, 2, hosts="ab")
    assert resumed["digest"] == whole["digest"]
