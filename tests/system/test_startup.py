"""The start and the end of a program: modules that are not imported, and CPU seconds.

Invariant: no test judges seconds of the wall; other load on the machine must not decide a test.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.process import Ended, start

HEAVY = {"torch", "mpi4py", "numpy", "h5py", "sklearn"}
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}
NOT_IN_RANKS = COMPILER | {"sklearn", "scipy", "matplotlib", "rich", "numpy.testing"}

OPTIMIZERS = """
import sys
import torch
from torch import nn
from dtrain.block.optimizer import make_optimizer, optimizer_classes

for name in optimizer_classes():
    for parameters in [nn.Parameter(torch.ones(3, 3))], [nn.Parameter(torch.ones(3, 3) + 0j)]:
        if name in ("muon", "adafactor", "rprop", "asgd") and parameters[0].is_complex():
            continue
        optimizer = make_optimizer(name, {"lr": 0.1}, parameters)
        parameters[0].grad = torch.ones_like(parameters[0])
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
print(sorted(sys.modules))
"""


@pytest.fixture
def environ(clean: dict[str, str]) -> dict[str, str]:
    """The environment of a user, with the package of this folder."""
    return clean | {"PYTHONPATH": str(ROOT)}


def python(environ: dict[str, str], *words: str | Path) -> Ended:
    """Run Python and return how it ended; its standard error lists all imports."""
    ended = start([sys.executable, "-P", "-X", "importtime", *words], env=environ)
    assert ended.code == 0, ended.err
    return ended


def imported(ended: Ended) -> set[str]:
    """Return the modules that a program imported, from its standard error."""
    names = set(re.findall(r"^import time:.*\| +(\S+)$", ended.err, re.MULTILINE))
    assert "dtrain" in names
    return names


def cpu_seconds(environ: dict[str, str], *words: str | Path) -> float:
    """Return the CPU seconds of Python."""

    def total() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = total()
    ended = start([sys.executable, "-P", *words], env=environ)
    assert ended.code == 0, ended.err
    return total() - before


def demo(folder: Path) -> list[str | Path]:
    """Return the words that train two updates of the demo on one rank."""
    folder.mkdir(exist_ok=True)
    text = (ROOT / "jobs" / "demo.toml").read_text()
    run = folder / "run.toml"
    run.write_text(re.sub(r"^epochs = .*", "updates = 2\nthreads = 1", text, flags=re.MULTILINE))
    return ["-m", "dtrain", "train", run, "--set", "mesh.stages=1", "--out", folder / "out"]


LIGHT = {
    "import": ["-c", "import dtrain"],
    "help": ["-m", "dtrain", "--help"],
    "help of plan": ["-m", "dtrain", "plan", "--help"],
    "help of data": ["-m", "dtrain", "data", "import", "--help"],
    "version": ["-m", "dtrain", "--version"],
}


@pytest.mark.parametrize("words", LIGHT.values(), ids=LIGHT)
def test_help_needs_neither_torch_nor_mpi(environ: dict[str, str], words: list[str]) -> None:
    assert not imported(python(environ, *words)) & HEAVY
    assert min(cpu_seconds(environ, *words) for _ in range(3)) < 0.5


def test_the_starter_of_ranks_needs_neither_torch_nor_mpi(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """A launcher that starts no rank leaves the imports of the command itself."""
    launcher = {"DTRAIN_MPIRUN": "true"}
    ended = python(environ | launcher, *demo(tmp_path), "--ranks", "4")
    assert not imported(ended) & HEAVY


def test_a_rank_trains_without_compiler_and_scikit_learn(
    environ: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    ended = python(environ, *demo(tmp_path))
    names = imported(ended)
    assert names >= {"torch", "dtrain.engine.engine"}
    assert not names & NOT_IN_RANKS


def test_no_optimizer_imports_the_compiler(environ: dict[str, str]) -> None:
    assert not imported(python(environ, "-c", OPTIMIZERS)) & COMPILER


def test_a_rank_costs_little_more_than_torch(environ: dict[str, str], tmp_path: Path) -> None:
    """From the start to the end of the process; torch alone is ended by Python as usual."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pairs = [
        (cpu_seconds(environ, *demo(tmp_path / name)), cpu_seconds(environ, "-c", "import torch"))
        for name in "abc"
    ]
    assert min(ours / torchs for ours, torchs in pairs) < 1.5


@pytest.mark.parametrize("first", ["", "import torch; "], ids=["own process", "user's process"])
def test_only_objects_of_the_imports_escape_the_garbage_collector(
    environ: dict[str, str], first: str
) -> None:
    """Where torch was imported before, there may be objects of the user's."""
    code = f"import gc; {first}from dtrain.comm import world; world(); print(gc.isenabled())"
    ended = python(environ, "-c", f"{code}; print(gc.get_freeze_count())")
    is_enabled, count = ended.out.split()
    assert is_enabled == "True"
    assert (int(count) > 100_000) == (not first)
