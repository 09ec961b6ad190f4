"""The mesh of ranks: both placements are bijections, and impossible meshes are refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from dtrain.errors import ConfigError
from dtrain.mesh import PLACEMENTS, RankMesh, RankPosition
from tests.refusals import refuses


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("replicas", "stages"), [(1, 1), (1, 5), (4, 1), (2, 3), (3, 4)])
def test_coords_and_rank_are_inverse(replicas: int, stages: int, placement: str) -> None:
    mesh = RankMesh(replicas, stages, placement)
    coords = [mesh.coords(rank) for rank in range(mesh.ranks)]
    assert [mesh.rank(*c) for c in coords] == list(range(replicas * stages))
    assert set(coords) == {(r, s) for r in range(replicas) for s in range(stages)}


def test_placements_match_the_diagram() -> None:
    mesh, other = RankMesh(2, 3), RankMesh(2, 3, "replicas-in-node")
    assert [[mesh.rank(r, s) for s in range(3)] for r in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert [[other.rank(r, s) for s in range(3)] for r in range(2)] == [[0, 2, 4], [1, 3, 5]]


def test_meshes_for_a_number_of_ranks() -> None:
    assert RankMesh.for_ranks(6) == RankMesh(1, 6)
    assert RankMesh.for_ranks(6, 2, "replicas-in-node") == RankMesh(3, 2, "replicas-in-node")


@pytest.mark.parametrize(
    ("ranks", "stages", "replicas", "needed_ranks", "nearest_stages"),
    [(12, 5, 2, 10, 6), (14, 5, 3, 15, 7), (2, 5, 1, 5, 2), (7, 3, 2, 6, 1)],
)
def test_misfits_name_the_nearest_fixes(
    ranks: int, stages: int, replicas: int, needed_ranks: int, nearest_stages: int
) -> None:
    with refuses(ConfigError, "mesh.ranks-indivisible") as caught:
        RankMesh.for_ranks(ranks, stages)
    numbers = list(map(int, re.findall(r"\d+", caught.value.message)))
    assert numbers == [ranks, replicas, stages, needed_ranks, nearest_stages, needed_ranks]
    assert caught.value.code == 2


def test_impossible_meshes_are_refused() -> None:
    with refuses(ConfigError, "mesh.stages-too-few"):
        RankMesh.for_ranks(4, 0)
    with refuses(ConfigError, "mesh.no-ranks"):
        RankMesh(0, 3)
    with refuses(ConfigError, "mesh-placement.unknown") as caught:
        RankMesh.for_ranks(4, 2, "replica-in-node")
    assert "'replicas-in-node'?" in caught.value.message


@pytest.mark.parametrize(
    "call",
    [
        lambda mesh: mesh.coords(6),
        lambda mesh: mesh.rank(2, 0),
    ],
)
def test_ranks_outside_the_mesh_are_a_fault_of_the_caller(
    call: Callable[[RankMesh], object],
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        call(RankMesh(2, 3))


def test_errors_are_located() -> None:
    """A `DtrainError` gets the location in its message, any other error as a note."""
    position = RankPosition(RankMesh(2, 3), 1, 2, (0, 1, 2))
    with pytest.raises(ConfigError) as refused, position.error_context("F2.0", "update 7"):
        raise ConfigError("mesh.test", "wrong")
    with pytest.raises(KeyError) as failed, position.error_context("F2.0", "update 7"):
        raise KeyError("x")
    location = "[replica 1 stage 2 | update 7 | action F2.0]"
    assert refused.value.message == f"wrong {location}"
    assert failed.value.__notes__ == [location]
