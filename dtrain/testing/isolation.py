"""Watch the parameters of all blocks while one block computes, and follow routes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dtrain.block.block import Block
from dtrain.schedules.actions import Route

ParameterName = tuple[int, str]
"""Block and name of a parameter."""


def watch_blocks(
    blocks: Mapping[int, Block],
    on_fault: Callable[[str, set[ParameterName]], None] = lambda place, names: None,
) -> set[ParameterName]:
    """Watch backward and update of all blocks; return the set of parameters that they change.

    A parameter whose gradient changes counts as changed. The set grows while the blocks train.

    Parameters
    ----------
    on_fault : callable, optional
        Called with "backward of block 1" and the like, and with the parameters of other blocks that
        it has changed: gradients or weights.
    """
    changed: set[ParameterName] = set()
    for index in blocks:
        for method in ("backward", "update"):
            _watch(blocks, index, method, changed, on_fault)
    return changed


def _watch(
    blocks: Mapping[int, Block],
    index: int,
    method: str,
    changed: set[ParameterName],
    on_fault: Callable[[str, set[ParameterName]], None],
) -> None:
    original: Callable[..., None] = getattr(blocks[index], method)

    def watched(*args: Any) -> None:
        before = _parameter_states(blocks)
        original(*args)
        after = _parameter_states(blocks)
        names = {name for name, state in after.items() if state != before[name]}
        others = {name for name in names if name[0] != index}
        if others:
            on_fault(f"{method} of block {index}", others)
        changed.update(names)

    setattr(blocks[index], method, watched)


def _parameter_states(blocks: Mapping[int, Block]) -> dict[ParameterName, tuple[int, int, int]]:
    """Return the versions of all parameters and gradients, which every change of them changes."""
    return {
        (index, name): (
            parameter._version,
            id(parameter.grad),
            -1 if parameter.grad is None else parameter.grad._version,
        )
        for index, block in blocks.items()
        for name, parameter in block.parameters.items()
    }


def reached_blocks(routes: Sequence[Route], source: int) -> set[int]:
    """Return the blocks that messages from a block reach, directly or through others."""
    reached, frontier = {source}, [source]
    while frontier:
        block = frontier.pop()
        targets = {route.target.block for route in routes if route.source.block == block} - reached
        reached |= targets
        frontier += targets
    return reached
