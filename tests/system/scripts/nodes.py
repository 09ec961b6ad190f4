"""Rank 0 prints the number of host names, and the number of each rank's node."""

from __future__ import annotations

import json

from dtrain.comm.backends import mpi
from dtrain.comm.node_topology import NodeTopology

world = mpi.world_backend()
if world.rank == 0:
    topology = NodeTopology(world.nodes, world.rank)
    print(json.dumps([len(set(world.hosts)), topology.node_numbers]))
