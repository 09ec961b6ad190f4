"""A first start that ends while it builds: the same command starts anew, and trains the same."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint import files
from dtrain.checkpoint.resume import find_checkpoint
from dtrain.comm.backends.threads import run_ranks
from dtrain.errors import CheckpointError, ConfigError, Interrupted
from dtrain.session import opening
from dtrain.training import train
from tests import tiny
from tests.harness import train_in_threads
from tests.refusals import refuses

FAILURES: dict[str, BaseException] = {
    "Ctrl-C": KeyboardInterrupt(),
    "SIGTERM": Interrupted.by_signal(15),
    "an exception in a factory": ArithmeticError("a layer's factory"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
}

EXPECTED: dict[str, tuple[type[BaseException], ...]] = {
    "build": (KeyboardInterrupt, Interrupted, ArithmeticError),
    "run.toml": (CheckpointError,),
    "plan.txt": (CheckpointError,),
    "summary.json": (CheckpointError,),
}
"""The errors of the command, by the place of the failure."""


def kill(out: Path, copy: Path) -> None:
    """Copy a run folder as it is now, in the state that SIGKILL leaves."""
    shutil.copytree(out, copy, dirs_exist_ok=True)
    owner = json.loads((copy / "owner.json").read_text())
    (copy / "owner.json").write_text(json.dumps(owner | {"process": 2**22 + 1}))


def fail_in(place: str, error: BaseException, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the start of a run raise an error: in its build, or as it writes a file."""
    build, replace_file = opening.build_rank, files.replace_file

    def failing_build(plan: Any, comm: Any) -> Any:
        if comm.rank == 0:
            kill(Path(comm.flight.folder).parent, copy)
            raise error
        return build(plan, comm)

    def failing_write(path: Path, content: str) -> None:
        if path.name == place:
            kill(path.parent, copy)
            raise error
        replace_file(path, content)

    if place == "build":
        monkeypatch.setattr(opening, "build_rank", failing_build)
    else:
        monkeypatch.setattr(files, "replace_file", failing_write)


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the digest of a run that was not disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return str(train_in_threads(tiny.run(epochs=1), out, 2)["digest"])


@pytest.mark.parametrize(
    ("place", "name"),
    [("build", name) for name in list(FAILURES)[:-1]]
    + [(file, "a full disk") for file in list(EXPECTED)[1:]],
)
def test_the_same_command_starts_anew(
    place: str, name: str, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the error, and after a SIGKILL at the same moment; with --resume never, too."""
    out, killed, run = tmp_path / "out", tmp_path / "killed", tiny.run(epochs=1, mesh__stages=2)
    with monkeypatch.context() as patch:
        fail_in(place, FAILURES[name], killed, patch)
        with pytest.raises(EXPECTED[place]) as caught:
            run_ranks(2, lambda comm: train(run, comm, out))
    assert place != "build" or caught.value is FAILURES[name]
    assert not (out / "owner.json").exists()
    assert find_checkpoint(out, "never") is None
    for folder in (out, killed):
        result = run_ranks(2, lambda comm, to=folder: train(run, comm, to))[0]
        assert (result["status"], result["digest"]) == ("finished", digest)


def test_a_users_run_file_makes_no_run_folder(tmp_path: Path) -> None:
    """A folder with files of somebody else is refused, whatever their names."""
    for name in ("run.toml", "plan.txt", "data-statistics.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("epochs = 1\n")
        with refuses(ConfigError, "run-folder.other-files"):
            find_checkpoint(folder, "auto")
