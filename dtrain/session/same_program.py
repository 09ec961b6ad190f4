"""All ranks run the same thing: run file, user's code, versions, environment and dtrain's own code.

Invariant: it is compared before the first collective that depends on the run, so that a stale file
on one node is named and nothing hangs.
"""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dtrain
from dtrain.checkpoint.saved_fingerprint import source_hashes
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.schema import flatten_table

VARIABLES = (
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("MKL_CBWR", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"),
)
"""Variables of the environment that change the numbers that torch computes."""


ADDRESS = re.compile(" at 0x[0-9a-f]+")


def check_same_program(run: RunConfig, comm: Comm) -> None:
    """Verify that all ranks have the same run, versions and environment. Collective over `comm`.

    Raises
    ------
    ConfigError
        On all ranks; it names a rank and the first key that differs.
    """
    rows = {key: ADDRESS.sub("", repr(value)) for key, value in flatten_table(run.to_table())}
    _compare(rows | _versions() | _environment(), comm)


def check_same_source(run: RunConfig, comm: Comm) -> None:
    """Verify that all ranks have imported the same text of the user's modules. Collective.

    Raises
    ------
    ConfigError
        On all ranks; it names a rank and the module.
    """
    _compare({f"the text of {name}": text for name, text in source_hashes(run).items()}, comm)


def _compare(rows: dict[str, str], comm: Comm) -> None:
    if comm.size == 1:
        return
    own_hash = blake2b(repr(sorted(rows.items())).encode()).hexdigest()
    if len(set(comm.allgather_object(own_hash))) == 1:
        return
    first, *others = comm.allgather_object(rows)
    for rank, other in enumerate(others, 1):
        for key in sorted({**first, **other}, key=lambda key: (not key.endswith("name"), key)):
            was, now = first.get(key, "absent"), other.get(key, "absent")
            if was != now:
                raise ConfigError(
                    "ranks.program-differs",
                    f"rank {rank} on {comm.hosts[rank]} does not run what rank 0 on "
                    f"{comm.hosts[0]} runs: {key} is {now} there and {was} on rank 0; give all "
                    "nodes the same files and the same environment",
                    on_all_ranks=True,
                )


def _versions() -> dict[str, Any]:
    return {
        "version of Python": platform.python_version(),
        "version of torch": torch.__version__,
        "version of numpy": np.__version__,
        "code of dtrain": _own_code(),
    }


def _environment() -> dict[str, str]:
    return {f"environment variable {name}": os.environ.get(name, "absent") for name in VARIABLES}


@cache
def _own_code() -> str:
    """Return a hash of the text of this package."""
    root, digest = Path(dtrain.__file__).parent, blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
