"""A disk that records the calls of `dtrain.checkpoint.files`, and what a crash may leave of them.

Invariant: every state follows from the calls before the crash. After a kill all of them have
happened. After a power cut, a change is certain only if its file, or the folder of its name, was
synced later; all others may be missing, in any order: a rename may be there without the data.

::

    calls   open a   write a   fsync a   rename a b   open c   write c | crash
    killed  a's data under the name b, and c with its data
    cut     b may be there or not, under either name, but always with its data; c may be empty
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar

from dtrain.checkpoint.files import FileCalls

T = TypeVar("T")

Mode = Literal["killed", "torn", "synced", "names", "data", "removals", "random"]

POWER_CUTS: tuple[Mode, ...] = ("synced", "names", "data", "removals", "random")
"""What has reached the disk of changes that were not synced: none, those of names, of contents,
those that remove a name, or any."""


@dataclass(eq=False)
class Node:
    """A file, or a folder with `names`."""

    content: bytes = b""
    names: dict[str, Node] | None = None


@dataclass(frozen=True)
class Change:
    """One change: `apply` makes it in a state, and a sync of `owner` makes it certain."""

    owner: Node
    kind: Literal["name", "data", "removal", "sync"]
    apply: Callable[[State, bool], None]


@dataclass
class State:
    """Contents of files and names in folders, by node."""

    contents: dict[Node, bytearray] = field(default_factory=dict)
    names: dict[Node, dict[str, Node]] = field(default_factory=dict)

    def content(self, node: Node) -> bytearray:
        """Return the content of a file, which may be changed."""
        return self.contents.setdefault(node, bytearray(node.content))

    def folder(self, node: Node) -> dict[str, Node]:
        """Return the names in a folder, which may be changed."""
        return self.names.setdefault(node, dict(node.names or {}))

    def files(self, node: Node, path: str = "") -> Iterator[tuple[str, bytes | None]]:
        """Yield path and content of all files below a folder; None: an empty folder."""
        for name, child in self.folder(node).items():
            if child.names is None:
                yield f"{path}{name}", bytes(self.content(child))
            else:
                yield f"{path}{name}/", None
                yield from self.files(child, f"{path}{name}/")


def locked(call: Callable[..., T]) -> Callable[..., T]:
    """Let one thread at a time make and record a call."""

    @wraps(call)
    def guarded(calls: RecordingCalls, *words: Any) -> T:
        with calls.lock:
            return call(calls, *words)

    return guarded


class RecordingCalls(FileCalls):
    """Makes the calls, and records those below a folder.

    Parameters
    ----------
    root : Path
        The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.changes: list[Change] = []
        self._tree = _read_tree(self.root)
        self._now = State()
        self._open: dict[int, Node] = {}
        self.lock = threading.RLock()  # shards may be written by threads

    @locked
    def open(self, path: str | Path, flags: int) -> int:
        """Open a file for writing."""
        descriptor = super().open(path, flags)
        folder, name = self._place(Path(path))
        node = self._now.folder(folder).get(name)
        if node is None:
            node = Node()
            self._put(folder, name, node)
        elif flags & os.O_TRUNC:
            self._cut(node, 0)
        self._open[descriptor] = node
        return descriptor

    @locked
    def write(self, descriptor: int, data: memoryview) -> int:
        """Write to a file."""
        start, content = os.lseek(descriptor, 0, os.SEEK_CUR), bytes(data)
        written = super().write(descriptor, data)
        node = self._open[descriptor]

        def apply(state: State, torn: bool) -> None:
            buffer, end = state.content(node), len(content) // 2 if torn else len(content)
            buffer.extend(bytes(max(0, start + end - len(buffer))))
            buffer[start : start + end] = content[:end]

        self._record(Change(node, "data", apply))
        return written

    @locked
    def truncate(self, descriptor: int, size: int) -> None:
        """Change the length of a file."""
        super().truncate(descriptor, size)
        self._cut(self._open[descriptor], size)

    @locked
    def fsync(self, descriptor: int) -> None:
        """Sync a file or folder."""
        super().fsync(descriptor)
        node = self._find(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        self._record(Change(node, "sync", lambda state, torn: None))

    @locked
    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or folder."""
        super().rename(source, target)
        (folder, old), (other, new) = self._place(source), self._place(target)
        assert folder is other, "a rename is certain when one folder is synced"
        node = self._now.folder(folder)[old]

        def apply(state: State, torn: bool) -> None:
            names = state.folder(folder)
            if names.get(old) is node:
                del names[old]
            names[new] = node

        self._record(Change(folder, "removal", apply))

    @locked
    def exchange(self, one: Path, other: Path) -> None:
        """Exchange two names."""
        super().exchange(one, other)
        (folder, first), (same, second) = self._place(one), self._place(other)
        assert folder is same, "an exchange is certain when one folder is synced"
        nodes = self._now.folder(folder)[second], self._now.folder(folder)[first]

        def apply(state: State, torn: bool) -> None:
            state.folder(folder).update(zip((first, second), nodes, strict=True))

        self._record(Change(folder, "removal", apply))

    @locked
    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name."""
        super().link(source, target)
        self._put(*self._place(target), self._find(source))

    @locked
    def unlink(self, path: Path) -> None:
        """Remove a name."""
        super().unlink(path)
        self._remove(path)

    @locked
    def mkdir(self, path: Path) -> None:
        """Make a folder."""
        super().mkdir(path)
        self._put(*self._place(path), Node(names={}))

    @locked
    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        super().rmdir(path)
        self._remove(path)

    def _place(self, path: Path) -> tuple[Node, str]:
        return self._find(path.parent), path.name

    def _find(self, path: Path) -> Node:
        node = self._tree
        for name in path.resolve().relative_to(self.root).parts:
            names = self._now.folder(node)
            if name not in names:  # made by something else than these calls
                names[name] = _read_tree(self.root / path)
            node = names[name]
        return node

    def _put(self, folder: Node, name: str, node: Node) -> None:
        self._record(
            Change(folder, "name", lambda state, torn: state.folder(folder).update({name: node}))
        )

    def _remove(self, path: Path) -> None:
        folder, name = self._place(path)
        self._record(
            Change(folder, "removal", lambda state, torn: _forget(state.folder(folder), name))
        )

    def _cut(self, node: Node, size: int) -> None:
        def apply(state: State, torn: bool) -> None:
            content = state.content(node)
            content.extend(bytes(max(0, size - len(content))))
            del content[size:]

        self._record(Change(node, "data", apply))

    def _record(self, change: Change) -> None:
        change.apply(self._now, False)
        self.changes.append(change)

    def inside_writes(self, count: int) -> bool:
        """Return whether the calls before and after a crash both write data to a file."""
        around = self.changes[max(0, count - 1) : count + 1]
        return len(around) == 2 and all(change.kind == "data" for change in around)

    def crash(self, count: int, mode: Mode, seed: int = 0) -> dict[str, bytes | None]:
        """Return what is on the disk after a crash behind `count` calls: content by path."""
        rng, state, synced = random.Random(seed), State(), set[Node]()
        kinds = {"names": ("name", "removal"), "data": ("data",), "removals": ("removal",)}
        certain = [mode in ("killed", "torn")] * count
        for number in reversed(range(count)):
            change = self.changes[number]
            if change.kind == "sync":
                synced.add(change.owner)
            certain[number] |= change.owner in synced or change.kind in kinds.get(mode, ())
            certain[number] |= mode == "random" and rng.random() < 0.5
        for number in range(count):
            torn = mode == "torn" and number == count - 1
            if certain[number]:
                self.changes[number].apply(state, torn)
        return dict(state.files(self._tree))


class Folder:
    """A folder that shows one state after the other; only what differs is written.

    Parameters
    ----------
    path : Path
        It is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shown: dict[str, bytes | None] = {}
        path.mkdir()

    def show(self, files: Mapping[str, bytes | None]) -> None:
        """Hold these files; a path that ends in a slash is a folder."""
        for name in sorted(self._shown.keys() - files.keys(), reverse=True):
            path = self.path / name
            path.rmdir() if name.endswith("/") else path.unlink()
        for name in sorted(files):
            if self._shown.get(name, ...) == files[name]:
                continue
            if (content := files[name]) is None:
                (self.path / name).mkdir()
            else:
                (self.path / name).write_bytes(content)
        self._shown = dict(files)


def _read_tree(path: Path) -> Node:
    if path.is_file():
        return Node(path.read_bytes())
    return Node(names={child.name: _read_tree(child) for child in path.iterdir()})


def _forget(names: dict[str, Node], name: str) -> None:
    names.pop(name, None)
