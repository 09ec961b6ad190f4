"""Warnings on the nodes of a plan's ranks: axes of the mesh that cross nodes without need.

Invariant: pure functions of a plan and of the node of each rank. A start, which knows the nodes,
warns; a plan does where a costs file says how many ranks a node has.

::

    2 replicas x 2 stages,        node 0   node 1      crossings of replicas between their stages
    stages-in-node
    --distribution=block          0 1      2 3         none
    --distribution=cyclic         0 2      1 3         one each: 0 -> 1 and 2 -> 3
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from dtrain.mesh import PLACEMENTS, RankMesh
from dtrain.planning.formatting import pluralise
from dtrain.planning.plan import Plan


def placement_warnings(plan: Plan, nodes: Sequence[int], names: Sequence[str]) -> list[str]:
    """Return the warnings of a plan on the nodes of its ranks, each in one line.

    Parameters
    ----------
    nodes : sequence of int
        Number of each rank's node.
    names : sequence of str
        Name of each rank's node, for people.
    """
    if len(set(names)) < len(set(nodes)):
        names = [f"node {node}" for node in nodes]
    mesh = plan.layout.mesh
    return [*_warn_crossings(mesh, nodes, names), *_warn_daso_nodes(plan, nodes)]


def planned_warnings(plan: Plan, ranks_per_node: int) -> list[str]:
    """Return the warnings of a plan on nodes that are filled with consecutive ranks."""
    nodes = [rank // ranks_per_node for rank in range(plan.layout.mesh.ranks)]
    return placement_warnings(plan, nodes, [f"node {node}" for node in nodes])


def _warn_crossings(mesh: RankMesh, nodes: Sequence[int], names: Sequence[str]) -> Iterator[str]:
    """Warn of replicas whose stages, or of stages whose replicas, are on too many nodes."""
    groups = _groups(mesh, mesh.placement)
    least = _fewest_nodes(len(groups[0]), nodes) - 1
    found = [_crossings(group, nodes, mesh.placement) for group in groups]
    crossing = [index for index, count in enumerate(found) if count > least]
    if not crossing:
        return
    first, of_stages = groups[crossing[0]], mesh.placement == "stages-in-node"
    axis, other = ("stage", "replica") if of_stages else ("replica", "stage")
    ends = next(pair for pair in pairwise(first) if nodes[pair[0]] != nodes[pair[1]])
    places = " and ".join(
        f"{axis} {first.index(rank)} (rank {rank}) on {names[rank]}" for rank in ends
    )
    sent = "activations are sent" if of_stages else "gradients are averaged"
    yield (
        f"{axis}s of {len(crossing)} of {pluralise(len(groups), other)} cross nodes, against "
        f'[mesh] placement = "{mesh.placement}": {other} {crossing[0]} has {places}, so {sent} '
        f"between nodes; {_cure(mesh, nodes, sum(found))}"
    )


def _cure(mesh: RankMesh, nodes: Sequence[int], crossings: int) -> str:
    """Return what to type for fewer crossings."""
    cures = []
    groups = _groups(mesh, mesh.placement)
    in_blocks = sum(_crossings(group, sorted(nodes), mesh.placement) for group in groups)
    if in_blocks < crossings:
        cures.append(
            "start the ranks in blocks, by `srun --distribution=block` (mpirun: `--map-by slot`)"
        )
    (other,) = (placement for placement in PLACEMENTS if placement != mesh.placement)
    groups = _groups(replace(mesh, placement=other), mesh.placement)
    least = _fewest_nodes(len(groups[0]), nodes) - 1
    if all(_crossings(group, nodes, mesh.placement) <= least for group in groups):
        cures.append(f'set [mesh] placement = "{other}", which suits the nodes of these ranks')
    size = len(groups[0])
    if not cures and size <= max(Counter(nodes).values()):
        cures.append(f"start a multiple of {size} ranks on each node (`--ntasks-per-node`)")
    return ", or ".join(cures) or "start equally many ranks on each node (`--ntasks-per-node`)"


def _groups(mesh: RankMesh, kept_together: str) -> list[list[int]]:
    """Return the ranks that shall be on one node: of each replica, or of each stage."""
    replicas, stages = range(mesh.replicas), range(mesh.stages)
    if kept_together == "stages-in-node":
        return [[mesh.rank(replica, stage) for stage in stages] for replica in replicas]
    return [[mesh.rank(replica, stage) for replica in replicas] for stage in stages]


def _crossings(group: Sequence[int], nodes: Sequence[int], kept_together: str) -> int:
    """Return how often neighbouring stages are on different nodes, or the further nodes of the
    replicas: a mean is taken inside each node first."""
    if kept_together == "stages-in-node":
        return sum(nodes[rank] != nodes[following] for rank, following in pairwise(group))
    return len({nodes[rank] for rank in group}) - 1


def _fewest_nodes(ranks: int, nodes: Sequence[int]) -> int:
    """Return the fewest of the nodes that have so many ranks together."""
    sizes = sorted(Counter(nodes).values(), reverse=True)
    return next(count for count, total in enumerate(accumulate(sizes), 1) if total >= ranks)


def _warn_daso_nodes(plan: Plan, nodes: Sequence[int]) -> Iterator[str]:
    """Warn of DASO whose replicas of a block are on one node, or each alone on its node."""
    layout, mesh = plan.layout, plan.layout.mesh
    if plan.run.sync.name != "daso" or mesh.replicas < 2:
        return
    nodes_of_stages = [
        Counter(nodes[rank] for rank in ranks) for ranks in _groups(mesh, "replicas-in-node")
    ]
    if all(len(counts) == 1 for counts in nodes_of_stages):
        yield (
            f"the sync 'daso' with all {mesh.replicas} replicas of a block on one node is "
            "'every-step': its means between nodes never happen, and the node sends all gradients "
            'in every update; set [sync] name = "every-step", or start on several nodes'
        )
    elif all(max(counts.values()) == 1 for counts in nodes_of_stages):
        parameters = sum(b.parameters + b.head_parameters for b in layout.block_layouts)
        size = parameters * layout.dtype.itemsize
        cure = "use fewer stages than ranks of a node"
        if mesh.placement == "stages-in-node":
            cure = f'set [mesh] placement = "replicas-in-node", or {cure}'
        yield (
            f"the sync 'daso' has each of {mesh.replicas} replicas of a block on a node of its "
            "own: no mean stays inside a node, and all weights "
            f"({2 * (mesh.replicas - 1) * size / 1e6:,.3g} MB per mean) are sent between nodes; "
            f"{cure}"
        )
