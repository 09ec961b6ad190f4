"""Replicas of a block, compared bit for bit: what the debug mode does after each update.

Invariant: only control data is exchanged, and nothing is changed; all replicas come to the same
verdict, from the same words.

::

    replica 0   fc1.weight 5f03..  fc1.bias 9a11..  --+
    replica 1   fc1.weight 5f03..  fc1.bias 9a11..  --+--> the first that differs from replica 0
    replica 2   fc1.weight 5f03..  fc1.bias 0c4e..  --+    is named: replica 2, fc1.bias
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.comm.communicator import Comm
from dtrain.errors import NumericalError

CHECKSUM_BYTES = 8
"""Of a checksum."""


def check_replicas_equal(block: Block, replicas: Comm, update: int) -> None:
    """Refuse trained parameters of a block that are not the same on all replicas. Collective.

    Sends a checksum of 16 letters per parameter. Does nothing but in debug mode.

    Raises
    ------
    DtrainError
        On all replicas, with code 4: names the first replica and tensor, the block and the update.
    """
    if replicas.size == 1:
        return
    trained = {name: p for name, p in block.parameters.items() if p.requires_grad}
    first, *others = replicas.allgather_object([checksum(each) for each in trained.values()])
    for replica, sums in enumerate(others, 1):
        wrong = [name for name, a, b in zip(trained, first, sums, strict=True) if a != b]
        if wrong:
            raise NumericalError(
                "todo.key",
                f"replica {replica} holds another '{wrong[0]}' than replica 0 after update "
                f"{update} (block {block.index}; {len(wrong)} of its {len(sums)} trained tensors "
                "differ), but the sync says that all are equal: look for what one replica alone "
                "does to its weights, such as random numbers without a seed",
            )


def checksum(tensor: Tensor) -> str:
    """Return a hash of a tensor's bits, in C order."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return blake2b(flat.numpy().data, digest_size=CHECKSUM_BYTES).hexdigest()
