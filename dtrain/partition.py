"""Partitioning: which layers form a block (cuts), and which stage holds a block (place).

Invariant: cuts depend on the request alone, never on the number of ranks; so the trained model
follows from the cuts, and only the speed from the place.

    layers   fc1  fc2  fc3 | fc4  fc5 | fc6  head      cuts  = (3, 5)
    blocks         0       |     1    |     2          place = (0, 1, 1)
    stages         0       |          1

Both are the same problem: cut a sequence so that the costliest part is as cheap as possible (Pinar
and Aykanat 2004 survey it). Dynamic programming solves it exactly in O(layers^2 * blocks): first
the smallest possible maximum, then the smallest sum of squares under it, then the earliest cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import add

from dtrain.errors import ConfigError

CostRows = list[list[float]]
"""`rows[i][j - i - 1]` is the cost of the part with items i .. j-1."""


BlockWeights = tuple[float | None, ...]
"""One weight per part; None: unweighted."""


CostTable = Callable[[float | None], CostRows]
"""The cost rows at a weight."""


def cuts_from_names(names: Sequence[str], cuts: Sequence[int | str]) -> tuple[int, ...]:
    """Return the cuts of a run file as layer indices.

    Parameters
    ----------
    names : sequence of str
        Names of all layers, in order.
    cuts : sequence of int or str
        Index or name of the first layer of blocks 1, 2, ...

    Raises
    ------
    ConfigError
        A name is unknown, an index is 0 or out of range, or the cuts do not ascend.
    """
    indices = tuple(_index(names, cut) for cut in cuts)
    for cut, index in zip(cuts, indices, strict=True):
        if not 0 < index < len(names):
            raise ConfigError(
                "partition.cut-out-of-range",
                f"[partition] cuts: no block can start at {cut!r}: block 0 always starts at layer "
                f"0, so give layers 1 to {len(names) - 1}",
            )
    for (cut, left), (other, right) in pairwise(zip(cuts, indices, strict=True)):
        if left >= right:
            relation = "the same layer as" if left == right else "after"
            raise ConfigError(
                "partition.cuts-not-ascending",
                f"[partition] cuts: {cut!r} (layer {left}) is {relation} {other!r} (layer "
                f"{right}): list each cut once, in the order of the layers",
            )
    return indices


def balanced_cuts(
    layers: int,
    blocks: int,
    cost: Callable[[int, int], float],
    weights: Sequence[float] | None = None,
    ends: Sequence[bool] | None = None,
) -> tuple[int, ...]:
    """Return the cuts that make the costliest block as cheap as possible.

    Ties go to the smallest sum of squared costs, then to the lexicographically smallest cuts. The
    last layer (the head) is a block of its own only if there is a cut at every possible place.

    Parameters
    ----------
    layers, blocks : int
        Number of layers, and of blocks to form.
    cost : callable
        `cost(i, j)` >= 0 is the cost of a block of layers i .. j-1, in any unit. It need not be
        additive, so it may include a block's auxiliary head. Integers are compared exactly.
    weights : sequence of float, optional
        One per block: costs are divided by the weight of their block before they are compared.
    ends : sequence of bool, optional
        Whether a block may end with the layer, one per layer; ignored where too few may end one.

    Raises
    ------
    ConfigError
        `blocks` is not between 1 and `layers`, or the weights are not one positive number per
        block.
    """
    if not 1 <= blocks <= layers:
        raise ConfigError(
            "partition.blocks-out-of-range",
            f"{blocks} blocks cannot be cut from {layers} layers: "
            f"set blocks between 1 and {layers}",
        )
    _check_weights(blocks, weights)
    if ends is None or sum(ends[:-1]) + 1 < blocks:
        ends = [True] * layers
    rows = [
        [cost(i, j) if ends[j - 1] or j == layers else math.inf for j in range(i + 1, layers + 1)]
        for i in range(layers)
    ]
    if blocks < sum(ends[:-1]) + 1:
        rows[-1] = [math.inf]
    return _optimal_cuts(rows, blocks, weights)


def layer_ranges(layers: int, cuts: Sequence[int]) -> tuple[range, ...]:
    """Return the range of layers of each block."""
    return tuple(range(i, j) for i, j in pairwise((0, *cuts, layers)))


def assign_stages(
    costs: Sequence[float], stages: int, transfers: Sequence[float] = ()
) -> tuple[int, ...]:
    """Return the stage of each block, with the costliest stage as cheap as possible.

    The blocks of a stage are contiguous and no stage is empty.

    Parameters
    ----------
    costs : sequence of float
        Cost of each block.
    stages : int
        Number of stages.
    transfers : sequence of float, optional
        `transfers[b]` is the cost of the messages between blocks b and b + 1, in the unit of
        `costs`; it is added to both stages if these differ. One fewer than blocks; default: 0.

    Raises
    ------
    ConfigError
        `stages` is not between 1 and the number of blocks.
    """
    blocks = len(costs)
    if not 1 <= stages <= blocks:
        raise ConfigError(
            "partition.stages-out-of-range",
            f"{blocks} blocks cannot fill {stages} stages: "
            f"set stages between 1 and {blocks}, or blocks = {max(stages, 1)} or more",
        )
    if transfers and len(transfers) != blocks - 1:
        raise ValueError(f"{len(transfers)} transfers for {blocks - 1} block boundaries")
    hops = (0, *(transfers or (0,) * (blocks - 1)), 0)
    rows = [
        [total + hops[i] + hops[j] for j, total in enumerate(accumulate(costs[i:]), i + 1)]
        for i in range(blocks)
    ]
    parts = layer_ranges(blocks, _optimal_cuts(rows, stages, None))
    return tuple(stage for stage, part in enumerate(parts) for _ in part)


def check_places(places: Sequence[int], blocks: int, stages: int) -> None:
    """Refuse places that are not one of the stages for each block, with a block on every stage.

    Raises
    ------
    ConfigError
        It names the first mistake.
    """
    text = f"[partition] places = {list(places)}"
    if len(places) != blocks:
        raise ConfigError(
            "partition.places-count",
            f"{text} has {len(places)} stages for {blocks} blocks: give the stage of every block",
        )
    for block, stage in enumerate(places):
        if not 0 <= stage < stages:
            raise ConfigError(
                "partition.place-out-of-range",
                f"{text} puts block {block} on stage {stage}, but the stages are 0 to "
                f"{stages - 1}: name one of those, or set [mesh] stages = {max(places) + 1}",
            )
    for stage in range(stages):
        if stage not in places:
            raise ConfigError(
                "partition.stage-without-block",
                f"{text} leaves stage {stage} of {stages} without a block: give it one, or set "
                f"[mesh] stages = {len(set(places))} and number the stages from 0 on",
            )


def is_ascending(place: Sequence[int]) -> bool:
    """Return whether the blocks of every stage are contiguous, in the order of the stages."""
    return all(a <= b for a, b in pairwise(place))


def imbalance(costs: Sequence[float]) -> float:
    """Return max / mean of the costs; its inverse bounds the utilisation of every schedule."""
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
        "partition.unknown-layer",
        f"[partition] cuts: unknown layer '{cut}': {hint}the layers are {', '.join(names)}",
    )


def _check_weights(blocks: int, weights: Sequence[float] | None) -> None:
    """Raise a `ConfigError` unless the weights are one positive number per block."""
    if weights is None:
        return
    if len(weights) != blocks:
        raise ConfigError(
            "partition.weights-count",
            f"{len(weights)} weights for {blocks} blocks: give one weight per block",
        )
    for block, weight in enumerate(weights):
        if not 0 < weight < math.inf:
            raise ConfigError(
                "partition.weight-not-positive",
                f"the weight of block {block} is {weight}: weights must be positive and finite",
            )


def _optimal_cuts(rows: CostRows, count: int, weights: Sequence[float] | None) -> tuple[int, ...]:
    """Return the best cuts into `count` parts: min max, then min squares, then earliest."""
    part_weights = (None,) * count if weights is None else tuple(weights)

    # One table is cached: a table is large, and equal weights are mostly neighbours.
    @lru_cache(maxsize=1)
    def weighted(weight: float | None) -> CostRows:
        # Without weights the costs are not divided: integers compare exactly.
        return rows if weight is None else [[c / weight for c in row] for row in rows]

    @lru_cache(maxsize=1)
    def squares(weight: float | None) -> CostRows:
        return [[c * c if c <= cap else math.inf for c in row] for row in weighted(weight)]

    cap = _tails(weighted, part_weights, len(rows), max)[count][0]
    return _earliest_cuts(squares, part_weights, _tails(squares, part_weights, len(rows), add))


def _tails(
    table: CostTable, weights: BlockWeights, length: int, join: Callable[[float, float], float]
) -> list[list[float]]:
    """Return `tails[k][i]`: the best value of i .. length-1 in the last k parts.

    tails[k][i] = min over j of join(cost of i .. j-1, tails[k-1][j]). The recursion starts at the
    end, so that the earliest cuts can be read off from the front.
    """
    tails: list[list[float]] = [[*[math.inf] * length, 0]]
    for weight in reversed(weights):
        rows, rest = table(weight), tails[-1]
        best = [min(map(join, rows[i], rest[i + 1 :])) for i in range(length)]
        tails.append([*best, math.inf])
    return tails


def _earliest_cuts(
    table: CostTable, weights: BlockWeights, tails: list[list[float]]
) -> tuple[int, ...]:
    """Return the lexicographically smallest cuts that reach the optimum of `tails`."""
    cuts = [0]
    for weight, best, rest in zip(weights, tails[:0:-1], tails[-2::-1], strict=True):
        i = cuts[-1]
        sums = list(map(add, table(weight)[i], rest[i + 1 :]))
        cuts.append(i + 1 + sums.index(best[i]))
    return tuple(cuts[1:-1])
