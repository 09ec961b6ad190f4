"""Facts of the MPI library that is loaded in this process: files, binary interface, GPU awareness.

Invariant: no MPI function that sends is called. A fact that the library does not tell is empty, or
"unknown".
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

LIBRARY_FILE = re.compile(r"libmpi(ch|_abi|_cray|_gnu\w*|_intel\w*)?(-[\w.]+)?\.so[.\d]*$")


GPU_QUERIES = {
    "CUDA": ("MPIX_Query_cuda_support",),
    "ROCm": ("MPIX_Query_rocm_support", "MPIX_Query_hip_support"),
    "Level Zero": ("MPIX_Query_ze_support",),
}
"""Functions of Open MPI and of MPICH that return 1 if the library takes memory of such a GPU."""


GPU_SWITCHES = {"MPICH_GPU_SUPPORT_ENABLED": "GPUs", "I_MPI_OFFLOAD": "GPUs"}
"""Variables by which Cray's and Intel's libraries are made GPU-aware, which have no such function.
"""


UNKNOWN = "unknown"


class Library(Protocol):
    """A loaded library; functions are its attributes."""

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:
        """Return a function."""


def library_files(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Return the files of the MPI libraries that this process has loaded."""
    paths: dict[str, None] = {}
    with suppress(OSError):
        for line in maps.read_text(encoding="utf-8").splitlines():
            path = line.split(maxsplit=5)[-1]
            if LIBRARY_FILE.search(path):
                paths[str(Path(path).resolve())] = None
    return list(paths)


def load(files: list[str]) -> Library | None:
    """Return the first of these libraries, which this process has loaded; None: there is none."""
    with suppress(OSError, IndexError):
        return ctypes.CDLL(files[0])
    return None


def binary_interface(library: Library | None) -> str:
    """Return the application binary interface (ABI) of a library; empty: unknown."""
    if library is None:
        return ""
    if hasattr(library, "MPI_Abi_get_version"):
        major, minor = ctypes.c_int(0), ctypes.c_int(0)
        library.MPI_Abi_get_version(ctypes.byref(major), ctypes.byref(minor))
        if major.value > 0:
            return f"MPI ABI {major.value}"
    return "Open MPI" if hasattr(library, "ompi_mpi_comm_self") else "MPICH"


def gpu_awareness(library: Library | None, environ: Mapping[str, str]) -> str:
    """Return the GPUs whose memory a library sends, "none" or "unknown"."""
    kinds, was_asked = [], False
    for kind, names in GPU_QUERIES.items():
        for name in (name for name in names if library is not None and hasattr(library, name)):
            was_asked = True
            kinds += [kind] if getattr(library, name)() == 1 else []
    kinds += [kind for name, kind in GPU_SWITCHES.items() if environ.get(name, "0") != "0"]
    return ", ".join(dict.fromkeys(kinds)) or ("none" if was_asked else UNKNOWN)
