"""Eight bits between blocks: what arrives, what it weighs, and that no layout changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.wire_format import EXACT, WireFormat
from dtrain.config.run import RunConfig
from dtrain.planning.plan import make_plan
from dtrain.planning.report import plan_table
from dtrain.schedules.actions import Point, Route
from dtrain.train import train
from tests import tiny
from tests.outcome import close
from tests.ranks.killed import killed
from tests.ranks.sync_runs import train_on as trained

ROUTE = Route(Point(0, "F"), Point(1, "F"), "activation")
CODED = WireFormat("int8")


def run(objective: str = "mono-forward", wire: str = "int8", **told: Any) -> RunConfig:
    """Return a run of four blocks whose messages are coded."""
    return tiny.run(
        objective__name=objective, partition={"blocks": 4, "activation-compression": wire}, **told
    )


def on(run: RunConfig, out: Path, count: int) -> dict[str, Any]:
    return ranks(count, lambda comm: train(run, comm, out))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_comes_as_near_as_a_byte_can_be(dtype: torch.dtype) -> None:
    """Within half a step of its largest magnitude; zeros and that magnitude are exact."""
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1], x[2, 0, :7] = 0, 0
    x[3] *= 1e-3
    spec = tuple(x.shape), dtype
    data = CODED.encode(ROUTE, x)
    assert (
        (tuple(data.shape), data.dtype)
        == CODED.encoded_spec(ROUTE, spec)
        == ((5, 124), torch.uint8)
    )
    found = CODED.decode(ROUTE, data, spec)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    most = x.abs().flatten(1).amax(1).view(-1, 1, 1)
    assert ((found - x).abs() <= 0.0075 * most).all()
    assert found[1].eq(0).all()
    assert found[2, 0, :7].eq(0).all()
    largest = x.abs() == most
    torch.testing.assert_close(found[largest], x[largest], rtol=1e-6, atol=0)
    again = CODED.decode(ROUTE, CODED.encode(ROUTE, found), spec)
    assert torch.equal(again, found)


def test_a_row_is_coded_by_itself() -> None:
    x = torch.randn(6, 17, generator=torch.Generator().manual_seed(1))
    whole = CODED.encode(ROUTE, x)
    assert torch.equal(whole, torch.cat([CODED.encode(ROUTE, part) for part in x.split(2)]))


def test_labels_weights_and_exact_messages_travel_as_they_are() -> None:
    labels, x = torch.arange(4), torch.randn(4, 3)
    weights = Route(Point(1, "U"), Point(0, "U"), "weight")
    for parcel, route, tensor in (
        (CODED, ROUTE, labels),
        (CODED, ROUTE, labels.double()),
        (CODED, weights, x),
        (EXACT, ROUTE, x),
    ):
        spec = tuple(tensor.shape), tensor.dtype
        assert parcel.encode(route, tensor) is tensor
        assert parcel.decode(route, tensor, spec) is tensor
        assert parcel.encoded_spec(route, spec) == spec


@pytest.mark.parametrize("objective", tiny.PATTERNS)
def test_any_number_of_stages_trains_the_same_bits(objective: str, tmp_path: Path) -> None:
    one: dict[str, Any] = {"micro_batches": 1}  # some schedules update after each
    told = {n: on(run(objective, mesh__stages=n, **one), tmp_path / str(n), n) for n in (1, 2, 4)}
    assert len({each["digest"] for each in told.values()}) == 1
    exact = on(run(objective, "exact", mesh__stages=1, **one), tmp_path / "exact", 1)
    assert exact["digest"] != told[1]["digest"]


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    """A value next to a border may fall to its other side, one step away."""
    for micros in (1, 4):
        asked = run("backprop", micro_batches=micros, mesh__stages=1)
        on(asked, tmp_path / str(micros), 1)
    close(tmp_path / "1", tmp_path / "4", 1e-9)


@pytest.mark.parametrize("objective", ["mono-forward", "backprop"])
def test_bytes_are_one_per_number_and_four_per_sample(objective: str, tmp_path: Path) -> None:
    """As counted, and as planned; the blocks' outputs cross three borders, gradients too."""
    asked = run(objective, mesh__stages=4)
    told = on(asked, tmp_path, 4)
    layout = make_plan(asked, 4).layout
    widths = [part.spec.output_shape[0] for part in layout.block_layouts[:-1]]
    ways = 2 if objective == "backprop" else 1
    assert told["bytes_intra_node"] == ways * told["samples"] * sum(w + 4 for w in widths)
    table = plan_table(make_plan(asked, 4))
    assert [each["bytes"] for each in table["messages"]] == [
        table["rows_per_micro"] * (w + 4) for w in [*widths, *widths[: len(widths) * (ways - 1)]]
    ]


def test_killed_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    told = {"mesh__stages": 1, "epochs": 2}
    whole = trained(run(**told), tmp_path / "whole", "ab")
    killed(run(checkpoint__every=1, **told), tmp_path / "parts", 3, "ab")
    again = trained(run(checkpoint__every=1, **told), tmp_path / "parts", "ab")
    assert again["digest"] == whole["digest"]
