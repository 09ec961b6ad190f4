"""Cuts and places: optimal among all choices, ties as documented, invalid ones refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import pytest

from dtrain.errors import ConfigError
from dtrain.partition import assign_stages, balanced_cuts, cuts_from_names, imbalance, layer_ranges
from tests.refusals import refuses

NAMES = ("fc1", "fc2", "fc3", "head")


def brute_force_cuts(
    layers: int,
    blocks: int,
    cost: Callable[[int, int], float],
    weights: Sequence[float] | None = None,
    head: bool = True,
) -> tuple[int, ...]:
    """Return the best cuts by trying all of them."""

    def rank(cuts: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
        parts = pairwise((0, *cuts, layers))
        costs = [cost(i, j) for i, j in parts]
        if weights is not None:
            costs = [c / w for c, w in zip(costs, weights, strict=True)]
        # Summed from the end as in the product, so that floats agree to the last bit.
        return max(costs), sum(c * c for c in reversed(costs)), cuts

    choices = combinations(range(1, layers), blocks - 1)
    no_lone_head = head and 1 < blocks < layers
    return min(rank(cuts) for cuts in choices if not (no_lone_head and cuts[-1] == layers - 1))[2]


def mlp(widths: Sequence[int], classes: int) -> Callable[[int, int], int]:
    """Return multiply-adds of a block of an MLP with a linear head on all but the last block."""
    sizes = [*widths, classes]

    def cost(i: int, j: int) -> int:
        layers = sum(a * b for a, b in pairwise(sizes[i : j + 1]))
        return 3 * (layers + (sizes[j] * classes if j < len(sizes) - 1 else 0))

    return cost


@pytest.mark.parametrize("seed", range(60))
def test_balanced_cuts_are_the_best_of_all(seed: int) -> None:
    generator = random.Random(seed)
    layers = generator.randint(1, 9)
    blocks = generator.randint(1, layers)
    # Few distinct values, so that ties are frequent; not additive, not even monotone.
    table = {
        (i, j): generator.randint(0, 6) for i in range(layers) for j in range(i + 1, layers + 1)
    }
    weights = generator.choice([None, [generator.choice((1, 2, 4)) for _ in range(blocks)]])

    def cost(i: int, j: int) -> int:
        return table[i, j]

    assert balanced_cuts(layers, blocks, cost, weights) == brute_force_cuts(
        layers, blocks, cost, weights
    )


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
def test_balanced_mlps(blocks: int) -> None:
    for widths in ([3072, 1000, 1000, 1000], [64, 256, 128, 64, 32], [784, 20, 700, 20, 700]):
        layers, cost = len(widths), mlp(widths, 10)
        if blocks <= layers:
            assert balanced_cuts(layers, blocks, cost) == brute_force_cuts(layers, blocks, cost)


def test_the_cifar_mlp_has_its_head_in_the_last_block() -> None:
    assert balanced_cuts(4, 3, mlp([3072, 1000, 1000, 1000], 10)) == (1, 2)


def test_the_head_is_a_block_of_its_own_only_if_all_layers_are() -> None:
    def cost(i: int, j: int) -> int:
        return 100 if j == 4 else 1  # the block with the head is the costliest

    assert balanced_cuts(4, 4, cost) == (1, 2, 3)
    assert balanced_cuts(4, 2, cost) == (1,)
    assert balanced_cuts(1, 1, cost) == ()


def test_ties_go_to_the_smallest_squares_then_to_the_earliest_cuts() -> None:
    def cost(i: int, j: int) -> int:
        return sum((5, 1, 1, 1, 1)[i:j])

    assert balanced_cuts(5, 3, cost) == (1, 3)
    assert balanced_cuts(4, 3, lambda i, j: 1) == (1, 2)


def test_integers_compare_exactly() -> None:
    # 2**60 and 2**60 + 1 are one float; as integers the second cut is better by one.
    big = 2**60

    def cost(i: int, j: int) -> int:
        return {(0, 1): big + 1, (0, 2): big}.get((i, j), big - 1 if i else 3 * big)

    assert balanced_cuts(4, 2, cost) == (2,)


def test_costs_are_divided_by_weights() -> None:
    assert balanced_cuts(12, 3, lambda i, j: j - i, (1, 2, 3)) == (2, 6)


@pytest.mark.parametrize(
    ("blocks", "weights", "key"),
    [
        (5, None, "partition.blocks-out-of-range"),
        (0, None, "partition.blocks-out-of-range"),
        (3, (1, 2), "partition.weights-count"),
        (3, (1, 0, 2), "partition.weight-not-positive"),
    ],
)
def test_impossible_blocks_are_refused(
    blocks: int, weights: tuple[int, ...] | None, key: str
) -> None:
    with refuses(ConfigError, key):
        balanced_cuts(4, blocks, lambda i, j: 1, weights)


def test_explicit_cuts_by_index_and_name() -> None:
    assert cuts_from_names(NAMES, [1, 3]) == cuts_from_names(NAMES, ["fc2", "head"]) == (1, 3)
    assert cuts_from_names(NAMES, ["fc2", 3]) == (1, 3)
    assert cuts_from_names(NAMES, []) == ()


@pytest.mark.parametrize(
    ("cuts", "key", "named"),
    [
        (["fc22"], "partition.unknown-layer", ("'fc22'", "'fc2'")),
        (["zz"], "partition.unknown-layer", NAMES),
        ([0], "partition.cut-out-of-range", ("0",)),
        (["fc1"], "partition.cut-out-of-range", ("'fc1'",)),
        ([4], "partition.cut-out-of-range", ("4", "1 to 3")),
        ([-1], "partition.cut-out-of-range", ("-1",)),
        ([3, 1], "partition.cuts-not-ascending", ("3", "1")),
        (["fc2", 1], "partition.cuts-not-ascending", ("'fc2'", "(layer 1)")),
    ],
)
def test_invalid_cuts_are_refused(cuts: list[int | str], key: str, named: tuple[str, ...]) -> None:
    with refuses(ConfigError, key) as caught:
        cuts_from_names(NAMES, cuts)
    assert all(name in caught.value.message for name in named)


def test_ranges_cover_all_layers() -> None:
    assert layer_ranges(5, (2, 3)) == (range(0, 2), range(2, 3), range(3, 5))
    assert layer_ranges(5, ()) == (range(0, 5),)


@pytest.mark.parametrize("seed", range(40))
def test_the_place_is_the_best_of_all(seed: int) -> None:
    generator = random.Random(seed)
    blocks = generator.randint(1, 8)
    stages = generator.randint(1, blocks)
    costs = [generator.randint(1, 9) for _ in range(blocks)]
    transfers = generator.choice([[], [generator.randint(0, 4) for _ in range(blocks - 1)]])
    hops = [0, *(transfers or [0] * (blocks - 1)), 0]
    cuts = brute_force_cuts(
        blocks, stages, lambda i, j: sum(costs[i:j]) + hops[i] + hops[j], head=False
    )
    expected = tuple(stage for stage, part in enumerate(layer_ranges(blocks, cuts)) for _ in part)
    assert assign_stages(costs, stages, transfers) == expected
    assert sorted(set(expected)) == list(range(stages))


def test_the_place_avoids_expensive_transfers() -> None:
    assert assign_stages([2, 2, 2, 2], 2) == (0, 0, 1, 1)
    assert assign_stages([2, 2, 2, 2], 2, [0, 9, 0]) == (0, 1, 1, 1)


def test_impossible_places_are_refused() -> None:
    for stages in (3, 0):
        with refuses(ConfigError, "partition.stages-out-of-range"):
            assign_stages([1, 1], stages)
    with pytest.raises(ValueError, match="transfers"):
        assign_stages([1, 1], 2, [1, 1])


def test_imbalance() -> None:
    assert imbalance([2, 2, 2]) == 1
    assert imbalance([1, 3]) == 1.5
    assert imbalance([0, 0]) == 1
