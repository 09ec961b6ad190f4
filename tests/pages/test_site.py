"""The documentation site: links, commands, run files and snippets are legal, and pages run.

Invariant: the first steps run as a reader would type them, in order, in one folder; ranks are left
out of commands, since their number does not change the training.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import dtrain
from dtrain.config.overrides import override_key
from dtrain.config.parse import SECTIONS, parse_run
from dtrain.config.sweep import SWEEP, sweep_runs
from dtrain.planning.cost_file import read_cost_file
from dtrain.planning.plan import make_plan
from tests.small_graph import write_graph
from tests.system.programs import run_in_process

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("sites/*.md")])
LINKED = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.M | re.S)


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    return [code for _, language, code in FENCE.findall(text) if language in languages]


def prose(page: Path) -> str:
    """Return the text of a page without code."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the titles of a page, as code hosts make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = {
        line
        for page in PAGES
        for block in re.findall(r"```\{toctree\}(.*?)```", page.read_text(), re.S)
        for line in block.split("\n")
        if line and not line.startswith(":")
    }
    assert listed == {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"index"}


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """In full: `make docs`."""
    pytest.importorskip("furo", reason="the extra docs is not installed")
    pytest.importorskip("myst_parser", reason="the extra docs is not installed")
    from sphinx.cmd.build import build_main  # type: ignore[import-not-found]

    options = ["-q", "-W", "--keep-going", "-d", str(tmp_path / "doctrees")]
    assert build_main([*options, str(DOCS), str(tmp_path / "site")]) == 0
    assert (tmp_path / "site" / "start.html").is_file()


def test_the_citation_has_the_version_of_the_package() -> None:
    version = re.compile(r"^version\s*[:=]\s*(.*)$", re.M)
    citation, setup = ((ROOT / name).read_text() for name in ("CITATION.cff", "setup.cfg"))
    assert version.findall(citation) == version.findall(setup) != []


# ---- pages and pictures that programs write


def script(name: str) -> ModuleType:
    """Return a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "function"),
    [("generate_reference", "pages"), ("generate_sites", "pages"), ("pictures", "pictures")],
)
def test_a_written_file_is_that_of_the_code(
    name: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise: `python docs/generate_reference.py`, `python docs/pictures.py`."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    files: Mapping[Path, str] = getattr(script(name), function)()
    assert files
    for path, text in files.items():
        assert path.read_text(encoding="utf-8") == text, path.name


def test_the_reference_has_every_table_and_a_meaning_of_every_key() -> None:
    text = (DOCS / "reference-run-file.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^## `\[(\w+)\]`$", text, re.M)) == sorted([*SECTIONS, SWEEP])
    rows = re.findall(r"^\| `[\w-]+` \|.*$", text, re.M)
    assert len(rows) > 100
    assert [row for row in rows if re.search(r"\|\s*\|$", row)] == []


# ---- commands, run files and Python


def commands(page: Path) -> Iterator[str]:
    """Yield the dtrain commands of a page; of those inside sentences their help, since such a
    command may lack its arguments."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    names = re.findall(r"`(dtrain [a-z][^`]*)`", text)
    yield from (re.sub(r"\bN\b", "2", name) + " --help" for name in names)
    for code in blocks(page, "", "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ |(?:srun|mpirun) .*?)?(?:\.venv/bin/)?(dtrain [a-z].*)", line)
            if found:
                yield found[1]


def words(command: str) -> list[str]:
    """Return the arguments of a command that runs on one rank."""
    argv = shlex.split(command, comments=True)[1:]
    if "--ranks" in argv and argv[0] != "plan":
        at = argv.index("--ranks")
        del argv[at : at + 2]
    return argv


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_command_has_legal_arguments(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In an empty folder a legal command is refused for its files, not for its arguments."""
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        run_in_process(*words(command))
        assert "usage:" not in capsys.readouterr().err, command


def write_files(page: Path, folder: Path) -> list[str]:
    """Write the Python examples that begin with their file's name; return the modules' names."""
    names = []
    for code in blocks(page, "python"):
        if found := re.match(r"# (\w+)\.py\b", code):
            (folder / f"{found[1]}.py").write_text(code, encoding="utf-8")
            names.append(found[1])
    return names


EXAMPLE_MODULES = {
    name
    for page in PAGES
    for code in blocks(page, "python")
    for name in re.findall(r"\A# (\w+)\.py\b", code)
}
"""Modules that pages write."""


@pytest.fixture
def user_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget modules with the names of a page's examples before, and those examples afterwards."""
    for name in EXAMPLE_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = {*sys.modules}
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in {*sys.modules} - before:
        if "." not in name:
            del sys.modules[name]


OWN_STRATEGIES = [page for page in PAGES if page.name.startswith("adding-")]
"""Pages whose strategies have to be installed first; tests/ranks runs their examples."""

ONLY_PARSED = ("partitioning.md", "start.md", "tasks.md")
"""Pages whose run files need a model or targets that they describe: other tests use these."""

BASE: dict[str, Any] = {
    "epochs": 1,
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [8, 8, 8, 8]},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
}


def write_data(folder: Path) -> None:
    """Write the data files that the pages name."""
    x, y = np.zeros((4, 3, 8, 8), "uint8"), np.arange(4)
    for name in ("cifar10.h5", "cifar10-test.h5"):
        with h5py.File(folder / name, "w") as file:
            file["x"], file["y"], file["w"] = x, y, np.ones(4)
    with h5py.File(folder / "all.h5", "w") as file:
        for split in ("train", "test"):
            file[f"{split}/images"], file[f"{split}/labels"] = x, y
    write_graph(folder / "cora.h5")
    rows = [f"{i}.5,{i},species {i % 3}" for i in range(30)]
    (folder / "iris.csv").write_text("\n".join(["length,width,species", *rows]))
    (folder / "shakespeare.txt").write_text("To be, or not to be, that is the question. " * 40)
    hours = [f"day {i // 24},{i % 24}.5,{i % 7}.5" for i in range(400)]
    (folder / "load.csv").write_text("\n".join(["date,load,temperature", *hours]))


@pytest.mark.usefixtures("user_modules")
@pytest.mark.parametrize(
    "page",
    [page for page in (ROOT / "README.md", *PAGES) if page not in OWN_STRATEGIES],
    ids=lambda page: page.name,
)
def test_every_run_file_is_legal(page: Path, tmp_path: Path) -> None:
    """A part of a run file is completed by `BASE`; the plan is made, too, on one replica."""
    write_files(page, tmp_path)
    write_data(tmp_path)
    for number, code in enumerate(blocks(page, "toml")):
        table = tomllib.loads(code)
        path = tmp_path / f"{number}.toml"
        if "links" in table:
            path.write_text(code, encoding="utf-8")
            assert read_cost_file(path)
            continue
        base = {key: value for key, value in BASE.items() if key not in table}
        if "updates" in table:
            del base["epochs"]
        for section in {*table} & {*BASE} & {*SECTIONS}:
            if "name" not in table[section]:
                table[section] = BASE[section] | table[section]
        settings = sweep_runs(table.pop(SWEEP, {}), ())
        for override in settings[0].settings if settings else ():
            override_key(table, override)
        run = parse_run(base | table, path)
        if page.name not in ONLY_PARSED and run.weights_path is None:
            stages = run.mesh.stages or run.partition.chosen_blocks or 1
            assert make_plan(run, stages * len(run.mesh.shares or (1,)))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_python_example_compiles(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")


# ---- the first steps, as a reader types them


def run_line(line: str) -> None:
    """Run one line of a shell block; a comment may say which exit code it has."""
    command, _, comment = line.partition(" # ")
    expected = re.fullmatch(r"exit code (\d+)", comment.strip())
    argv = shlex.split(command)
    if argv[0] == "python":
        runpy.run_path(argv[1], run_name="__main__")
    elif argv[:2] == ["dtrain", "run"]:
        assert run_in_process("run", argv[2]) == 0, line
    elif argv[0] == "dtrain":
        given = ("--set", "mesh.stages=1") if argv[1] == "train" else ()
        assert run_in_process(*words(command), *given) == int(expected[1] if expected else 0), line
    elif argv[0] == "make":
        assert re.search(rf"^{argv[1]}:", (ROOT / "Makefile").read_text(), re.M), line
    else:
        assert argv[0] in ("git", "cd", "."), line


def run_shell_blocks(page: Path) -> None:
    """Run the shell blocks of a page."""
    for code in blocks(page, "sh"):
        for line in code.splitlines():
            run_line(line)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_modules: None) -> Path:
    """A folder with the files of docs/start.md, in which one works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    page = DOCS / "start.md"
    write_files(page, tmp_path)
    [run_file] = blocks(page, "toml")
    (tmp_path / "run.toml").write_text(run_file, encoding="utf-8")
    return tmp_path


def test_the_first_steps_and_the_commands_after_training_run(project: Path) -> None:
    """docs/start.md, then docs/prediction.md with the run that it has trained."""
    run_shell_blocks(DOCS / "start.md")
    with h5py.File("outputs.h5") as file:
        assert file["output"].shape == (120, 3)
        assert len(set(file["prediction"][:])) == 3
    assert (project / "report.html").stat().st_size > 10_000
    x_new = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.save("new.npy", x_new)
    with h5py.File("new.h5", "w") as file:
        file["x"] = x_new
    run_shell_blocks(DOCS / "prediction.md")
    from mynet import net  # type: ignore[import-not-found]

    names: dict[str, Any] = {"x_new": x_new, "make_net": lambda: net(64)}
    predict, own = blocks(DOCS / "prediction.md", "python")
    exec(predict, names)
    predicted = names["outputs"]
    exec(own, names)
    np.testing.assert_allclose(names["outputs"].detach().numpy(), predicted, atol=1e-5)


@pytest.mark.usefixtures("user_modules")
def test_the_examples_of_the_python_api_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/python.md, in order, as one script."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "page.py"
    path.write_text("\n\n".join(blocks(DOCS / "python.md", "python")), encoding="utf-8")
    end = runpy.run_path(str(path), run_name="__main__")
    assert end["from_file"].config.settings.epochs == 3
    assert end["metrics"]["accuracy"] == end["result"].test_accuracy
    assert "objective.unknown" in capsys.readouterr().out
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == {
        "mine",
        "callbacks",
        "loop",
    }
    assert (tmp_path / "runs" / "callbacks" / "checkpoints" / "best").is_dir()


def page_modules(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the modules that a page shows be imported, from a folder in which the test works."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    write_files(page, folder)


@pytest.mark.parametrize(
    ("page", "model", "cuts"),
    [
        (ROOT / "README.md", {"name": "nets:net", "width": 8}, [2]),
        (DOCS / "models.md", {"name": "skipnet:SkipNet"}, ["mid", "out"]),
    ],
    ids=["README", "models"],
)
@pytest.mark.usefixtures("user_modules")
def test_the_models_of_pages_train(
    page: Path,
    model: dict[str, Any],
    cuts: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page_modules(page, tmp_path, monkeypatch)
    run = small_run(model=model, partition={"cuts": cuts})
    assert dtrain.train(run, "out").summary["blocks"] == len(cuts) + 1


def small_run(**changes: Any) -> dtrain.Run:
    """Return a run of three updates on digits, whose modules are in the working directory."""
    sections: dict[str, Any] = {
        "data": "digits",
        "model": {"name": "mlp", "widths": [8, 8]},
        "objective": "backprop",
        "optimizer": {"name": "adam", "lr": 1e-3},
        "updates": 3,
        "batch_size": 16,
        "threads": 1,
        "path": Path.cwd() / "run.toml",
    }
    return dtrain.Run(**sections | changes)


@pytest.mark.usefixtures("user_modules")
def test_the_loss_of_the_page_on_tasks_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_modules(DOCS / "tasks.md", tmp_path, monkeypatch)
    x = np.random.default_rng(0).normal(size=(48, 3)).astype("float32")
    run = small_run(
        data=(x, x[:, :1], x, x[:, :1]),
        model=lambda: torch.nn.Sequential(torch.nn.Linear(3, 1)),
        task={"loss": "mytask:log_cosh"},
    )
    assert dtrain.train(run, "out").history[-1]["train_loss"] > 0


def test_the_list_of_layers_on_the_page_on_partitioning_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = blocks(DOCS / "partitioning.md", "python")[0]
    exec(code, {"Net": lambda: torch.nn.Sequential(torch.nn.Linear(3, 2)), "x": torch.ones(4, 3)})
    assert "0" in capsys.readouterr().out


@pytest.mark.usefixtures("user_modules")
def test_exported_weights_load_as_the_page_on_training_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain, behind a layer that normalises, and as two factors."""
    monkeypatch.chdir(tmp_path)
    load, load_normalised, multiply = blocks(DOCS / "training.md", "python")[-3:]
    load_normalised = load_normalised.replace("Normalise(3, 1, 1)", "Normalise(1, 1, 1)")

    def make() -> torch.nn.Sequential:
        layers = {"flat": torch.nn.Flatten(), "fc2": torch.nn.Linear(64, 48)}
        return torch.nn.Sequential(OrderedDict(**layers, head=torch.nn.Linear(48, 10)))

    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "OrderedDict": OrderedDict}
    result = dtrain.train(small_run(model=make), "out")
    dtrain.export("out", "net.pt")
    exec(load, names | {"net": make()})
    dtrain.export("out", "net.pt", with_normalisation=True)
    exec(load_normalised, names | {"net": make()})
    assert result.state_dict() is not None
    low_rank = {"fc2.weight.left": torch.ones(48, 2), "fc2.weight.right": torch.ones(2, 64)}
    torch.save(low_rank, "net.pt")
    end = names | {"net": make()}
    exec(multiply, end)
    assert end["weight"].shape == (48, 64)
