"""The house rules, read from the source: imports go downward, one door to MPI, nothing too long.

    floor 5   cli  train  config  layout  job  ...
    floor 4   engine  updates  judge  mail  checkpoint  ...
    floor 3   syncs
    floor 2   block  objectives  models  data  ...           no ranks, no messages
    floor 1   comm                                           mpi4py in comm/mpi.py only
    floor 0   errors  mesh  partition  schedules  segments  tables  telemetry      no torch

A part that has no line in `FLOORS` belongs to floor 5. Only what exists is checked.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dtrain"
FLOORS = {
    **dict.fromkeys(("errors", "mesh", "partition", "schedules", "segments", "tables"), 0),
    "telemetry": 0,
    "comm": 1,
    **dict.fromkeys(("block", "calm", "live", "split", "saved", "objectives", "models", "data"), 2),
    **dict.fromkeys(("device", "footprint", "optimizers", "prices", "rates", "seeds"), 2),
    **dict.fromkeys(("eight", "factors", "foretell", "parcel", "versions", "weights"), 2),
    **dict.fromkeys(("syncs", "early"), 3),
    **dict.fromkeys(("engine", "updates", "judge", "mail", "course", "tally", "checkpoint"), 4),
    **dict.fromkeys(("closed", "clocks", "replicas", "shard", "trace"), 4),
}
TOP = 5
FUNCTION_LINES, FILE_LINES = 60, 300
PICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
VERBS = {
    *("send", "ssend", "bsend", "recv", "isend", "issend", "ibsend", "irecv", "sendrecv"),
    *("bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce"),
    *("scan", "exscan", "wait", "waitall", "waitany", "waitsome"),
    *("Send", "Ssend", "Bsend", "Rsend", "Recv", "Sendrecv", "Sendrecv_replace", "Probe"),
    *("Bcast", "Barrier", "Gather", "Gatherv", "Scatter", "Scatterv", "Allgather", "Allgatherv"),
    *("Alltoall", "Alltoallv", "Alltoallw", "Reduce", "Allreduce", "Reduce_scatter"),
    *("Reduce_scatter_block", "Scan", "Exscan", "Mprobe"),
    *("Wait", "Waitall", "Waitany", "Waitsome"),
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of the syntax tree of a file."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


@cache
def imports(path: Path) -> list[str]:
    """Return the full names of all modules (or what is in them) that a file imports anywhere."""
    package, found = ("dtrain", *path.relative_to(PACKAGE).parts[:-1]), []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            near = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*near, *filter(None, [node.module])))
            found += [f"{stem}.{alias.name}" for alias in node.names]
    return found


def part(path: Path) -> str:
    """Return the part of the house that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def parts(path: Path) -> Iterator[str]:
    """Yield the parts of the house that a file imports; names in `dtrain` itself are no part."""
    known = {part(source) for source in SOURCES}
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head == "dtrain" and rest.split(".")[0] in known:
            yield rest.split(".")[0]


def calls(path: Path) -> Iterator[ast.Call]:
    """Yield all calls in a file."""
    return (node for node in nodes(path) if isinstance(node, ast.Call))


def above(path: Path) -> list[str]:
    """Return what a file imports from a floor above its own, and comm where it has no say."""
    floor = FLOORS.get(part(path), TOP)
    found = [name for name in parts(path) if FLOORS.get(name, TOP) > floor]
    return found + [name for name in parts(path) if floor == 2 and name in ("comm", "mesh")]


def foreign(path: Path) -> list[str]:
    """Return what a file of floor 0 imports from beyond the standard library."""
    legal = sys.stdlib_module_names | {"dtrain"}
    names = imports(path) if FLOORS.get(part(path), TOP) == 0 else ()
    return [name for name in names if name.split(".")[0] not in legal]


def siblings(path: Path) -> list[str]:
    """Return the siblings that an objective or a sync imports; a folder's `__init__` may.

    Strategies are what the folder's `__init__` lists, the abstract class apart; all other files
    there are for several of them.
    """
    if part(path) not in ("objectives", "syncs") or path.stem == "__init__":
        return []
    prefix = f"dtrain.{part(path)}."
    listed = (name.removeprefix(prefix) for name in imports(path.parent / "__init__.py"))
    strategies = {name.split(".")[0] for name in listed} - {part(path).removesuffix("s")}
    near = (name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix))
    return [name for name in near if name.split(".")[0] in strategies]


def unsafe(path: Path) -> list[str]:
    """Return what could run code from a file: pickles, `torch.load`, `allow_pickle`."""
    found = [name for name in imports(path) if name.split(".")[0] in PICKLING]
    found += [name for name in imports(path) if name == "torch.load"]
    for call in calls(path):
        if ast.unparse(call.func) in ("torch.load", "th.load"):
            found.append("torch.load")
        for keyword in call.keywords:
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                found.append("allow_pickle")
    return found


def banned(path: Path) -> list[str]:
    """Return the pickling and the blocking verbs that are called on anything but `self`."""
    attributes = (call.func for call in calls(path) if isinstance(call.func, ast.Attribute))
    return [
        f"{ast.unparse(func)} in line {func.lineno}"
        for func in attributes
        if func.attr in VERBS and ast.unparse(func.value) != "self"
    ]


def lengthy(path: Path) -> list[str]:
    """Return functions and files that are too long to read."""
    functions = (
        node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    found = [f"{name}: {n} lines" for name, n in lengths.items() if n > FUNCTION_LINES]
    lines = len(path.read_text(encoding="utf-8").splitlines())
    return found + ([f"{path.name}: {lines} lines"] if lines > FILE_LINES else [])


@pytest.mark.parametrize("law", [above, foreign, siblings, unsafe, lengthy])
def test_the_house_rules(law: Callable[[Path], list[str]]) -> None:
    found = {str(path.relative_to(PACKAGE)): law(path) for path in SOURCES}
    assert {name: faults for name, faults in found.items() if faults} == {}


def test_mpi_has_one_door() -> None:
    doors = [p for p in SOURCES if any(name.split(".")[0] == "mpi4py" for name in imports(p))]
    assert set(doors) <= {PACKAGE / "comm" / "mpi.py"}
    assert [verb for door in doors for verb in banned(door)] == []


def test_marks_of_mpi_tests_use_the_key_that_is_read() -> None:
    """pytest-mpi reads `min_size`; its documented `minsize` is ignored in silence."""
    marked = [path for path in TESTS if "mark.mpi" in path.read_text(encoding="utf-8")]
    assert len(marked) > 1  # this file is one
    for path in marked:
        for call in calls(path):
            if ast.unparse(call.func).endswith("mark.mpi"):
                keys = [keyword.arg for keyword in call.keywords]
                where = f"{path.name}, line {call.lineno}"
                assert (keys, call.args) == (["min_size"], []), where


WRONG = {
    above: [("mesh", "import dtrain.comm"), ("block", "from .comm import Comm")],
    foreign: [("mesh", "import torch"), ("schedules/x", "def f():\n    import numpy as np")],
    siblings: [("syncs/x", "from dtrain.syncs.y import Y"), ("objectives/x", "from . import y")],
    unsafe: [
        ("data/x", "import pickle"),
        ("engine", "import torch\ntorch.load('x')"),
        ("data/x", "from torch import load"),
        ("data/x", "np.load('x', allow_pickle=True)"),
    ],
    banned: [("comm/mpi", "self.comm.send(1)"), ("comm/mpi", "MPI.Request.Waitall(r)")],
    lengthy: [("cli", "\n" * 301), ("cli", "def f():\n" + "    x = 1\n" * 60)],
}


@pytest.mark.parametrize(
    ("law", "name", "code"), [(law, *case) for law, cases in WRONG.items() for case in cases]
)
def test_the_laws_find_what_is_wrong(
    law: Callable[[Path], list[str]],
    name: str,
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house = tmp_path / "dtrain"
    path = house / f"{name}.py"
    others = [house / "comm" / "__init__.py", path.with_name("y.py")]
    for source in (path, *others):
        source.parent.mkdir(parents=True, exist_ok=True)
        source.touch()
    path.write_text(code, encoding="utf-8")
    path.with_name("__init__.py").write_text("from .y import Y", encoding="utf-8")
    monkeypatch.setitem(globals(), "PACKAGE", house)
    monkeypatch.setitem(globals(), "SOURCES", [path, *others])
    assert law(path) != []
