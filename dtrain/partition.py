"""Cuts and places: which layers form a block, and which stage holds a block.

Invariant: cuts are a pure function of what is asked, never of the number of ranks; so *what* is
learnt follows from the cuts, and only *how fast* from the places.

    layers   fc1  fc2  fc3 | fc4  fc5 | fc6  head      cuts  = (3, 5)
    blocks         0       |     1    |     2          place = (0, 1, 1)
    stages         0       |          1

Both are the same problem: cut a line so that the costliest part is as cheap as possible (Pinar and
Aykanat 2004 survey it). It is solved exactly by dynamic programming in O(layers^2 * blocks):
first the smallest possible maximum, then the smallest sum of squares under it, then the earliest
cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import add

from dtrain.errors import ConfigError

# rows[i][j - i - 1] is the cost of the part that holds i .. j-1
CostRows = list[list[float]]


# one share (weight) per part, and the rows under a share; None: unweighted
BlockWeights = tuple[float | None, ...]


CostTable = Callable[[float | None], CostRows]


def cuts_from_names(names: Sequence[str], cuts: Sequence[int | str]) -> tuple[int, ...]:
    """Return the cuts that a user wrote, as layer indices.

    Parameters
    ----------
    names : sequence of str
        Names of all layers, in order.
    cuts : sequence of int or str
        Where blocks 1, 2, ... start: a layer's index or its name.

    Raises
    ------
    DtrainError
        For an unknown name, an index that is 0 or out of range, and cuts that do not ascend.
    """
    found = tuple(_index(names, cut) for cut in cuts)
    for cut, index in zip(cuts, found, strict=True):
        if not 0 < index < len(names):
            raise ConfigError(
                "todo.key",
                f"partition.cuts: no block can start at {cut!r}: block 0 starts at layer 0 by "
                f"itself, the others at layers 1 to {len(names) - 1}",
            )
    for (cut, left), (other, right) in pairwise(zip(cuts, found, strict=True)):
        if left >= right:
            what = "the same layer as" if left == right else "after"
            raise ConfigError(
                "todo.key",
                f"partition.cuts: {cut!r} (layer {left}) is {what} {other!r} (layer {right}): "
                "list each cut once, in the order of the layers",
            )
    return found


def balanced_cuts(
    layers: int,
    blocks: int,
    cost: Callable[[int, int], float],
    weights: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """Return the cuts that make the costliest block as cheap as possible.

    Among these the smallest sum of squared costs decides, then the lexicographically smallest
    cuts. The last layer (the head) is a block of its own only where `blocks == layers`.

    Parameters
    ----------
    layers, blocks : int
        How many layers there are and how many blocks to form.
    cost : callable
        `cost(i, j)` >= 0 is the cost of a block of layers i .. j-1, in any unit. It need not be
        additive, so a block's local head may be part of it. Integers are compared exactly.
    weights : sequence of float, optional
        The share of each block: its cost is divided by its weight before it is compared.

    Raises
    ------
    DtrainError
        For fewer blocks than 1 or more than layers, and for weights that are not as many as
        blocks or not positive.
    """
    if not 1 <= blocks <= layers:
        raise ConfigError(
            "todo.key",
            f"{blocks} blocks cannot be cut from {layers} layers: set blocks between 1 and {layers}",
        )
    _check_weights(blocks, weights)
    rows = [[cost(i, j) for j in range(i + 1, layers + 1)] for i in range(layers)]
    if blocks < layers:
        rows[-1] = [math.inf]
    return _optimal_cuts(rows, blocks, weights)


def layer_ranges(layers: int, cuts: Sequence[int]) -> tuple[range, ...]:
    """Return the layers of each block as ranges."""
    return tuple(range(i, j) for i, j in pairwise((0, *cuts, layers)))


def assign_stages(
    costs: Sequence[float], stages: int, transfers: Sequence[float] = ()
) -> tuple[int, ...]:
    """Return the stage of each block: contiguous, no stage empty, the costliest stage cheapest.

    Parameters
    ----------
    costs : sequence of float
        Cost of each block.
    stages : int
        Ranks along the model.
    transfers : sequence of float, optional
        `transfers[b]` is the cost of handing over from block b to b + 1; both stages pay it
        where they differ. One fewer than blocks, in the unit of `costs`; default: free.

    Raises
    ------
    DtrainError
        Where there are more stages than blocks.
    """
    blocks = len(costs)
    if not 1 <= stages <= blocks:
        raise ConfigError(
            "todo.key",
            f"{blocks} blocks cannot fill {stages} stages: "
            f"set stages between 1 and {blocks}, or blocks = {max(stages, 1)} or more",
        )
    if transfers and len(transfers) != blocks - 1:
        raise ValueError(f"{len(transfers)} transfers for the {blocks - 1} bounds of the blocks")
    hops = (0, *(transfers or (0,) * (blocks - 1)), 0)
    rows = [
        [total + hops[i] + hops[j] for j, total in enumerate(accumulate(costs[i:]), i + 1)]
        for i in range(blocks)
    ]
    parts = layer_ranges(blocks, _optimal_cuts(rows, stages, None))
    return tuple(stage for stage, part in enumerate(parts) for _ in part)


def imbalance(costs: Sequence[float]) -> float:
    """Return max / mean of the costs: 1 is perfect, and 1 / imbalance bounds every schedule."""
    total = sum(costs)
    return max(costs) * len(costs) / total if total else 1.0


def _index(names: Sequence[str], cut: int | str) -> int:
    """Return the layer index of a cut given by index or name."""
    if isinstance(cut, int):
        return cut
    if cut in names:
        return list(names).index(cut)
    close = get_close_matches(cut, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise ConfigError(
        "todo.key",
        f"partition.cuts: unknown layer '{cut}': {hint}the layers are {', '.join(names)}",
    )


def _check_weights(blocks: int, weights: Sequence[float] | None) -> None:
    """Refuse weights that are not one positive number per block."""
    if weights is None:
        return
    if len(weights) != blocks:
        raise ConfigError(
            "todo.key", f"{len(weights)} weights for {blocks} blocks: give one weight per block"
        )
    for block, weight in enumerate(weights):
        if not 0 < weight < math.inf:
            raise ConfigError(
                "todo.key", f"the weight of block {block} is {weight}: weights must be positive"
            )


def _optimal_cuts(rows: CostRows, count: int, weights: Sequence[float] | None) -> tuple[int, ...]:
    """Return the best cuts of a line into `parts`: min max, then min squares, then earliest."""
    shares = (None,) * count if weights is None else tuple(weights)

    # One table is kept, since a table is large and equal shares mostly stand side by side.
    @lru_cache(maxsize=1)
    def weighed(share: float | None) -> CostRows:
        # Without weights the costs stay what they are: integers compare exactly.
        return rows if share is None else [[c / share for c in row] for row in rows]

    @lru_cache(maxsize=1)
    def squares(share: float | None) -> CostRows:
        return [[c * c if c <= cap else math.inf for c in row] for row in weighed(share)]

    cap = _tails(weighed, shares, len(rows), max)[count][0]
    return _earliest_cuts(squares, shares, _tails(squares, shares, len(rows), add))


def _tails(
    table: CostTable, weights: BlockWeights, length: int, join: Callable[[float, float], float]
) -> list[list[float]]:
    """Return `tails[k][i]`: the best value of i .. length-1 in the last k parts.

    tails[k][i] = min over j of join(cost of i .. j-1, tails[k-1][j]). From the end to the
    beginning, so that the earliest cuts can be read off from the front.
    """
    tails: list[list[float]] = [[*[math.inf] * length, 0]]
    for share in reversed(weights):
        rows, rest = table(share), tails[-1]
        best = [min(map(join, rows[i], rest[i + 1 :])) for i in range(length)]
        tails.append([*best, math.inf])
    return tails


def _earliest_cuts(
    table: CostTable, weights: BlockWeights, tails: list[list[float]]
) -> tuple[int, ...]:
    """Return the lexicographically smallest cuts that reach the optimum of `tails`."""
    cuts = [0]
    for share, best, rest in zip(weights, tails[:0:-1], tails[-2::-1], strict=True):
        i = cuts[-1]
        sums = list(map(add, table(share)[i], rest[i + 1 :]))
        cuts.append(i + 1 + sums.index(best[i]))
    return tuple(cuts[1:-1])
