"""Shards: one rank's tensors in one HDF5 file, that survives a power cut and names a full disk.

Invariant: HDF5 never learns that a write failed, since its library may crash the process when it
closes such a file. It writes through `Spool`, which keeps the first error for who asks afterwards.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import h5py
import torch
from torch import Tensor

from dtrain.errors import DataError


@final
class ErrorKeepingFile(io.FileIO):
    """A file whose writing never fails; `error` is the first that did not succeed.

    What follows an error is not written.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of `data`: the kernel takes no 2 GiB at once, and less on a full disk."""
        view = memoryview(data).cast("B")
        rest = view
        while rest and self.error is None:
            try:
                rest = rest[super().write(rest) :]
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
    with ErrorKeepingFile(path, "w+") as spool:
        try:
            _write_tensors(spool, tensors)
        finally:
            if spool.error is not None:
                raise spool.error
        os.fsync(spool.fileno())
    size = path.stat().st_size
    return {"file": path.name, "bytes": size, "sha256": file_sha256(path), "keys": list(tensors)}


def _write_tensors(file: ErrorKeepingFile, tensors: Mapping[str, Tensor]) -> None:
    with h5py.File(file, "w") as shard:
        for key, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            plain = tensor.detach().cpu()
            if tensor.dtype == torch.bfloat16:  # neither numpy nor HDF5 knows it
                plain = plain.view(torch.uint16)
            shard.create_dataset(key, data=plain.numpy()).attrs["dtype"] = dtype


def read_tensor(dataset: h5py.Dataset) -> Tensor:
    """Return a tensor of a shard."""
    tensor = torch.as_tensor(dataset[()])
    return tensor.view(torch.bfloat16) if dataset.attrs["dtype"] == "bfloat16" else tensor


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def convert_write_errors(folder: Path) -> Iterator[None]:
    """Refuse to go on where a checkpoint cannot be written: the disk is full, or not ours."""
    try:
        yield
    except OSError as error:
        advice = "the one before it is whole: make room and start again"
        raise DataError(
            "todo.key", f"cannot write the checkpoint {folder}: {error}; {advice}"
        ) from error
