"""The debug check that the replicas of a block are equal, bit for bit, after an update.

Invariant: only control data is sent and nothing is changed. All replicas compare the same checksums
and raise or not together.

::

    replica 0   fc1.weight 5f03..  fc1.bias 9a11..  --+
    replica 1   fc1.weight 5f03..  fc1.bias 9a11..  --+--> the first tensor that differs from
    replica 2   fc1.weight 5f03..  fc1.bias 0c4e..  --+    replica 0: fc1.bias of replica 2
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.comm.communicator import Comm
from dtrain.errors import NumericalError

CHECKSUM_BYTES = 8


def check_replicas_equal(block: Block, replicas: Comm, update: int) -> None:
    """Verify that all replicas hold the same trained parameters. Collective over the replicas.

    It sends a checksum of 16 letters per parameter.

    Raises
    ------
    NumericalError
        On all replicas: names the first replica and tensor that differ, the block and the update.
    """
    if replicas.size == 1:
        return
    trained = {name: p for name, p in block.parameters.items() if p.requires_grad}
    own_checksums = [checksum(parameter) for parameter in trained.values()]
    first, *others = replicas.allgather_object(own_checksums)
    for replica, checksums in enumerate(others, 1):
        differing = [
            name
            for name, ours, theirs in zip(trained, first, checksums, strict=True)
            if ours != theirs
        ]
        if differing:
            raise NumericalError(
                "sync.replicas-differ",
                f"'{differing[0]}' of replica {replica} differs from that of replica 0 after "
                f"update {update} (block {block.index}; {len(differing)} of {len(checksums)} "
                "trained tensors differ), but the sync keeps replicas equal: look for an operation "
                "that only one replica applies to its weights, such as unseeded random numbers",
            )


def checksum(tensor: Tensor) -> str:
    """Return a hash of a tensor's bits in C order, as text."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return blake2b(flat.numpy().data, digest_size=CHECKSUM_BYTES).hexdigest()
