"""The recipes of conda, Spack, EasyBuild and Apptainer against setup.cfg: packages and versions."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

RECIPES = ROOT / "recipes"
EXTRAS = ("demo", "export", "images", "plots", "report", "terminal")
"""The extras that recipes install; MPI comes from the recipe's own packages."""

Versions = dict[str, tuple[int, ...]]

CONDA = {"torch": "pytorch", "xxhash": "python-xxhash"}
EASYBUILD = {
    **{"torch": "pytorch", "numpy": "scipy-bundle", "jinja2": "python-bundle-pypi"},
    "rich": "python-bundle-pypi",
    "xxhash": "python-xxhash",
}
"""Names of packages that a tool calls otherwise."""


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, empty where there is none."""
    return tuple(map(int, re.findall(r"\d+", text)))


@pytest.fixture(scope="module")
def needs() -> Versions:
    """The lower bounds of the packages that dtrain needs, Python included."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    lines = [config["options"]["install_requires"], *(extras[name] for name in EXTRAS)]
    lines.append(f"python{config['options']['python_requires']}")
    found = [re.match(r"([\w-]+)(?:>=([\d.]+))?$", each) for each in "\n".join(lines).split()]
    return {match[1].lower(): version(match[2] or "") for match in found if match}


def conda() -> Versions:
    """Return the lower bounds of the conda environment."""
    text = (RECIPES / "conda" / "environment.yml").read_text(encoding="utf-8")
    return {n: version(v) for n, v in re.findall(r"^  - ([\w-]+)(?:>=([\d.]+))?$", text, re.M)}


def spack() -> Versions:
    """Return the lower bounds of the Spack package."""
    [path] = RECIPES.glob("spack/spack_repo/dtrain/packages/*/package.py")
    specs = [
        ast.literal_eval(node.args[0])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "depends_on"
    ]
    pairs = (spec.partition("@") for spec in specs)
    return {name.removeprefix("py-"): version(bound) for name, _, bound in pairs}


def easybuild() -> Versions:
    """Return the versions of the dependencies of the easyconfig, which has that of setup.cfg."""
    [path] = RECIPES.glob("easybuild/*.eb")
    values = {
        node.targets[0].id: node.value
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    constants = {
        key: ast.literal_eval(values[key])
        for key in ("name", "version", "toolchain", "dependencies")
    }
    chain = "-".join(constants["toolchain"][key] for key in ("name", "version"))
    assert path.stem == f"{constants['name']}-{constants['version']}-{chain}"
    assert f"version = {constants['version']}\n" in (ROOT / "setup.cfg").read_text()
    return {name.lower(): version(number) for name, number, *_ in constants["dependencies"]}


@pytest.mark.parametrize(("read", "names"), [(conda, CONDA), (spack, {}), (easybuild, EASYBUILD)])
def test_a_recipe_has_every_package_in_a_version_that_fits(
    read: Callable[[], Versions], names: dict[str, str], needs: Versions
) -> None:
    recipe = read()
    assert len(needs) > 8
    for name, bound in needs.items():
        assert recipe[names.get(name, name)] >= bound, name


def test_the_image_copies_what_its_commands_install() -> None:
    text = (RECIPES / "apptainer" / "dtrain.def").read_text(encoding="utf-8")
    head, *parts = re.split(r"^%(\w+)\n", text, flags=re.M)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert {"Bootstrap: docker", "From: python:3.12-slim-bookworm"} <= {*head.splitlines()}
    [extras] = re.findall(r"'\.\[([\w,]+)\]'", sections["post"])
    assert {*extras.split(",")} == {"mpi", *EXTRAS}
    for line in sections["files"].split("\n"):
        if line.strip():
            source, target = line.split()
            assert (ROOT / source).exists()
            assert target == f"/opt/src/{source}"
    for name in ("post", "environment", "runscript", "test"):
        code = sections[name].replace("{{ pip_args }}", "")
        subprocess.run(["sh", "-n"], input=code, text=True, check=True)


def test_the_recipes_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w./*]+)` \|", page, re.M)
    assert len(listed) == 4
    assert all([*RECIPES.glob(pattern)] for pattern in listed)
    assert {Path(pattern).parts[0] for pattern in listed} == {p.name for p in RECIPES.iterdir()}
