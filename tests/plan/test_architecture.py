"""Rules of the architecture, checked in the source: allowed imports, one importer of MPI, ...

A package is a folder of `dtrain` or a module beside the folders. `IMPORTS` is the table of
docs/architecture.md: the packages that a package may import besides itself and `errors`.
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
FLAT = (
    *("errors", "rng", "schema", "object_names"),
    *("fingerprint", "user_code", "partition", "mesh", "paths", "eager_torch", "node_graph"),
)
IMPORTS: dict[str, tuple[str, ...]] = {
    "errors": (),
    **dict.fromkeys(FLAT[1:], FLAT),
    "schedules": FLAT,
    "comm": (*FLAT, "schedules"),
    "tasks": FLAT,
    "models": FLAT,
    "data": (*FLAT, "tasks", "comm"),
    "block": (*FLAT, "schedules", "tasks"),
    "objectives": (*FLAT, "schedules", "tasks", "models", "block"),
    "syncs": (*FLAT, "comm", "block"),
    "engine": (
        *(*FLAT, "schedules", "comm", "tasks", "models", "data", "block"),
        *("objectives", "syncs"),
    ),
    "tracking": FLAT,
    "config": (*FLAT, "schedules", "tasks", "block", "objectives", "syncs", "tracking"),
    "checkpoint": (*FLAT, "comm", "block", "syncs", "config"),
    "planning": (
        *(*FLAT, "schedules", "tasks", "models", "data", "block", "objectives", "config"),
        *("comm.wire_format", "checkpoint.manifest"),
    ),
    "monitoring": (*FLAT, "schedules", "comm", "tasks", "tracking", "checkpoint", "planning"),
    "testing": (
        *(*FLAT, "schedules", "comm", "data", "block", "objectives", "syncs", "config"),
        *("checkpoint", "planning", "build", "evaluation"),
    ),
    "watchdog": (*FLAT, "comm", "monitoring"),
    "run_report": (*FLAT, "checkpoint", "planning.formatting", "rank_process"),
    "doctor": (*FLAT, "comm"),
    "slurm": (*FLAT, "checkpoint", "config", "planning"),
}
"""Packages that are not listed (`build`, `evaluate`, `train`, `cli`, ...) may import everything."""
NO_TORCH = (
    "errors",
    "schema",
    "object_names",
    "fingerprint",
    "user_code",
    "partition",
    "mesh",
    "schedules",
)
SHARED = {"base", "common", "block_spec", "gradient_reducer"}
"""Modules of objectives and syncs that are no strategies."""
FUNCTION_LINES = 60
PICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BLOCKING_VERBS = {
    *("send", "ssend", "bsend", "recv", "isend", "issend", "ibsend", "irecv", "sendrecv"),
    *("bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce"),
    *("scan", "exscan", "wait", "waitall", "waitany", "waitsome"),
    *("Send", "Ssend", "Bsend", "Rsend", "Recv", "Sendrecv", "Sendrecv_replace", "Probe"),
    *("Bcast", "Barrier", "Gather", "Gatherv", "Scatter", "Scatterv", "Allgather", "Allgatherv"),
    *("Alltoall", "Alltoallv", "Alltoallw", "Reduce", "Allreduce", "Reduce_scatter"),
    *("Reduce_scatter_block", "Scan", "Exscan", "Mprobe"),
    *("Wait", "Waitall", "Waitany", "Waitsome"),
}
"""Methods of mpi4py that pickle (lower case) or block."""

SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of the syntax tree of a file."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


@cache
def imports(path: Path) -> list[str]:
    """Return the full names of all modules and their members that a file imports anywhere."""
    folders, names = ("dtrain", *path.relative_to(PACKAGE).parts[:-1]), []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = folders[: len(folders) - node.level + 1] if node.level else ()
            module = ".".join((*parents, *filter(None, [node.module])))
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def package(path: Path) -> str:
    """Return the name of a file's package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@cache
def packages(*sources: Path) -> set[str]:
    """Return the packages of these files."""
    return {package(source) for source in sources}


def dependencies(path: Path) -> Iterator[str]:
    """Yield the modules of `dtrain` that a file imports, without the leading "dtrain."."""
    names = packages(*SOURCES)
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head == "dtrain" and rest.split(".")[0] in names:
            yield rest


def calls(path: Path) -> Iterator[ast.Call]:
    """Yield all calls in a file."""
    return (node for node in nodes(path) if isinstance(node, ast.Call))


def forbidden_imports(path: Path) -> list[str]:
    """Return the imports of a file that `IMPORTS` does not allow."""
    allowed = IMPORTS.get(package(path))
    if allowed is None:
        return []
    legal = (package(path), "errors", *allowed)
    return [
        name
        for name in dependencies(path)
        if not any(name == other or name.startswith(f"{other}.") for other in legal)
    ]


def third_party_imports(path: Path) -> list[str]:
    """Return the imports from outside the standard library in a package without torch."""
    legal = sys.stdlib_module_names | {"dtrain"}
    names = imports(path) if package(path) in NO_TORCH else ()
    return [name for name in names if name.split(".")[0] not in legal]


def imported_strategies(path: Path) -> list[str]:
    """Return the other strategies that a strategy imports.

    Strategies are the modules that the package's `__init__` imports, but for those of `SHARED`.
    """
    kind = package(path)
    if kind not in ("objectives", "syncs") or path == PACKAGE / kind / "__init__.py":
        return []
    prefix = f"dtrain.{kind}."
    listed = (name.removeprefix(prefix) for name in imports(PACKAGE / kind / "__init__.py"))
    strategies = {name.split(".")[0] for name in listed} - SHARED
    others = strategies - {path.relative_to(PACKAGE / kind).with_suffix("").parts[0]}
    imported = (name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix))
    return [name for name in imported if name.split(".")[0] in others]


WORKERS = tuple(
    f"data/reading/{name}.py" for name in ("worker_pool", "worker_process", "shared_pickle")
)
"""They send objects to child processes of the rank, over a pair of sockets that nobody else has."""

RESTRICTED = ("data/importing/planetoid_files.py",)
"""Their unpickler finds a few harmless names alone; `tests/rule/test_planetoid.py` tries others."""


def unsafe_loading(path: Path) -> list[str]:
    """Return the calls that could run code from a data file: pickle and the like."""
    names = [name for name in imports(path) if name.split(".")[0] in PICKLING]
    if str(path.relative_to(PACKAGE)) in (*WORKERS, *RESTRICTED):
        names = []
    names += [name for name in imports(path) if name == "torch.load"]
    for call in calls(path):
        safe = any(
            keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
            for keyword in call.keywords
        )
        if ast.unparse(call.func) in ("torch.load", "th.load") and not safe:
            names.append("torch.load")
        for keyword in call.keywords:
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                names.append("allow_pickle")
    return names


def blocking_calls(path: Path) -> list[str]:
    """Return the pickling and blocking MPI calls of a file; methods of `self` are exempt."""
    attributes = (call.func for call in calls(path) if isinstance(call.func, ast.Attribute))
    return [
        f"{ast.unparse(func)} in line {func.lineno}"
        for func in attributes
        if func.attr in BLOCKING_VERBS and ast.unparse(func.value) != "self"
    ]


def long_functions(path: Path) -> list[str]:
    """Return the functions of more than `FUNCTION_LINES` lines."""
    functions = (
        node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return [f"{name}: {n} lines" for name, n in lengths.items() if n > FUNCTION_LINES]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Return the packages on a circle of imports and those that import them."""
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    return sorted(edges)


@pytest.mark.parametrize(
    "rule",
    [forbidden_imports, third_party_imports, imported_strategies, unsafe_loading, long_functions],
)
def test_every_module_keeps_the_rules(rule: Callable[[Path], list[str]]) -> None:
    violations = {str(path.relative_to(PACKAGE)): rule(path) for path in SOURCES}
    assert {name: faults for name, faults in violations.items() if faults} == {}


def test_packages_import_each_other_without_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for path in SOURCES:
        targets = {name.split(".")[0] for name in dependencies(path)} - {package(path)}
        edges.setdefault(package(path), set()).update(targets)
    assert circle(edges) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_one_module_imports_mpi() -> None:
    users = [p for p in SOURCES if any(name.split(".")[0] == "mpi4py" for name in imports(p))]
    assert users == [PACKAGE / "comm" / "backends" / "mpi.py"]
    assert [call for path in users for call in blocking_calls(path)] == []


def test_mpi_marks_use_the_keyword_that_pytest_mpi_reads() -> None:
    """pytest-mpi reads `min_size`; it ignores the `minsize` of its documentation silently."""
    marked = [path for path in TESTS if "mark.mpi" in path.read_text(encoding="utf-8")]
    assert len(marked) > 1  # this file is one
    for path in marked:
        for call in calls(path):
            if ast.unparse(call.func).endswith("mark.mpi"):
                keywords = [keyword.arg for keyword in call.keywords]
                location = f"{path.name}, line {call.lineno}"
                assert (keywords, call.args) == (["min_size"], []), location


VIOLATIONS = {
    forbidden_imports: [
        ("mesh", "import dtrain.comm"),
        ("block/x", "from dtrain.comm.y import Comm"),
    ],
    third_party_imports: [
        ("mesh", "import torch"),
        ("schedules/x", "def f():\n    import numpy as np"),
    ],
    imported_strategies: [
        ("syncs/x", "from dtrain.syncs.y import Y"),
        ("objectives/x", "from . import y"),
    ],
    unsafe_loading: [
        ("data/x", "import pickle"),
        ("engine/x", "import torch\ntorch.load('x')"),
        ("engine/x", "import torch\ntorch.load('x', weights_only=False)"),
        ("data/x", "from torch import load"),
        ("data/x", "np.load('x', allow_pickle=True)"),
    ],
    blocking_calls: [
        ("comm/backends/mpi", "self.comm.send(1)"),
        ("comm/backends/mpi", "MPI.Request.Waitall(r)"),
    ],
    long_functions: [("cli", "def f():\n" + "    x = 1\n" * 60)],
}


@pytest.mark.parametrize(
    ("rule", "name", "code"),
    [(rule, *case) for rule, cases in VIOLATIONS.items() for case in cases],
)
def test_the_rules_find_violations(
    rule: Callable[[Path], list[str]],
    name: str,
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "dtrain"
    path = root / f"{name}.py"
    others = [root / "comm" / "__init__.py", path.with_name("y.py")]
    for source in (path, *others):
        source.parent.mkdir(parents=True, exist_ok=True)
        source.touch()
    path.write_text(code, encoding="utf-8")
    path.with_name("__init__.py").write_text("from .y import Y", encoding="utf-8")
    monkeypatch.setitem(globals(), "PACKAGE", root)
    monkeypatch.setitem(globals(), "SOURCES", [path, *others])
    assert rule(path) != []
