"""Many commands in the same ranks: `mpirun -n 2 python tests/system/on_ranks.py FOLDER`.

Ranks take seconds to start, so commands whose ranks all end normally share one start. Every rank
runs the commands of `FOLDER/commands.json` (name -> arguments) in turn and writes exit codes and
output to `FOLDER/rank-<r>.json`. Beforehand it checks that MPI is imported before torch, and it
sends itself SIGURG between the two.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.cli import main

STACK = "Current thread"
"""Beginning of the stacks that a rank prints where it has no run folder yet."""


@dataclass(frozen=True)
class Result:
    """Exit code and output of a command on one rank."""

    code: int
    out: str
    err: str


class TorchWatch:
    """An import hook that acts when torch is imported first."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            assert "mpi4py.MPI" in sys.modules
            os.kill(os.getpid(), signal.SIGURG)


def write_commands(folder: Path, commands: Mapping[str, Sequence[str | Path]]) -> list[str]:
    """Write the commands to a folder; return the command line of a rank."""
    words = {name: [str(word) for word in argv] for name, argv in commands.items()}
    (folder / "commands.json").write_text(json.dumps(words))
    return [sys.executable, __file__, str(folder)]


def read_results(folder: Path, ranks: int) -> dict[str, list[Result]]:
    """Return the results of every command, one per rank."""
    tables = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [Result(*table[name]) for table in tables] for name in tables[0]}


def run_commands(folder: Path) -> None:
    """Run all commands on this rank."""
    sys.meta_path.insert(0, TorchWatch())  # type: ignore[arg-type]
    results = {}
    for name, argv in json.loads((folder / "commands.json").read_text()).items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
        results[name] = (code, out.getvalue(), err.getvalue())
    from mpi4py import MPI

    (folder / f"rank-{MPI.COMM_WORLD.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_commands(Path(sys.argv[1]))
