"""The grid of ranks: both placements are bijections, and what does not fit is refused."""

from __future__ import annotations

import pytest

from dtrain.errors import DtrainError
from dtrain.mesh import PLACEMENTS, Mesh


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("replicas", "stages"), [(1, 1), (1, 5), (4, 1), (2, 3), (3, 4)])
def test_coords_and_rank_are_inverse(replicas: int, stages: int, placement: str) -> None:
    mesh = Mesh(replicas, stages, placement)
    coords = [mesh.coords(rank) for rank in range(mesh.ranks)]
    assert [mesh.rank(*c) for c in coords] == list(range(replicas * stages))
    assert set(coords) == {(r, s) for r in range(replicas) for s in range(stages)}


def test_placements_are_those_of_the_picture() -> None:
    assert Mesh(2, 3).ranks_along("stage", 4) == (3, 4, 5)
    assert Mesh(2, 3).ranks_along("replica", 4) == (1, 4)
    other = Mesh(2, 3, "replicas-in-node")
    assert other.ranks_along("stage", 2) == (0, 2, 4)
    assert other.ranks_along("replica", 2) == (2, 3)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_lines_partition_the_mesh(placement: str) -> None:
    mesh = Mesh(3, 4, placement)
    for axis in ("replica", "stage"):
        lines = {mesh.ranks_along(axis, rank) for rank in range(mesh.ranks)}
        assert sorted(rank for line in lines for rank in line) == list(range(12))
        assert all(rank in mesh.ranks_along(axis, rank) for rank in range(12))


def test_fit() -> None:
    assert Mesh.for_ranks(6) == Mesh(1, 6)
    assert Mesh.for_ranks(6, 2, "replicas-in-node") == Mesh(3, 2, "replicas-in-node")


@pytest.mark.parametrize(
    ("ranks", "stages", "text"),
    [
        (12, 5, "2 replicas x 5 stages (needs 10): set stages = 6, or start 10 ranks"),
        (14, 5, "3 replicas x 5 stages (needs 15): set stages = 7, or start 15 ranks"),
        (2, 5, "1 replica x 5 stages (needs 5): set stages = 2, or start 5 ranks"),
        (7, 3, "2 replicas x 3 stages (needs 6): set stages = 1, or start 6 ranks"),
    ],
)
def test_misfits_name_the_nearest_ways_out(ranks: int, stages: int, text: str) -> None:
    with pytest.raises(DtrainError) as refusal:
        Mesh.for_ranks(ranks, stages)
    assert refusal.value.message == f"{ranks} ranks cannot form {text}"
    assert refusal.value.code == 2


def test_nonsense_is_refused() -> None:
    with pytest.raises(DtrainError, match="stages = 0"):
        Mesh.for_ranks(4, 0)
    with pytest.raises(DtrainError, match="at least 1"):
        Mesh(0, 3)
    with pytest.raises(DtrainError, match="did you mean 'replicas-in-node'"):
        Mesh.for_ranks(4, 2, "replica-in-node")
    with pytest.raises(ValueError, match="rank 6 is outside"):
        Mesh(2, 3).coords(6)
    with pytest.raises(ValueError, match="replica 2"):
        Mesh(2, 3).rank(2, 0)
    with pytest.raises(ValueError, match="neither"):
        Mesh(2, 3).ranks_along("block", 0)
