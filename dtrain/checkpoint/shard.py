"""Shards: the tensors of one rank in one HDF5 file; a failed write raises an error.

Invariant: HDF5 lays out a shard in memory and never writes to the disk, since its library may crash
the process when a write fails. The hash is that of the tensors in memory, so it finds a byte that
was written wrongly.

::

    layout (kept by later saves)     header | fc1.weight | header | fc1.bias | ...
    one thread                       writes the parts in order, then syncs
    another thread                   hashes the same parts
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any, final

import h5py
import torch
from torch import Tensor

from dtrain.checkpoint import files
from dtrain.checkpoint.files import open_plain_file
from dtrain.errors import CheckpointError

PART_BYTES = 1 << 24
"""Bytes that are written or hashed at once."""


JOINED_BYTES = 1 << 20
"""Smaller parts are joined up to about this size."""


IMAGE_BYTES, IMAGE_BYTES_PER_KEY = 1 << 20, 1 << 16
"""Address space for the headers of a shard; untouched pages of it take no memory."""


TensorSpec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype."""


@final
class SparseImage(io.RawIOBase):
    """The file that HDF5 sees: memory of which only written pages exist.

    Attributes
    ----------
    size : int
        Length of the file.
    """

    def __init__(self, capacity: int) -> None:
        self._memory = mmap.mmap(-1, capacity)
        self._position = self.size = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Read at the position; memory that was never written is zero."""
        view = memoryview(buffer).cast("B")
        view[:] = self.bytes_between(self._position, self._position + len(view))
        self._position += len(view)
        return len(view)

    def write(self, data: Any, /) -> int:
        """Write at the position."""
        view = memoryview(data).cast("B")
        end = self._position + len(view)
        self._memory[self._position : end] = view
        self._position, self.size = end, max(self.size, end)
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Set the length."""
        self.size = self._position if size is None else size
        return self.size

    def flush(self) -> None:
        """Do nothing; HDF5 calls it."""

    def bytes_between(self, start: int, end: int) -> bytes:
        """Return a part of the file."""
        return self._memory[start:end]


@final
@dataclass(frozen=True)
class ShardLayout:
    """Where the tensors of a shard stand in its file, and all bytes between them.

    Attributes
    ----------
    specs : dict of str to (shape, dtype)
        The tensors, by key.
    order : tuple of str
        Keys of the tensors with elements, in the order of the file.
    headers : tuple of bytes
        The bytes before each of these, and those after the last.
    """

    specs: dict[str, TensorSpec]
    order: tuple[str, ...]
    headers: tuple[bytes, ...]

    @staticmethod
    def of(specs: Mapping[str, TensorSpec]) -> ShardLayout:
        """Return the layout for tensors of these shapes and dtypes."""
        sizes = {key: _size_bytes(*spec) for key, spec in specs.items()}
        image = SparseImage(sum(sizes.values()) + IMAGE_BYTES + len(specs) * IMAGE_BYTES_PER_KEY)
        offsets = {}
        with h5py.File(image, "w") as shard:
            for key, (shape, dtype) in specs.items():
                dataset = _create_dataset(shard, key, shape, dtype)
                if sizes[key]:
                    offsets[key] = dataset.id.get_offset()
        order = sorted(offsets, key=offsets.__getitem__)
        starts = [0, *(offsets[key] + sizes[key] for key in order)]
        ends = [*(offsets[key] for key in order), image.size]
        headers = map(image.bytes_between, starts, ends)
        return ShardLayout(dict(specs), tuple(order), tuple(headers))


def tensor_specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return shape and dtype of tensors, by key."""
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def write_shard(
    path: Path,
    tensors: Mapping[str, Tensor],
    layout: ShardLayout | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write one shard, sync it, and return its row for the manifest: file, bytes, sha256, keys.

    Parameters
    ----------
    layout : ShardLayout, optional
        That of an earlier shard with the same specs.
    check : callable
        Called between two parts; an error that it raises ends the work.

    Raises
    ------
    OSError
        The first error of the disk.
    """
    layout = layout or ShardLayout.of(tensor_specs(tensors))
    arrays = {key: _as_bytes(tensors[key]) for key in layout.order}
    parts: list[Any] = [layout.headers[0]]
    for key, header in zip(layout.order, layout.headers[1:], strict=True):
        parts += [arrays[key], header]
    size, digest = write_parts(path, parts, check)
    return {"file": path.name, "bytes": size, "sha256": digest, "keys": list(tensors)}


def write_parts(
    path: Path, parts: Sequence[Any], check: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Write a new file of these parts and sync it; return its bytes and its SHA-256.

    Another thread hashes the parts meanwhile.
    """
    digest, stopped = sha256(), list[bool]()

    def hash_parts() -> None:
        for part in _split(parts):
            if stopped:
                return
            digest.update(part)

    thread = Thread(target=hash_parts, name="dtrain-hash", daemon=True)
    size = 0
    thread.start()
    try:
        descriptor = files.calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            for part in _split(parts):
                check()
                files.write_all(descriptor, part)
                size += len(part)
            files.calls.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        stopped.append(True)
        raise
    finally:
        thread.join()
    return size, digest.hexdigest()


def copy_file(source: Path, target: Path, check: Callable[[], None]) -> str:
    """Copy a file and sync the copy; return its SHA-256. `check` is that of `write_shard`."""
    digest = sha256()
    descriptor = files.calls.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with open_plain_file(source) as file:
            while part := file.read(PART_BYTES):
                check()
                digest.update(part)
                files.write_all(descriptor, part)
        files.calls.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


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
    if dataset.dtype != "uint16":  # reading a damaged text may not end in the library of HDF5
        return tensor
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


def _create_dataset(
    shard: h5py.File, key: str, shape: tuple[int, ...], dtype: torch.dtype
) -> h5py.Dataset:
    """Create the dataset of a tensor, which gets its place in the file and no numbers."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)  # equal tensors have equal shards
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    stored = torch.empty(0, dtype=_stored_dtype(dtype)).numpy().dtype
    kind, space = h5py.h5t.py_create(stored, logical=True), h5py.h5s.create_simple(shape)
    if not shape:
        space = h5py.h5s.create(h5py.h5s.SCALAR)
    dataset = h5py.Dataset(h5py.h5d.create(shard.id, key.encode(), kind, space, settings, links))
    dataset.attrs["dtype"] = str(dtype).removeprefix("torch.")
    return dataset


def _stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in the file; neither numpy nor HDF5 has bfloat16."""
    return torch.uint16 if dtype == torch.bfloat16 else dtype


def _size_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in C order; a copy only where its memory has another order."""
    plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return plain.numpy().data


def _split(parts: Sequence[Any]) -> Iterator[memoryview]:
    """Yield the parts in pieces that are neither very small nor very large."""
    joined = bytearray()
    for part in parts:
        view = memoryview(part)
        if len(joined) + len(view) <= JOINED_BYTES:
            joined += view
            continue
        if joined:
            yield memoryview(bytes(joined))
            joined.clear()
        for start in range(0, len(view), PART_BYTES):
            yield view[start : start + PART_BYTES]
    if joined:
        yield memoryview(bytes(joined))
