"""The digest of a model: one hash over the names, dtypes, shapes and bits of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from dtrain.checkpoint.shard import dtype_name
from dtrain.comm.buffers import as_bytes
from dtrain.comm.communicator import Comm


def model_digest(tensors: Mapping[str, Tensor], control: Comm) -> str:
    """Return the SHA-256 of a model's lines, sorted by name as UTF-8. Collective over `control`.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        This rank's part of the model; a tensor that several ranks hold is given by one of them.
    """
    own_lines = [(name, _digest_line(name, tensor)) for name, tensor in tensors.items()]
    lines = [
        (name.encode(), line)
        for rank_lines in control.allgather_object(own_lines)
        for name, line in rank_lines
    ]
    return hashlib.sha256("".join(line for _, line in sorted(lines)).encode()).hexdigest()


def _digest_line(name: str, tensor: Tensor) -> str:
    """Return ``name dtype (shape) hash`` of a tensor; the hash is of its bytes in C order."""
    shape = ",".join(map(str, tensor.shape))
    bits = hashlib.sha256(as_bytes(tensor.detach().cpu().contiguous()).data).hexdigest()
    return f"{name} {dtype_name(tensor)} ({shape}) {bits}\n"
