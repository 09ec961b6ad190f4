"""Shards: the tensors of one rank in one HDF5 file; a failed write raises an error.

Invariant: HDF5 lays out a shard in memory and never writes to the disk, since its library may crash
the process when a write fails.

::

    layout (kept by later saves)     header | fc1.weight | header | fc1.bias | ...
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import h5py
import torch
from torch import Tensor

from dtrain.checkpoint.files import open_plain_file
from dtrain.checkpoint.shard_file import ALIGNMENT, SHARD_HASH, write_file_of_parts
from dtrain.errors import CheckpointError

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

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return sum(map(len, self.headers)) + sum(
            _size_bytes(*self.specs[key]) for key in self.order
        )

    def parts(self, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
        """Yield the bytes of the file."""
        yield self.headers[0]
        for key, header in zip(self.order, self.headers[1:], strict=True):
            yield _as_bytes(tensors[key])
            yield header

    def row(self, name: str, digest: str) -> dict[str, Any]:
        """Return the row of the manifest for a shard of this layout."""
        return {"file": name, "bytes": self.nbytes, SHARD_HASH: digest, "keys": list(self.specs)}


def layout_of(tensors: Mapping[str, Tensor]) -> ShardLayout:
    """Return the layout of the shard of these tensors."""
    return _layout(
        tuple((key, (tuple(tensor.shape), tensor.dtype)) for key, tensor in tensors.items())
    )


@lru_cache(maxsize=8)
def _layout(specs: tuple[tuple[str, TensorSpec], ...]) -> ShardLayout:
    sizes = {key: _size_bytes(*spec) for key, spec in specs}
    image = SparseImage(sum(sizes.values()) + IMAGE_BYTES + len(specs) * IMAGE_BYTES_PER_KEY)
    offsets = {}
    with h5py.File(image, "w") as shard:
        for key, (shape, dtype) in specs:
            dataset = _create_dataset(shard, key, shape, dtype)
            if sizes[key]:
                offsets[key] = dataset.id.get_offset()
    order = sorted(offsets, key=offsets.__getitem__)
    starts = [0, *(offsets[key] + sizes[key] for key in order)]
    ends = [*(offsets[key] for key in order), image.size]
    headers = map(image.bytes_between, starts, ends)
    return ShardLayout(dict(specs), tuple(order), tuple(headers))


def write_shard(
    path: Path,
    tensors: Mapping[str, Tensor],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write one shard, sync it, and return its row for the manifest: file, bytes, hash, keys.

    Parameters
    ----------
    check : callable
        Called between two writes; an error that it raises ends the work.

    Raises
    ------
    OSError
        The first error of the disk.
    """
    layout = layout_of(tensors)
    digest = write_file_of_parts(path, layout.parts(tensors), layout.nbytes, check)
    return layout.row(path.name, digest)


def write_image(
    path: Path, image: ShardImage, check: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write an image as a shard. Parameters, errors and result are those of `write_shard`."""
    assert image.layout is not None
    digest = write_file_of_parts(path, [image.data], image.layout.nbytes, check)
    return image.layout.row(path.name, digest)


@final
class ShardImage:
    """A whole shard in aligned memory that later ones use again.

    Attributes
    ----------
    layout : ShardLayout or None
        None before the first one.
    """

    def __init__(self) -> None:
        self.layout: ShardLayout | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._places: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the copies; the headers between them take a few kilobytes more."""
        return sum(place.nbytes for place in self._places.values())

    @property
    def data(self) -> memoryview:
        """The bytes of the shard."""
        return self._bytes().numpy().data

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors to memory of the host."""
        layout = layout_of(tensors)
        if layout is not self.layout:
            self._lay_out(layout, any(tensor.is_cuda for tensor in tensors.values()))
        for key, place in self._places.items():
            place.copy_(tensors[key].detach().contiguous().view(-1).view(torch.uint8))

    def _lay_out(self, layout: ShardLayout, pinned: bool) -> None:
        """Allocate memory, pinned for copies from a GPU, and write the headers into it."""
        self._memory = torch.empty(layout.nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
        self.layout, self._places = layout, {}
        start, image = 0, self._bytes()
        for key, header in zip((*layout.order, None), layout.headers, strict=True):
            end = start + len(header)
            image[start:end] = torch.tensor(list(header), dtype=torch.uint8)
            start = end
            if key is not None:
                end += _size_bytes(*layout.specs[key])
                self._places[key], start = image[start:end], end

    def _bytes(self) -> Tensor:
        start = -self._memory.data_ptr() % ALIGNMENT
        assert self.layout is not None
        return self._memory[start : start + self.layout.nbytes]


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
