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

from dtrain.errors import DATA, Refusal

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
# Only decoders of pixels: Pillow's others may start programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)

Parts = tuple[str, ...]
Opener = Callable[[], IO[bytes]]
Header = tuple[tuple[int, int], str]


def images(source: Path) -> Iterator[tuple[Parts, Opener]]:
    """Yield every image's path, split at the slashes, and a function that opens it.

    Parameters
    ----------
    source : Path
        A folder or a tar, compressed or not. A tar's image must be opened before the next is
        asked for.

    Raises
    ------
    Refusal
        With code 3: no such source, neither folder nor tar, or a damaged tar.
    """
    if source.is_dir():
        yield from _folder(source)
    elif not source.exists():
        raise Refusal(f"{source}: no such folder or file: give an image folder or a tar", DATA)
    else:
        yield from _tar(source)


def header(opener: Opener, where: str) -> Header:
    """Return (width, height) and Pillow's mode of an image, without decoding its pixels.

    Raises
    ------
    Refusal
        With code 3: not an image, or one of more than 8 bits.
    """
    with _image(opener, where) as image:
        if image.mode[0] in "IF":
            raise Refusal(
                f"{where}: pixels of mode {image.mode} have more than 8 bits: convert them first",
                DATA,
            )
        return image.size, image.mode


def pixels(opener: Opener, mode: str, where: str) -> NDArray[np.uint8]:
    """Return an image as (channels, height, width), converted to `mode`, "L" or "RGB".

    Raises
    ------
    Refusal
        With code 3: a damaged image.
    """
    with _image(opener, where) as image:
        array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[np.newaxis] if array.ndim == 2 else array.transpose(2, 0, 1)


def _folder(source: Path) -> Iterator[tuple[Parts, Opener]]:
    for folder, _, files in os.walk(source, followlinks=True):
        for name in files:
            path = Path(folder, name)
            parts = path.relative_to(source).parts
            if _wanted(parts):
                yield parts, lambda path=path: path.open("rb")  # type: ignore[misc]


def _tar(source: Path) -> Iterator[tuple[Parts, Opener]]:
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                parts = tuple(part for part in PurePosixPath(member.name).parts if part != "/")
                if member.isreg() and _wanted(parts):
                    yield parts, lambda member=member: _member(tar, member)  # type: ignore[misc]
    except BROKEN as error:
        raise Refusal(f"{source}: cannot be read as a tar: {error}", DATA) from error


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None
    return io.BytesIO(stream.read())


def _wanted(parts: Parts) -> bool:
    """Say whether a path is an image's; hidden ones (`._x.jpg`) and `..` are not."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(SUFFIXES)


@contextmanager
def _image(opener: Opener, where: str) -> Iterator[Image.Image]:
    """Open an image; whatever a decoder or a broken archive raises is a refusal."""
    from PIL import Image

    try:
        with opener() as stream, Image.open(stream, formats=FORMATS) as image:
            yield image
    except (*BROKEN, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refusal(f"{where}: cannot be read as an image: {error}", DATA) from error
