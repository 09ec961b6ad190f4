"""The memory that a run's data take on a node, and the parts that are read from disk.

Invariant: once the data of a run are held, the figures are those of this node; before that, they
are what this machine could hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch

from dtrain.data.memory_limits import available_bytes
from dtrain.data.node_memory import choose_held, stored_arrays
from dtrain.data.reading.loader import read_ahead_bytes
from dtrain.planning.formatting import size_text
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import Plan

PROCESS_BYTES = 250_000_000
"""Memory of a process beside all that a plan counts: Python, torch and the MPI library. Measured
after their import: 220 to 300 MB."""


FILE_CACHE_BYTES = 8 << 20
"""Chunks that HDF5 keeps of each dataset: from version 2.0 on."""


@final
@dataclass(frozen=True)
class DataMemory:
    """Bytes of a run's data by where they are.

    Attributes
    ----------
    node : int
        In memory, once per node.
    rank : int
        In the memory of each rank that reads them: small arrays, and those that the user's code
        holds anyway.
    mapped : int
        In files that are mapped into memory: the kernel holds what fits, once per node.
    disk : int
        Read piece by piece.
    piece : int
        Most bytes that a rank has in memory of what is read piece by piece.
    process : int
        Memory of a rank's process and of its workers, beside all that is counted.
    """

    node: int
    rank: int
    mapped: int
    disk: int
    piece: int
    process: int = PROCESS_BYTES

    def to_dict(self) -> dict[str, int]:
        """Return plain values."""
        return {f"{name}_bytes": size for name, size in asdict(self).items()}

    def to_text(self) -> str:
        """Return where the data are, for people; empty if nothing is known."""
        parts = {
            "held once per node": self.node,
            "in the memory of each rank that reads them": self.rank,
            "in files that are mapped into memory": self.mapped,
            f"read from disk in pieces, at most {size_text(self.piece)} per rank": self.disk,
        }
        return "; ".join(f"{size_text(size)} {place}" for place, size in parts.items() if size)


def plan_data_memory(plan: Plan) -> DataMemory:
    """Return where the data of a run are, or will be on a machine like this one."""
    arrays = stored_arrays(plan.data.by_name())
    given = plan.run.dataset.target
    held = choose_held(
        [array for array in arrays if not array.dataset.stays_on_disk],
        available_bytes(),
        owned=given is None or callable(given),
    )
    sizes = dict.fromkeys(("node", "rank", "mapped", "disk"), 0)
    for array in arrays:
        sizes["node" if array in held else array.place] += array.source.stored_bytes
    on_disk = {a.split for a in arrays if a not in held and a.place == "disk"}
    rows = plan.batch_splitter.largest_micro_batch
    piece = sum(
        FILE_CACHE_BYTES
        + read_ahead_bytes(split, rows, plan.layout.dtype, workers=plan.run.data.workers)
        for name, split in plan.data.by_name().items()
        if name in on_disk
    )
    return DataMemory(**sizes, piece=piece, process=PROCESS_BYTES * (1 + plan.run.data.workers))


def data_warnings(plan: Plan, data: DataMemory, peak: int) -> Iterator[str]:
    """Yield a warning if the largest rank and the data of its node need more memory than this
    machine has. The number of ranks on a node is not known before a run starts."""
    if not data.node or _is_on_accelerator(plan):
        return
    available = available_bytes()
    if data.node + peak > available:
        yield (
            f"a node holds {size_text(data.node)} of data and a rank needs {size_text(peak)}, but "
            f"this machine has {size_text(available)} available: use more stages, smaller "
            "micro-batches or nodes with more memory"
        )


def node_warnings(
    plan: Plan, nodes: Sequence[Sequence[int]], available: Sequence[int]
) -> list[str]:
    """Return a warning for each node whose ranks need more memory than there is beside the data.

    Parameters
    ----------
    nodes : sequence of sequence of int
        The ranks of each node.
    available : sequence of int
        Bytes that each rank may still use, now that the node holds its data.
    """
    if _is_on_accelerator(plan):
        return []
    peaks = [memory.peak for memory in MemoryPlan(plan).rank_memory()]
    warnings = []
    for index, ranks in enumerate(nodes):
        needed, left = sum(peaks[rank] for rank in ranks), min(available[rank] for rank in ranks)
        if needed > left:
            warnings.append(
                f"the {len(ranks)} ranks of node {index} need {size_text(needed)}, but "
                f"{size_text(left)} are available beside the data that the node holds: use fewer "
                "ranks per node, or smaller micro-batches"
            )
    return warnings


def _is_on_accelerator(plan: Plan) -> bool:
    device = plan.run.settings.device
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def data_lines(data: dict[str, Any], memory: Sequence[dict[str, Any]]) -> list[str]:
    """Return the section on data of a plan: where they are, and the sum with all ranks."""
    figures = DataMemory(**{name.removesuffix("_bytes"): size for name, size in data.items()})
    text = figures.to_text()
    if not text:
        return []
    each = figures.rank + figures.piece + figures.process
    ranks = sum(int(row["peak_bytes"]) + each for row in memory)
    noun = "rank" if len(memory) == 1 else "ranks"
    return [
        "",
        "Data",
        text,
        f"{figures.node + ranks:,} bytes with {len(memory):,} {noun} on one node, "
        f"{size_text(figures.process)} of them per rank for Python, torch and MPI",
    ]
