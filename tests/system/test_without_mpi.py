"""Commands that need no MPI work without a library of it, and in a shell of `srun --pty`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

from tests.conftest import ROOT
from tests.process import start
from tests.system.conftest import Shared

ON_RANKS = {"train", "run", "evaluate", "predict"}
CODES = {"flight": 2, "doctor": 1}
"""Exit codes that are not 0: the run is finished, and there is no MPI library."""

SRUN_SHELL = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "PMI_RANK": "0",
    "PMI_SIZE": "4",
    "PMI_JOBID": "7.0",
    "PMIX_RANK": "0",
    "PMIX_NAMESPACE": "slurm.pmix.7.0",
}
"""Variables that `srun -n4 --pty bash` sets in its first task."""


def commands_of(help_text: str) -> list[str]:
    """Return the commands or verbs that a help lists."""
    return re.findall(r"^    ([a-z]+)\s", help_text, re.MULTILINE)


def test_all_commands_but_those_of_ranks_work_without_mpi_in_a_shell_of_srun(
    shared: Shared, clean: dict[str, str], tmp_path: Path
) -> None:
    run, out = shared.folder / "run.toml", shared.folder / "out"
    x = np.arange(40.0).reshape(20, 2)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(20) % 2)
    data = tmp_path / "x.h5"
    commands: list[list[str | Path]] = [
        ["plan", run, "--ranks", "2", "--json"],
        ["flight", out],
        ["export", out, tmp_path / "net.pt"],
        ["data", "import", tmp_path / "x.npz", data],
        ["data", "describe", run],
        ["data", "stats", data],
        ["data", "rechunk", data, tmp_path / "y.h5"],
        ["checkpoint", "ls", out],
        ["checkpoint", "verify", out],
        ["checkpoint", "diff", out, out],
        ["submit", run, "--site", "workstation", "--dry-run", "--out", tmp_path / "job"],
        ["status", out],
        ["compare", out, out],
        ["report", out, tmp_path / "page.html"],
        ["doctor", "--json", "--out", tmp_path],
    ]
    names = {str(words[0]) for words in commands}
    groups = [["--help"], *([name, "--help"] for name in sorted(names | ON_RANKS))]
    (tmp_path / "commands.json").write_text(json.dumps([*commands, *groups], default=str))
    script = ROOT / "tests" / "system" / "scripts" / "shell_commands.py"
    words = [sys.executable, script, tmp_path / "commands.json", tmp_path / "results.json"]
    library = tmp_path / "library" / "mpi4py"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("class rc: pass")
    (library / "MPI.py").write_text('raise RuntimeError("cannot load MPI library")')
    path = {"PYTHONPATH": f"{library.parent}:{ROOT}"}
    ended = start(words, limit_s=180, env=clean | SRUN_SHELL | path, cwd=ROOT)
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / "results.json").read_text())
    for command, (code, _, err) in zip([*commands, *groups], results, strict=True):
        expected = 0 if "--help" in command else CODES.get(str(command[0]), 0)
        assert (code, "Traceback" in err) == (expected, False), (command, err)
    help_texts = {
        group[0]: text for group, (_, text, _) in zip(groups, results[-len(groups) :], strict=True)
    }
    assert names | ON_RANKS == set(commands_of(help_texts["--help"]))
    for name in ("data", "checkpoint"):
        verbs = {str(words[1]) for words in commands if words[0] == name}
        assert verbs == set(commands_of(help_texts[name]))
    table = json.loads(results[commands.index(commands[-1])][1])
    keys = {finding["key"] for area in table["areas"] for finding in area["findings"]}
    assert keys >= {"launch.no-mpi-library", "launch.pty-shell"}
