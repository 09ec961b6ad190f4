"""Image folders, and tars of them: which images there are, and their pixels.

::

    airplane/0001.png        train/airplane/0001.png         cifar/train/airplane/0001.png
    <class>/<image>          <split>/<class>/<image>         the same within one outer folder

Invariant: nothing is written to disk and no link in a tar is followed: members are read as a
stream, their names are only compared. Hidden files and files without an image's suffix are ignored.
"""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dtrain.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")


# Only decoders of pixels: Pillow's others may start programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


READ_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


PathParts = tuple[str, ...]


Opener = Callable[[], IO[bytes]]


Header = tuple[tuple[int, int], str]


def images(source: Path) -> Iterator[tuple[PathParts, Opener]]:
    """Yield every image's path, split at the slashes, and a function that opens it.

    Parameters
    ----------
    source : Path
        A folder or a tar, compressed or not. A tar's image must be opened before the next is
        asked for.

    Raises
    ------
    DtrainError
        With code 3: no such source, neither folder nor tar, or a damaged tar.
    """
    if source.is_dir():
        yield from _folder_images(source)
    elif not source.exists():
        raise DataError(
            "todo.key", f"{source}: no such folder or file: give an image folder or a tar"
        )
    else:
        yield from _tar_images(source)


def header(opener: Opener, location: str) -> Header:
    """Return (width, height) and Pillow's mode of an image, without decoding its pixels.

    Raises
    ------
    DtrainError
        With code 3: not an image, or one of more than 8 bits.
    """
    with _open_image(opener, location) as image:
        if image.mode[0] in "IF":
            raise DataError(
                "todo.key",
                f"{location}: pixels of mode {image.mode} have more than 8 bits: convert them first",
            )
        return image.size, image.mode


def pixels(opener: Opener, mode: str, location: str) -> NDArray[np.uint8]:
    """Return an image as (channels, height, width), converted to `mode`, "L" or "RGB".

    Raises
    ------
    DtrainError
        With code 3: a damaged image.
    """
    with _open_image(opener, location) as image:
        array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[np.newaxis] if array.ndim == 2 else array.transpose(2, 0, 1)


def _folder_images(source: Path) -> Iterator[tuple[PathParts, Opener]]:
    for folder, _, files in os.walk(source, followlinks=True):
        for name in files:
            path = Path(folder, name)
            parts = path.relative_to(source).parts
            if _is_image(parts):
                yield parts, lambda path=path: path.open("rb")  # type: ignore[misc]


def _tar_images(source: Path) -> Iterator[tuple[PathParts, Opener]]:
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                parts = tuple(part for part in PurePosixPath(member.name).parts if part != "/")
                if member.isreg() and _is_image(parts):
                    yield parts, lambda member=member: _open_member(tar, member)  # type: ignore[misc]
    except READ_ERRORS as error:
        raise DataError("todo.key", f"{source}: cannot be read as a tar: {error}") from error


def _open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None
    return io.BytesIO(stream.read())


def _is_image(parts: PathParts) -> bool:
    """Say whether a path is an image's; hidden ones (`._x.jpg`) and `..` are not."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(SUFFIXES)


@contextmanager
def _open_image(opener: Opener, location: str) -> Iterator[Image.Image]:
    """Open an image; whatever a decoder or a broken archive raises is a refusal."""
    from PIL import Image

    try:
        with opener() as stream, Image.open(stream, formats=FORMATS) as image:
            yield image
    except (*READ_ERRORS, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError("todo.key", f"{location}: cannot be read as an image: {error}") from error
