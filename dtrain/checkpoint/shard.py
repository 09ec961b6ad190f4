"""Shards: the tensors of one rank in one HDF5 file; a failed write raises an error.

Invariant: HDF5 never sees that a write failed, since its library may crash the process when it
closes such a file. It writes through an `ErrorKeepingFile`, which keeps the first error until
`write_shard` raises it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import h5py
import torch
from torch import Tensor

from dtrain.checkpoint import files
from dtrain.checkpoint.files import file_sha256, open_plain_file
from dtrain.errors import CheckpointError


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
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                files.write_all(self.fileno(), view)
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Change the length."""
        length = self.tell() if size is None else size
        try:
            files.calls.truncate(self.fileno(), length)
        except OSError as error:
            self.error = self.error or error
        return length


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one shard, sync it, and return its row for the manifest: file, bytes, sha256, keys.

    Raises
    ------
    OSError
        The first error of the disk.
    """
    with ErrorKeepingFile(path, "w+", opener=files.calls.open) as file:
        try:
            _write_tensors(file, tensors)
        finally:
            if file.error is not None:
                raise file.error
        files.calls.fsync(file.fileno())
    size = path.stat().st_size
    return {"file": path.name, "bytes": size, "sha256": file_sha256(path), "keys": list(tensors)}


@contextmanager
def open_shard(path: Path) -> Iterator[h5py.File]:
    """Open a shard for reading.

    Raises
    ------
    CheckpointError
        It cannot be read as `write_shard` writes it, in the block, too.
    """
    try:
        with open_plain_file(path) as file, h5py.File(file, "r") as shard:
            yield shard
    except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            "checkpoint.shard-unreadable",
            f"{path} cannot be read as a shard ({reason}): delete the folder {path.parent} to "
            "resume from the checkpoint before it",
        ) from error


def read_tensor(shard: h5py.File, key: str) -> Tensor:
    """Return a tensor of a shard, on the CPU.

    Raises
    ------
    ValueError, LookupError, OSError
        The shard has no such tensor of its own.
    """
    dataset = find_dataset(shard, key)
    tensor = torch.as_tensor(dataset[()])
    return tensor.view(torch.bfloat16) if dataset.attrs["dtype"] == "bfloat16" else tensor


def find_dataset(shard: h5py.File, key: str) -> h5py.Dataset:
    """Return the HDF5 dataset of a tensor; links and storage in other files are refused.

    Raises
    ------
    ValueError, LookupError
        The shard has no such dataset of its own.
    """
    group = shard
    for name in key.split("/"):
        if not isinstance(group, h5py.Group) or name not in group:
            raise LookupError(f"it lacks '{key}'")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"'{key}' is a link")
        group = group[name]
    if not isinstance(group, h5py.Dataset) or group.external or group.is_virtual:
        raise ValueError(f"'{key}' lies in another file")
    if group.dtype.kind not in "biufc":
        raise ValueError(f"'{key}' holds no numbers")
    return group


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
