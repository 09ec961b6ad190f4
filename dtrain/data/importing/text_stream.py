"""Texts as files of tokens: one array of integers that lies in one piece, so that it can be mapped.

Invariant: a text is read piece by piece; the numbers of its characters follow their sorted order.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import final

import h5py
import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.formats.hdf5_writer import write_pieces
from dtrain.data.formats.text_set import (
    BYTE_NAMES,
    TOKENS,
    Tokens,
    encode_characters,
    no_utf8,
    open_bytes,
    token_dtype,
)
from dtrain.errors import DataError

PIECE_BYTES = 1 << 22
"""Bytes that are read at once."""


def is_text(source: Path) -> bool:
    """Return whether a file is a text by its name."""
    return source.is_file() and source.suffix == ".txt"


@final
class TextFile:
    """A text that becomes the tokens of one file.

    Parameters
    ----------
    path : Path
        The text.
    tokens : "bytes" or "characters"
        What a token is.

    Raises
    ------
    DataError
        The text is empty, or no UTF-8 where tokens are characters.
    """

    names = ("train",)

    def __init__(self, path: Path, tokens: Tokens) -> None:
        self._path, self._tokens = path, tokens
        self._count = len(open_bytes(path))
        if not self._count:
            raise DataError("import.text-empty", f"{path} is empty: give a text")
        self._alphabet: tuple[str, ...] = ()
        if tokens == "characters":
            characters: set[str] = set()
            self._count = 0
            for text in self._texts():
                characters.update(text)
                self._count += len(text)
            self._alphabet = tuple(sorted(characters))

    def write(self, files: list[h5py.File]) -> None:
        """Write tokens and their names."""
        [file] = files
        names = self._alphabet or BYTE_NAMES
        tokens = file.create_dataset(TOKENS, (self._count,), token_dtype(len(names)))
        write_pieces(tokens, self._pieces(), TOKENS)
        file.attrs["classes"] = list(names)

    def _pieces(self) -> Iterator[Array]:
        if not self._alphabet:
            for content in self._contents():
                yield np.frombuffer(content, np.uint8)
        for text in self._texts() if self._alphabet else ():
            yield encode_characters(text, self._alphabet)

    def _contents(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            while content := file.read(PIECE_BYTES):
                yield content

    def _texts(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for content in self._contents():
                yield decoder.decode(content)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise no_utf8(self._path, error) from error
