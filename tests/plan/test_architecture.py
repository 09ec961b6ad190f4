"""The architecture, read from the source: which package may import which, one importer of MPI.

A package is a folder of `dtrain`, or one of the modules beside them. `IMPORTS` is the table of
docs/architecture.md: what a package may import beside itself and `errors`.
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
FLAT = ("errors", "rng", "schema", "user_code", "partition", "mesh")
IMPORTS: dict[str, tuple[str, ...]] = {
    "errors": (),
    **dict.fromkeys(FLAT[1:], FLAT),
    "schedules": FLAT,
    "comm": (*FLAT, "schedules"),
    "models": FLAT,
    "data": FLAT,
    "block": (*FLAT, "schedules"),
    "objectives": (*FLAT, "schedules", "models", "block"),
    "syncs": (*FLAT, "comm", "block"),
    "engine": (*FLAT, "schedules", "comm", "models", "data", "block", "objectives", "syncs"),
    "config": (*FLAT, "schedules", "block", "objectives", "syncs"),
    "checkpoint": (*FLAT, "comm", "block", "syncs", "config"),
    "planning": (
        *(*FLAT, "schedules", "models", "data", "block", "objectives", "config"),
        "comm.wire_format",
    ),
    "monitoring": (*FLAT, "schedules", "comm", "checkpoint", "planning"),
}
"""What is not in it (`build`, `evaluate`, `train`, `cli`, ...) may import everything."""
NO_TORCH = ("errors", "schema", "user_code", "partition", "mesh", "schedules")
FUNCTION_LINES = 60
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


def package(path: Path) -> str:
    """Return the package, or the module beside the packages, of a file."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def dependencies(path: Path) -> Iterator[str]:
    """Yield the modules of `dtrain` that a file imports, without the first name."""
    packages = {package(source) for source in SOURCES}
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head == "dtrain" and rest.split(".")[0] in packages:
            yield rest


def calls(path: Path) -> Iterator[ast.Call]:
    """Yield all calls in a file."""
    return (node for node in nodes(path) if isinstance(node, ast.Call))


def above(path: Path) -> list[str]:
    """Return the imports of a file that the table does not allow."""
    allowed = IMPORTS.get(package(path))
    if allowed is None:
        return []
    legal = (package(path), "errors", *allowed)
    return [
        name
        for name in dependencies(path)
        if not any(name == other or name.startswith(f"{other}.") for other in legal)
    ]


def foreign(path: Path) -> list[str]:
    """Return the imports from beyond the standard library in a package without torch."""
    legal = sys.stdlib_module_names | {"dtrain"}
    names = imports(path) if package(path) in NO_TORCH else ()
    return [name for name in names if name.split(".")[0] not in legal]


def siblings(path: Path) -> list[str]:
    """Return the strategies that another strategy imports.

    Strategies are the modules that the package's `__init__` lists; `base` and `common` are shared.
    """
    kind = package(path)
    if kind not in ("objectives", "syncs") or path == PACKAGE / kind / "__init__.py":
        return []
    prefix = f"dtrain.{kind}."
    listed = (name.removeprefix(prefix) for name in imports(PACKAGE / kind / "__init__.py"))
    strategies = {name.split(".")[0] for name in listed} - {"base", "common"}
    own = path.relative_to(PACKAGE / kind).with_suffix("").parts[0]
    near = (name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix))
    return [name for name in near if name.split(".")[0] in strategies - {own}]


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
    """Return the functions that are too long to read."""
    functions = (
        node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return [f"{name}: {n} lines" for name, n in lengths.items() if n > FUNCTION_LINES]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Return the packages that lie on a circle of imports, or behind one."""
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    return sorted(edges)


@pytest.mark.parametrize("law", [above, foreign, siblings, unsafe, lengthy])
def test_the_house_rules(law: Callable[[Path], list[str]]) -> None:
    found = {str(path.relative_to(PACKAGE)): law(path) for path in SOURCES}
    assert {name: faults for name, faults in found.items() if faults} == {}


def test_packages_import_each_other_without_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for path in SOURCES:
        targets = {name.split(".")[0] for name in dependencies(path)} - {package(path)}
        edges.setdefault(package(path), set()).update(targets)
    assert circle(edges) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_mpi_has_one_door() -> None:
    doors = [p for p in SOURCES if any(name.split(".")[0] == "mpi4py" for name in imports(p))]
    assert set(doors) <= {PACKAGE / "comm" / "backends" / "mpi.py"}
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
    above: [("mesh", "import dtrain.comm"), ("block/x", "from dtrain.comm.y import Comm")],
    foreign: [("mesh", "import torch"), ("schedules/x", "def f():\n    import numpy as np")],
    siblings: [("syncs/x", "from dtrain.syncs.y import Y"), ("objectives/x", "from . import y")],
    unsafe: [
        ("data/x", "import pickle"),
        ("engine/x", "import torch\ntorch.load('x')"),
        ("data/x", "from torch import load"),
        ("data/x", "np.load('x', allow_pickle=True)"),
    ],
    banned: [
        ("comm/backends/mpi", "self.comm.send(1)"),
        ("comm/backends/mpi", "MPI.Request.Waitall(r)"),
    ],
    lengthy: [("cli", "def f():\n" + "    x = 1\n" * 60)],
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
