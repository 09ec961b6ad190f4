"""A layout as text and as plain values: for comparisons of ranks, and for `dtrain plan --json`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

from dtrain import partition
from dtrain.planning.layout import Layout
from dtrain.schedules.update_lags import TIED_GRADIENT, tied_routes


def layout_rows(layout: Layout) -> dict[str, str]:
    """Return everything in which the layouts of all ranks must agree, as text by description."""
    mesh = layout.mesh
    rows = {
        "the mesh": f"{mesh.stages} stages x {mesh.replicas} replicas, {mesh.placement}",
        "the objective": repr(layout.objective),
        "the schedule": repr(layout.schedule),
        "the number of layers": str(len(layout.layer_specs)),
    }
    for number, spec in enumerate(layout.layer_specs):
        rows[f"layer {number}"] = (
            f"'{spec.name}' from {spec.input_shape} to {spec.output_shape} {spec.dtype} with "
            f"{spec.parameters} parameters"
        )
    rows["the cuts"] = str(list(layout.cuts))
    rows["the stages of the blocks"] = str(list(layout.place))
    for block in layout.block_layouts:
        rows[f"block {block.spec.index}"] = (
            f"layers {[spec.name for spec in block.layer_specs]} with "
            f"{block.parameters + block.head_parameters} parameters"
        )
    return rows


def describe(layout: Layout, rows: int) -> dict[str, Any]:
    """Return the layout as plain values, with messages for micro-batches of `rows` samples, and
    those of an update."""
    return {
        "ranks": layout.mesh.ranks,
        "replicas": layout.mesh.replicas,
        "stages": layout.mesh.stages,
        "placement": layout.mesh.placement,
        "shares": list(layout.mesh.shares),
        "cuts": list(layout.cuts),
        "place": list(layout.place),
        "blocks": [
            {
                "block": block.spec.index,
                "stage": layout.place[block.spec.index],
                "layers": [layout.layer_specs[i].name for i in block.layers],
                "parameters": block.parameters,
                "head_parameters": block.head_parameters,
                "multiply_adds": block.cost,
                "frozen": block.frozen,
            }
            for block in layout.block_layouts
        ],
        "imbalance": partition.imbalance(layout.stage_costs()),
        "messages": [*_message_rows(layout, rows), *_tied_rows(layout)],
    }


def _message_rows(layout: Layout, rows: int) -> Iterator[dict[str, Any]]:
    """Yield the messages of a micro-batch of `rows` samples as plain values."""
    for route, size in layout.messages(rows):
        ends = route.source.block, route.target.block
        is_sent = layout.place[ends[0]] != layout.place[ends[1]]
        per = "update" if route.once_per_update else "micro-batch"
        if route.every > 1:
            per = f"{route.every} updates"
        yield _message_row(layout, route.name, ends, size, is_sent, per)


def _tied_rows(layout: Layout) -> Iterator[dict[str, Any]]:
    """Yield the messages of tied parameters as plain values: from every copy to every other one.

    A rank with several copies receives the gradient of another rank once.
    """
    for tie in layout.ties:
        name = f"{TIED_GRADIENT}:{tie.copies[0].name}"
        routes = tied_routes(tie.blocks, layout.place, layout.tied_cycles)
        sent = {(route.source.block, route.target.block) for route in routes}
        for ends in permutations(tie.blocks, 2):
            yield _message_row(layout, name, ends, tie.nbytes, ends in sent, "update")


def _message_row(
    layout: Layout, name: str, ends: tuple[int, int], size: int, is_sent: bool, per: str
) -> dict[str, Any]:
    source, target = ends
    return {
        "route": name,
        "from_block": source,
        "from_stage": layout.place[source],
        "to_block": target,
        "to_stage": layout.place[target],
        "bytes": size,
        "per": per,
        "wire": is_sent,
    }
