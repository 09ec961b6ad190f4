"""Rank 0 prints the number of host names, and the number of each rank's node."""

from __future__ import annotations

import json

from dtrain.comm.backends import mpi
from dtrain.comm.communicator import Comm

comm = Comm(mpi.world_backend())
if comm.rank == 0:
    print(json.dumps([len(set(comm.hosts)), comm.topology.node_numbers]))
