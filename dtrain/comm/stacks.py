"""Stacks of this process, and the line of a user's code where it is.

Invariant: the standard library alone; a line is found without reading a file.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

PACKAGE = str(Path(__file__).parents[1]) + os.sep
"""Where the files of dtrain are."""


SERVICES = tuple(
    f"dtrain-{name}" for name in ("pulse", "watch", "stop", "parent", "heartbeat", "hash")
)
"""Threads of dtrain that run no code of a user."""


STANDARD_LIBRARY = str(Path(os.__file__).parent) + os.sep
"""Where the files of Python are."""


StackSource = FrameType | BaseException | None
"""A frame or an exception: both have a stack."""


def stack_lines(stack_source: StackSource) -> Iterator[str]:
    if stack_source is None:
        return
    yield ""
    yield "stack"
    if isinstance(stack_source, BaseException):
        lines = traceback.format_exception(stack_source)
    else:
        lines = traceback.format_stack(stack_source)
    yield from "".join(lines).splitlines()


def thread_lines(frame: FrameType) -> Iterator[str]:
    """Yield the stacks of all threads but that of `frame`."""
    for name, other in other_threads(frame):
        yield f"\nstack of thread {name}"
        yield "".join(traceback.format_stack(other))


def innermost_line(stack_source: StackSource) -> str | None:
    """Return file, line and function of the innermost frame outside libraries; read no file."""
    if stack_source is None:
        return None
    frames: list[tuple[FrameType, int]]
    if isinstance(stack_source, BaseException):
        frames = list(traceback.walk_tb(stack_source.__traceback__))[::-1]
    else:
        frames = list(traceback.walk_stack(stack_source))
    if not frames:
        return None
    own = (entry for entry in frames if not _is_library(entry[0].f_code.co_filename))
    frame, line = next(own, frames[0])
    return f"{Path(frame.f_code.co_filename).name}:{line} in {frame.f_code.co_name}"


def user_line(frame: FrameType | None) -> str | None:
    """Return the line where this rank is: of `frame`, its main thread, or of a user's code.

    A main thread inside dtrain may wait for a thread that runs such code, which reads samples.
    """
    if frame is not None and _is_own(frame):
        for _, other in other_threads(frame):
            if not _is_own(other) and not _is_library(_program_frame(other).f_code.co_filename):
                return innermost_line(other)
    return innermost_line(frame)


def other_threads(frame: FrameType) -> Iterator[tuple[str, FrameType]]:
    """Yield name and frame of each thread but that of `frame` and those that serve dtrain."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, other in sys._current_frames().items():
        name = names.get(ident, str(ident))
        if other is not frame and name not in SERVICES:
            yield name, other


def _program_frame(frame: FrameType) -> FrameType:
    """Return the innermost frame outside libraries, the innermost one if there is none."""
    frames = (each for each, _ in traceback.walk_stack(frame))
    return next((f for f in frames if not _is_library(f.f_code.co_filename)), frame)


def _is_own(frame: FrameType) -> bool:
    """Return whether the innermost frame outside libraries is one of dtrain."""
    return _program_frame(frame).f_code.co_filename.startswith(PACKAGE)


def _is_library(filename: str) -> bool:
    if filename.startswith(PACKAGE):
        return False
    return "site-packages" in filename or filename.startswith(("<frozen ", STANDARD_LIBRARY))
