"""Shards: the tensors of one rank in one HDF5 file; a failed write raises an error.

Invariant: HDF5 never sees that a write failed, since its library may crash the process when it
closes such a file. It writes through an `ErrorKeepingFile`, which keeps the first error until
`write_shard` raises it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import h5py
import torch
from torch import Tensor

from dtrain.checkpoint.files import file_sha256


@final
class ErrorKeepingFile(io.FileIO):
    """A file whose `write` never raises.

    Attributes
    ----------
    error : OSError or None
        The first error. Later writes are dropped.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of `data`; one write of the kernel takes less than 2 GiB."""
        view = memoryview(data).cast("B")
        remaining = view
        while remaining and self.error is None:
            try:
                remaining = remaining[super().write(remaining) :]
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Change the length."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
        return size or 0


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one shard, sync it, and return its row for the manifest: file, bytes, sha256, keys.

    Raises
    ------
    OSError
        The first error of the disk.
    """
    with ErrorKeepingFile(path, "w+") as file:
        try:
            _write_tensors(file, tensors)
        finally:
            if file.error is not None:
                raise file.error
        os.fsync(file.fileno())
    size = path.stat().st_size
    return {"file": path.name, "bytes": size, "sha256": file_sha256(path), "keys": list(tensors)}


def read_tensor(dataset: h5py.Dataset) -> Tensor:
    """Return a tensor of a shard, on the CPU."""
    tensor = torch.as_tensor(dataset[()])
    return tensor.view(torch.bfloat16) if dataset.attrs["dtype"] == "bfloat16" else tensor


def dtype_name(tensor: Tensor) -> str:
    """Return a tensor's dtype as shards and digests write it: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def _write_tensors(file: ErrorKeepingFile, tensors: Mapping[str, Tensor]) -> None:
    with h5py.File(file, "w") as shard:
        for key, tensor in tensors.items():
            plain = tensor.detach().cpu()
            if tensor.dtype == torch.bfloat16:  # neither numpy nor HDF5 has it
                plain = plain.view(torch.uint16)
            shard.create_dataset(key, data=plain.numpy()).attrs["dtype"] = dtype_name(tensor)
