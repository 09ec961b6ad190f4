"""Image folders and tars of them: the images' paths, headers and pixels.

::

    mode of Pillow    1, L, LA    others       I;16      I        F
    stored as         1 x uint8   3 x uint8    uint16    int32    float32

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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal, final

import numpy as np

from dtrain.data.conversion import Array
from dtrain.errors import DataError

if TYPE_CHECKING:
    from PIL import Image, ImageFile


SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")


# Decoders of pixels only, since others of Pillow may start programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


READ_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


PathParts = tuple[str, ...]
"""A path within the source, split at the slashes."""


Opener = Callable[[], IO[bytes]]


Header = tuple[tuple[int, int], str]
"""(width, height) in pixels, and Pillow's mode."""


Fit = Literal["resize", "crop"]


DEEP_DTYPES = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
"""Pillow's modes of more than 8 bits."""


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


@final
@dataclass(frozen=True)
class PixelFormat:
    """The form that all images get.

    Attributes
    ----------
    mode : str
        "L", "RGB", or one of `DEEP_DTYPES`.
    size : (int, int)
        (height, width) in pixels.
    fit : "resize", "crop" or None
        How images of other sizes get this one: the shorter side is resized to it, then the centre
        is cropped; or the centre is cropped as it is. None: all images have it.
    """

    mode: str
    size: tuple[int, int]
    fit: Fit | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return 3 if self.mode == "RGB" else 1, *self.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the pixels."""
        return np.dtype(DEEP_DTYPES.get(self.mode, np.uint8))


def read_header(opener: Opener, location: str) -> Header:
    """Read an image's size and mode, without decoding its pixels.

    Raises
    ------
    DataError
        The file is no image, or Pillow would drop half of the bits of its colours.
    """
    with _open_image(opener, location) as image:
        is_deep = image.mode[0] in "IF"
        if not is_deep and any(";16" in str(tile[3]) for tile in image.tile):
            raise DataError(
                "import.colour-depth",
                f"{location}: its colours have 16 bits, and Pillow reads 8 of them: convert the "
                "image to 8 bits, or import an array (.npy)",
            )
        return image.size, "I;16" if image.mode.startswith("I;16") else image.mode


def read_pixels(opener: Opener, form: PixelFormat, location: str) -> Array:
    """Read an image as (channels, height, width) of `form`.

    Raises
    ------
    DataError
        The image is damaged, or smaller than a size to crop to.
    """
    with _open_image(opener, location) as image:
        is_as_stored = image.mode == form.mode or form.mode == "I;16"
        converted = image if is_as_stored else image.convert(form.mode)
        array = np.asarray(_fit(converted, form, location))
    array = array.astype(form.dtype, copy=False)
    return array[np.newaxis] if array.ndim == 2 else array.transpose(2, 0, 1)


def _fit(image: Image.Image, form: PixelFormat, location: str) -> Image.Image:
    """Give an image the size of `form`."""
    from PIL import Image

    height, width = form.size
    if form.fit == "resize" and image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        # Older versions of Pillow cannot interpolate the modes of 16 bits.
        image = image.convert("I") if image.mode.startswith("I;16") else image
        image = image.resize(size, Image.Resampling.BILINEAR)
    if image.width < width or image.height < height:
        raise DataError(
            "import.image-too-small",
            f"{location} is {image.height}x{image.width}, smaller than --size {height}x{width}: "
            "use --fit resize, or a smaller size",
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


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
def _open_image(opener: Opener, location: str) -> Iterator[ImageFile.ImageFile]:
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
