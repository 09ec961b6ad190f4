"""Image folders and tars of them: the images' paths, headers and pixels.

::

    airplane/0001.png        train/airplane/0001.png         cifar/train/airplane/0001.png
    <class>/<image>          <split>/<class>/<image>         the same within one outer folder

Invariant: nothing is written to disk and no link in a tar is followed. Members of a tar are read as
a stream; their names are compared, never opened. Hidden files and files without an image's suffix
are ignored.
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


# Decoders of pixels only, since others of Pillow may start programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


READ_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


PathParts = tuple[str, ...]
"""A path within the source, split at the slashes."""


Opener = Callable[[], IO[bytes]]


Header = tuple[tuple[int, int], str]
"""(width, height) in pixels, and Pillow's mode."""


def iter_images(source: Path) -> Iterator[tuple[PathParts, Opener]]:
    """Yield the path of every image and a function that opens it.

    Parameters
    ----------
    source : Path
        A folder or a tar, compressed or not. An image of a tar must be opened before the iterator
        advances.

    Raises
    ------
    DataError
        The source does not exist, is neither a folder nor a tar, or is a damaged tar.
    """
    if source.is_dir():
        yield from _folder_images(source)
    elif not source.exists():
        raise DataError(
            "import.source-missing",
            f"{source}: no such folder or file: give an image folder or a tar",
        )
    else:
        yield from _tar_images(source)


def read_header(opener: Opener, location: str) -> Header:
    """Read an image's size and mode, without decoding its pixels.

    Raises
    ------
    DataError
        The file is no image, or its pixels have more than 8 bits.
    """
    with _open_image(opener, location) as image:
        if image.mode[0] in "IF":
            raise DataError(
                "import.image-depth",
                f"{location}: pixels of mode {image.mode} have more than 8 bits: convert the image "
                f"to 8 bits",
            )
        return image.size, image.mode


def read_pixels(opener: Opener, mode: str, location: str) -> NDArray[np.uint8]:
    """Read an image as (channels, height, width), converted to `mode`, "L" or "RGB".

    Raises
    ------
    DataError
        The image is damaged.
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
        raise DataError(
            "import.tar-damaged", f"{source}: cannot be read as a tar: {error}; make it again"
        ) from error


def _open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None
    return io.BytesIO(stream.read())


def _is_image(parts: PathParts) -> bool:
    """Return whether a path is an image's; hidden files (`._x.jpg`) and `..` are excluded."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(SUFFIXES)


@contextmanager
def _open_image(opener: Opener, location: str) -> Iterator[Image.Image]:
    """Open an image; errors of decoders and of broken archives are raised as `DataError`."""
    from PIL import Image

    try:
        with opener() as stream, Image.open(stream, formats=FORMATS) as image:
            yield image
    except (*READ_ERRORS, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            "import.image-damaged",
            f"{location}: cannot be read as an image: {error}; replace or remove it",
        ) from error
