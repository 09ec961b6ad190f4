"""The set-up: `make install` against stand-ins for Python and pip, and the installed package."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.process import Ended, start

# Answers the questions of the Makefile: version, ensurepip; creates a .venv.
PYTHON = """#!/bin/sh
case "$*" in
    *--pip) exit {bare} ;;
    *"-m venv"*) mkdir -p .venv/bin; cp bin/inner .venv/bin/python; echo "$0" >> venv.log ;;
    -c*) echo {version}; exit {old} ;;
esac
"""
# The Python inside .venv: its pip logs its arguments and prints the report of the test.
INNER = f"""#!/bin/sh
case "$*" in
    *--report*) cat report.json ;;
    *"-m pip"*) echo "$PIP_CONSTRAINT $*" >> pip.log ;;
    -c*) exec {sys.executable} "$@" ;;
esac
"""
SHIM = "#!/bin/sh\necho 'shim: no such version' >&2\nexit 127\n"


@dataclass(frozen=True)
class Setup:
    """A folder with the Makefile, and a PATH on which only chosen programs are."""

    folder: Path

    def program(self, name: str, text: str) -> Path:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, name: str, version: str, old: bool = False, bare: bool = False) -> Path:
        text = PYTHON.format(version=version, old=int(old), bare=int(bare))
        return self.program(name, text)

    def make(self, *words: str, **env: str) -> Ended:
        env = {"PATH": f"{self.folder}/bin"} | env
        return start([shutil.which("make") or "make", *words], env=env, cwd=self.folder)

    def log(self, name: str) -> list[str]:
        path = self.folder / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    (tmp_path / "bin").mkdir()
    for name in ("sh", "mkdir", "cp", "touch", "cat", "ls", "uname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    for name in ("Makefile", "setup.cfg", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    setup = Setup(tmp_path)
    setup.program("inner", INNER)
    return setup


def test_the_newest_working_python_is_chosen(setup: Setup) -> None:
    setup.program("python3.14", SHIM)
    setup.python("python3.12", "3.12")
    setup.python("python3.11", "3.11")
    ended = setup.make("install")
    assert ended.code == 0, ended.err
    assert setup.log("venv") == [f"{setup.folder}/bin/python3.12"]
    (command,) = setup.log("pip")
    assert command.startswith("constraints.txt -m pip install")
    assert "-e .[mpi,demo,export,images,plots,report,terminal,test]" in command


def test_a_shim_does_not_hide_the_same_name_later_on_path(setup: Setup) -> None:
    python = setup.python("python3.11", "3.11")
    shims = setup.folder / "shims"
    shims.mkdir()
    shutil.move(setup.program("shim", SHIM), shims / "python3.11")
    assert setup.make("install", PATH=f"{shims}:{setup.folder}/bin").code == 0
    assert setup.log("venv") == [str(python)]


def test_nothing_is_done_twice_until_the_dependencies_change(setup: Setup) -> None:
    setup.python("python3.11", "3.11")
    setup.make("install")
    setup.make("install")
    assert (len(setup.log("venv")), len(setup.log("pip"))) == (1, 1)
    for changed in ("setup.cfg", "constraints.txt"):
        later = (setup.folder / ".venv" / "ready").stat().st_mtime + 1
        os.utime(setup.folder / changed, (later, later))
        setup.make("install")
        os.utime(setup.folder / ".venv" / "ready", (later + 1, later + 1))
    assert (len(setup.log("venv")), len(setup.log("pip"))) == (1, 3)


def test_the_choice_of_mpi_persists_and_another_starts_anew(setup: Setup) -> None:
    setup.python("python3.11", "3.11")
    setup.make("install", "MPI=site", "PIP_ARGS=--no-index --find-links wheels")
    setup.make("install")
    (command,) = setup.log("pip")
    assert "-e .[demo,export,images,plots,report,terminal,test]" in command
    assert "--no-index --find-links wheels" in command
    setup.make("install", "MPI=wheel")
    assert len(setup.log("venv")) == 2
    assert "-e .[mpi," in setup.log("pip")[-1]


def test_a_failed_set_up_is_tried_again(setup: Setup) -> None:
    setup.python("python3.11", "3.11")
    setup.program("inner", INNER.replace("pip.log", "pip.log; exit 1"))
    assert setup.make("install").code != 0
    assert setup.make("install").code != 0
    assert len(setup.log("pip")) == 2


@pytest.mark.parametrize(
    ("pythons", "words", "cause"),
    [
        ([], [], "needs Python 3.11 or newer, found: none"),
        ([("python3", "3.9", True, False)], [], "bin/python3 (3.9)"),
        ([("python3.11", "3.11", False, True)], [], "python3.11-venv"),
        ([("python3.11", "3.11", False, False)], ["PYTHON=python9"], "found: none"),
        ([("python3.11", "3.11", False, False)], ["MPI=mine"], "MPI=wheel"),
    ],
)
def test_a_missing_piece_is_one_line(
    setup: Setup, pythons: list[tuple[str, str, bool, bool]], words: list[str], cause: str
) -> None:
    for name, version, old, bare in pythons:
        setup.python(name, version, old, bare)
    ended = setup.make("install", *words)
    lines = [line for line in ended.err.splitlines() if "Error 1" not in line]
    assert ended.code == 2
    assert len(lines) == 1
    assert cause in lines[0]
    assert not (setup.folder / ".venv").exists()


@pytest.mark.parametrize(
    ("words", "env", "is_noted"),
    [
        ([], {}, False),
        ([], {"EBROOTOPENMPI": "/sw/openmpi"}, True),
        (["MPI=wheel"], {"EBROOTOPENMPI": "/sw/openmpi"}, False),
        (["MPI=site"], {"I_MPI_ROOT": "/sw/impi"}, False),
    ],
)
def test_a_visible_site_mpi_is_noted_unless_one_was_chosen(
    setup: Setup, words: list[str], env: dict[str, str], is_noted: bool
) -> None:
    setup.python("python3.11", "3.11")
    for _ in range(2):  # the second time nothing is left to install
        assert ("make install MPI=site" in setup.make("install", *words, **env).out) == is_noted


def test_mpicc_on_path_is_a_site_mpi(setup: Setup) -> None:
    setup.python("python3.11", "3.11")
    mpicc = shutil.move(setup.program("mpicc", SHIM), setup.folder.parent / "mpicc")
    try:
        ended = setup.make("install", PATH=f"{setup.folder}/bin:{setup.folder.parent}")
        assert f"({mpicc})" in ended.out
    finally:
        os.unlink(mpicc)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CUDA wheels")
@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="a driver is here")
@pytest.mark.parametrize(
    ("need", "is_noted"), [("nvidia-nccl-cu13==2.1", True), ("filelock", False)]
)
def test_cuda_wheels_are_noted_before_they_are_fetched(
    setup: Setup, need: str, is_noted: bool
) -> None:
    setup.python("python3.11", "3.11")
    report = {"install": [{"metadata": {"requires_dist": ["numpy", need]}}]}
    (setup.folder / "report.json").write_text(json.dumps(report))
    out = setup.make("install").out
    assert ("no NVIDIA driver" in out.split("installing dtrain")[0]) == is_noted
    assert "installing dtrain" in out


def test_every_package_is_listed() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    packages = set(metadata["options"]["packages"].split())
    files = (ROOT / "dtrain").rglob("*.py")
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in files}
    assert packages == folders | {"dtrain.jobs"}


def test_every_pin_is_exact_and_public() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(pin.count("==") == 1 and not set(pin) & set("+/@ ") for pin in pins)
    assert "torch==2.13.0" in pins


def test_the_installed_package_has_its_jobs(tmp_path: Path) -> None:
    # Search only the folder of packages, since a build leaves its metadata beside the source too.
    if not list(distributions(name="dtrain", path=[sysconfig.get_path("purelib")])):
        pytest.skip("dtrain is not installed in this environment: make install")
    listing = (
        "from importlib.resources import files;"
        "print(*(file.name for file in files('dtrain.jobs').iterdir()))"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = start([sys.executable, "-c", listing], env=env, cwd=tmp_path)
    assert {"demo.toml", "cifar10.toml", "slurm.sh"} <= set(ended.out.split()), ended.err


def test_a_wheel_has_all_packages_and_the_jobs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("dtrain", "jobs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    ended = start([*build, "-w", tmp_path, source], limit_s=120)
    assert ended.code == 0, ended.err
    names = set(zipfile.ZipFile(next(tmp_path.glob("dtrain-*.whl"))).namelist())
    files = {str(path.relative_to(source)) for path in (source / "dtrain").rglob("*.py")}
    jobs = {f"dtrain/jobs/{path.name}" for path in (source / "jobs").iterdir()}
    assert files | jobs | {"dtrain/py.typed"} <= names


def test_scripts_are_executable_and_parse() -> None:
    for path in (*(ROOT / "jobs").glob("*.sh"), ROOT / ".ci" / "run"):
        assert os.access(path, os.X_OK)
        assert start(["bash", "-n", path]).code == 0
