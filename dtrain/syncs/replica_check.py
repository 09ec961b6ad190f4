"""The check that the replicas of a block are equal, bit for bit, after an update.

The debug mode compares a hash of every tensor after every update. The quick check compares one
number per block, the sums of the tensors' bits as integers: any flipped bit changes it.

Invariant: only control data is sent and nothing is changed. All replicas compare the same checksums
and raise or not together.

::

    replica 0   fc1.weight 5f03..  fc1.bias 9a11..  --+
    replica 1   fc1.weight 5f03..  fc1.bias 9a11..  --+--> the first tensor that differs from
    replica 2   fc1.weight 5f03..  fc1.bias 0c4e..  --+    replica 0: fc1.bias of replica 2
"""

from __future__ import annotations

from collections import Counter
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
    rows = [tuple(row) for row in replicas.allgather_object(own_checksums)]
    most_common = Counter(rows).most_common(1)[0][0]  # the first of equals
    reference = rows.index(most_common)
    for replica, row in enumerate(rows):
        pairs = zip(trained, most_common, row, strict=True)
        differing = [name for name, ours, theirs in pairs if ours != theirs]
        if differing:
            raise NumericalError(
                "sync.replicas-differ",
                f"'{differing[0]}' of {_place(replicas, replica)} differs from that of "
                f"{_place(replicas, reference)} after update {update} (block {block.index}; "
                f"{len(differing)} of {len(row)} trained tensors differ), but the sync keeps "
                "replicas equal: look for an operation that only one replica applies to its "
                "weights, such as unseeded random numbers, or for faulty memory of that host",
            )


def check_replicas_quickly(block: Block, replicas: Comm, update: int) -> None:
    """Verify as `check_replicas_equal`, at the cost of one pass over the parameters and one small
    message. Collective over the replicas; errors are those of `check_replicas_equal`."""
    if replicas.size > 1 and len(set(replicas.allgather_object(bit_sum(block)))) > 1:
        check_replicas_equal(block, replicas, update)


def bit_sum(block: Block) -> int:
    """Return a sum of 64 bits over the bits of all trained parameters of a block."""
    trained = [p.detach() for p in block.parameters.values() if p.requires_grad and p.numel()]
    # Integers wrap around, so the sum is exact, and the same in any order of adding.
    sums = [part.sum(dtype=torch.int64) for parameter in trained for part in _words(parameter)]
    total = 0
    for value in torch.stack(sums).tolist() if sums else ():
        total = (total * 1_000_003 + value) % 2**64
    return total


def _words(tensor: Tensor) -> list[Tensor]:
    """Return the memory of a tensor as integers of 64 bits, and the bytes that are left."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    return [words, flat[whole:]] if whole < flat.numel() else [words]


def _place(replicas: Comm, replica: int) -> str:
    """Return "replica 2 (rank 5 on n017)"."""
    world_rank = replicas.transport.backend.world_ranks[replica]
    return f"replica {replica} (rank {world_rank} on {replicas.hosts[replica]})"


def checksum(tensor: Tensor) -> str:
    """Return a hash of a tensor's bits in C order, as text."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return blake2b(flat.numpy().data, digest_size=CHECKSUM_BYTES).hexdigest()
