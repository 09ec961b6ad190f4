"""Texts: packed windows of bytes or characters, and the token after each.

=====================  ============================================================
file                   tokens
=====================  ============================================================
a text, "bytes"        its bytes, read through a memory map
a text, "characters"   its characters, numbered in the order of those of the
                       training files; the text is read as a whole
HDF5                   the integers of its dataset `tokens`, through a memory map;
                       the attribute `classes` names them (`dtrain data import`)
=====================  ============================================================

Invariant: a token has the same number in all files of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, final

import numpy as np

from dtrain.data.array_source import ArraySource, LazySource
from dtrain.data.conversion import Array
from dtrain.data.formats.hdf5_set import read_class_names
from dtrain.data.formats.hdf5_source import open_hdf5
from dtrain.data.formats.hdf5_steps import is_hdf5, open_steps
from dtrain.data.formats.mapped_source import MappedSource
from dtrain.data.formats.window_set import StepArrays, WindowSet
from dtrain.errors import ConfigError, DataError

Tokens = Literal["bytes", "characters"]


TOKENS = "tokens"
"""Name of the dataset of a file of tokens."""


@final
@dataclass(frozen=True)
class Text(WindowSet):
    """Windows of a text, and the token behind each of their tokens.

    Parameters
    ----------
    length : int
        Tokens of a sample.
    stride : int, optional
        Tokens from one window to the next, by default `length`: packed windows.
    tokens : "bytes" or "characters", optional
        The tokens of a text, by default bytes; a file of tokens has its own.
    """

    tokens: Tokens | None = None

    @property
    def target_steps(self) -> range:
        return range(1, self.length + 1)

    @property
    def window_stride(self) -> int:
        return self.stride or self.length

    def open_steps(self, paths: Sequence[Path], train: Sequence[Path]) -> dict[Path, StepArrays]:
        files = dict.fromkeys(paths)
        if self.tokens != "characters":
            return {path: self._open(path) for path in files}
        texts = {path: read_text(path) for path in files if not self._is_token_file(path)}
        names = tuple(sorted(set().union(*(texts[path] for path in train if path in texts))))
        return {
            path: _characters(path, texts[path], names) if path in texts else self._open(path)
            for path in files
        }

    def _open(self, path: Path) -> StepArrays:
        """Return the tokens of a file of tokens, or the bytes of a text."""
        if self._is_token_file(path):
            with open_hdf5(path) as file:
                names = read_class_names(file)
            tokens = open_steps(path, TOKENS)
            if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
                raise DataError(
                    "data.tokens-form",
                    f"{path}: '{TOKENS}' has shape {tokens.shape} and dtype {tokens.dtype}: give "
                    "integers (n,), as 'dtrain data import' writes them",
                )
            return StepArrays(tokens, tokens, names)
        source = open_bytes(path)
        return StepArrays(source, source, BYTE_NAMES)

    def _is_token_file(self, path: Path) -> bool:
        """Return whether a file holds tokens; refuse the key `tokens` for it."""
        if not is_hdf5(path):
            return False
        if self.tokens is not None:
            raise ConfigError(
                "data.tokens-of-file",
                f'[data] tokens = "{self.tokens}": {path} holds tokens already: leave it out',
            )
        return True


def byte_name(byte: int) -> str:
    """Return the character of a byte, or its number where it has none."""
    text = chr(byte)
    return text if byte < 128 and text.isprintable() else f"0x{byte:02x}"


BYTE_NAMES = tuple(map(byte_name, range(256)))


def open_bytes(path: Path) -> ArraySource:
    """Return the bytes of a file as a source.

    Raises
    ------
    DataError
        The file is missing.
    """
    if not path.is_file():
        raise DataError("data.file-missing", f"{path} does not exist: correct the path")
    return MappedSource(path, 0, (path.stat().st_size,), np.dtype(np.uint8), str(path))


def read_text(path: Path) -> str:
    """Return a text.

    Raises
    ------
    DataError
        The file is missing, or no UTF-8.
    """
    source = open_bytes(path)
    try:
        return source.read_range(0, len(source)).tobytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise no_utf8(path, error) from error


def no_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    """Return the error for a text that is no UTF-8."""
    return DataError(
        "data.text-encoding",
        f'{path} is no UTF-8 ({error}): convert it, or set tokens = "bytes"',
    )


def _characters(path: Path, text: str, names: tuple[str, ...]) -> StepArrays:
    unknown = sorted(set(text).difference(names))
    if unknown:
        raise DataError(
            "data.character-unknown",
            f"{path} has the characters {', '.join(map(repr, unknown[:5]))}, which the training "
            "files lack: remove them, or add a text that has them",
        )
    load = partial(encode_characters, text, names)
    source = LazySource((len(text),), token_dtype(len(names)), load, str(path))
    return StepArrays(source, source, names)


def token_dtype(count: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest dtype for the numbers of so many tokens."""
    return np.min_scalar_type(max(count - 1, 0))


def encode_characters(text: str, names: Iterable[str]) -> Array:
    """Return the numbers of the characters of a text among sorted `names`."""
    alphabet = np.array([ord(name) for name in names], np.uint32)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.searchsorted(alphabet, codes).astype(token_dtype(len(alphabet)))
