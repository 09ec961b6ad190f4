"""Skipped updates: a block keeps its weights where a loss or a gradient is NaN or infinite.

Invariant: the ranks that share an update decide together, before gradients are averaged, so nothing
that is not finite reaches weights, optimizers or syncs. Blocks share an update where a gradient
goes through all of them; otherwise each block decides with its replicas.

::

    last backward -> finite? --all yes--> averages -> clip -> optimizer step
                        |
                        +---one no------> gradients dropped, buffers as after the last step
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.complex_tensors import real_view
from dtrain.comm.communicator import Comm
from dtrain.comm.groups import ProcessGroups
from dtrain.errors import NumericalError
from dtrain.syncs.base import Sync

MAX_REASONS = 10
"""Skipped updates of a segment of which a rank keeps the reason."""


@dataclass
class SkipCounts:
    """The skipped updates of one block, the same on all its replicas.

    Attributes
    ----------
    total, in_a_row : int
        Over the run, and since the last update with a step.
    """

    total: int = 0
    in_a_row: int = 0


@dataclass(frozen=True)
class SkipReason:
    """The reason why one block was not updated.

    Attributes
    ----------
    kind : str
        The value that is not finite.
    """

    update: int
    block: int
    kind: Literal["loss", "gradient"]
    text: str


@final
class SkippedUpdates:
    """Decides on one rank which updates its blocks skip.

    Parameters
    ----------
    shares_updates : bool
        Whether all blocks of the run skip the same updates.
    groups : ProcessGroups
        The communicators of this rank.
    limit : int
        Updates in a row that may be skipped.

    Attributes
    ----------
    counts : dict of int to SkipCounts
        By block of this rank.
    reasons : list of SkipReason
        Those of this rank in the segment.
    """

    def __init__(
        self,
        blocks: Mapping[int, Block],
        syncs: Mapping[int, Sync],
        shares_updates: bool,
        groups: ProcessGroups,
        limit: int,
    ) -> None:
        self.counts = {index: SkipCounts() for index in blocks}
        self.reasons: list[SkipReason] = []
        self._blocks = blocks
        self._syncs = syncs
        self._limit = limit
        self._first_block = min(blocks)
        self._all_ranks = groups.control.dup("skipped updates") if shares_updates else None
        self._found: dict[tuple[int, int], SkipReason] = {}
        self._shared_decision = False
        self._kept_buffers: dict[int, dict[str, Tensor]] = {}

    def start_segment(self) -> None:
        """Copy the buffers from which the segment starts."""
        self.reasons.clear()
        self._found.clear()
        for index in self._blocks:
            buffers = self._blocks[index].buffers.items()
            self._kept_buffers[index] = {name: b.detach().clone() for name, b in buffers}

    def note(self, reason: SkipReason) -> None:
        """Note that a value of a block is not finite in an update; the first reason is kept."""
        self._found.setdefault((reason.block, reason.update), reason)

    def decide(self, block: int, update: int) -> bool:
        """Return whether a block skips an update; its backward is complete.

        Collective over the ranks that share the update.

        Raises
        ------
        NumericalError
            More updates in a row were skipped than the limit.
        """
        if self._all_ranks is None:
            self._check_gradients(block, update)
            is_skipped = _any_rank(self._syncs[block].replicas, (block, update) in self._found)
        elif block == self._first_block:
            for index in self._blocks:
                self._check_gradients(index, update)
            own = any((index, update) in self._found for index in self._blocks)
            is_skipped = self._shared_decision = _any_rank(self._all_ranks, own)
        else:
            is_skipped = self._shared_decision
        self._count(block, update, is_skipped)
        return is_skipped

    def keep_buffers(self, block: int) -> None:
        """Copy the buffers of a block after a step, if they are finite."""
        buffers = self._blocks[block].buffers
        if buffers and _first_not_finite(buffers) is None:
            for name, copy in self._kept_buffers[block].items():
                copy.copy_(buffers[name])

    def restore_buffers(self, block: int) -> None:
        """Set the buffers of a block to those after its last step."""
        buffers = self._blocks[block].buffers
        for name, copy in self._kept_buffers[block].items():
            buffers[name].data.copy_(copy)  # a backward in flight may have saved the buffer

    def _check_gradients(self, block: int, update: int) -> None:
        gradients = self._blocks[block].parameters.items()
        name = _first_not_finite({n: p.grad for n, p in gradients if p.grad is not None})
        if name is not None:
            text = f"the gradient of '{name}' is not finite"
            self.note(SkipReason(update, block, "gradient", text))

    def _count(self, block: int, update: int, is_skipped: bool) -> None:
        counts, reason = self.counts[block], self._found.pop((block, update), None)
        if reason is not None and len(self.reasons) < MAX_REASONS:
            self.reasons.append(reason)
        counts.in_a_row = counts.in_a_row + 1 if is_skipped else 0
        counts.total += is_skipped
        if counts.in_a_row > self._limit:
            text = "that of another rank is not finite" if reason is None else reason.text
            raise NumericalError(
                "training.too-many-skipped-updates",
                f"block {block} skipped {counts.in_a_row} updates in a row, more than [numerics] "
                f"max-skipped ({text}): "
                "lower [optimizer] lr, or set clip",
            )

    def state(self) -> dict[int, list[int]]:
        """Return the counts by block, as plain values."""
        return {block: [each.total, each.in_a_row] for block, each in self.counts.items()}

    def restore(self, state: Mapping[str, Iterable[int]]) -> None:
        """Continue the counts of a checkpoint, which are those of all blocks."""
        self.counts |= {
            block: SkipCounts(*state[str(block)]) for block in self.counts if str(block) in state
        }


def skip_records(reasons: Iterable[SkipReason]) -> list[dict[str, Any]]:
    """Return reasons as plain values."""
    return [asdict(reason) for reason in reasons]


def _any_rank(comm: Comm, flag: bool) -> bool:
    return flag if comm.size == 1 else any(comm.allgather_object(flag))


def _first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity, None without one."""
    reals = {name: real_view(tensor.detach()) for name, tensor in tensors.items()}
    reals = {name: t for name, t in reals.items() if t.numel() and t.is_floating_point()}
    if not reals:
        return None
    # The extremes are NaN if any element is; they are faster than `isfinite`.
    extremes = [torch.stack(tensor.aminmax()).double() for tensor in reals.values()]
    is_finite = torch.stack(extremes).isfinite().all(1).tolist()
    return next((n for n, finite in zip(reals, is_finite, strict=True) if not finite), None)
