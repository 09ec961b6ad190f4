"""Break each promise of `docs/reliability.md` on purpose: ``python -m tests.mutations [TEXT ...]``.

A mutation changes one place of a copy of the repository. The test that the promise names has to
fail there. TEXT chooses the promises that contain it. Exit code 1: a test did not fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PAGE = ROOT / "docs" / "reliability.md"

LIMIT_S = 300.0

TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@dataclass(frozen=True)
class Mutation:
    """A change that breaks a promise.

    Parameters
    ----------
    path : str
        The file that is changed.
    old, new : str
        Text that occurs once in the file, and what takes its place.
    test : str
        The test that has to fail.
    """

    path: str
    old: str
    new: str
    test: str

    @property
    def fits(self) -> bool:
        """Whether the text occurs exactly once."""
        return (ROOT / self.path).read_text(encoding="utf-8").count(self.old) == 1


def promises() -> dict[str, list[str]]:
    """Return the tests of each promise of the page."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if tests := TEST.findall(line):
            rows[line.split("|")[1].strip()] = [f"{path}::{name}" for path, name in tests]
    return rows


def run_tests(folder: Path, test: str) -> subprocess.CompletedProcess[str]:
    """Run a test in a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    environ = os.environ | {"DTRAIN_DATA": str(data_folder())}
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=LIMIT_S
    )


def data_folder() -> Path:
    """Return the data of the tests, since a copy has none beside it."""
    return Path(os.environ.get("DTRAIN_DATA", ROOT.parent / "shared" / "data"))


def copy_repository(folder: Path) -> None:
    """Copy all files that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def try_mutation(mutation: Mutation) -> str:
    """Return "fails" if the test fails in the changed copy, else what happened."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder)
        path = folder / mutation.path
        path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new))
        try:
            ended = run_tests(folder, mutation.test)
        except subprocess.TimeoutExpired:
            return "fails"
    return "fails" if ended.returncode == 1 else f"PASSES ({ended.returncode})\n{ended.stdout}"


def main() -> int:
    """Try the mutations of the chosen promises, and print a row for each."""
    chosen = [
        mutation
        for promise, tests in promises().items()
        for mutation in MUTATIONS
        if mutation.test in tests and all(text in promise for text in sys.argv[1:])
    ]
    outcomes = []
    for mutation in chosen:
        outcomes.append(try_mutation(mutation))
        change = f"{mutation.path}: {mutation.old.strip()!r} -> {mutation.new.strip()!r}"
        print(f"{outcomes[-1]}: {mutation.test}\n    {change}", flush=True)
    return int(any(outcome != "fails" for outcome in outcomes))


CRASH_POINTS = "tests/ranks/test_crash_points.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "dtrain/checkpoint/store.py",
        "    files.fsync(part)\n",
        "",
        CRASH_POINTS + "test_every_crash_leaves_a_whole_checkpoint_and_a_folder_that_resumes",
    ),
    Mutation(
        "dtrain/checkpoint/store.py",
        "files.calls.exchange(part, final)",
        "raise OSError",
        CRASH_POINTS + "test_every_crash_leaves_a_whole_checkpoint_and_a_folder_that_resumes",
    ),
    Mutation(
        "dtrain/session/folder_lock.py",
        "            remove_partial(folder)\n",
        "            pass\n",
        CRASH_POINTS + "test_crashed_runs_end_as_the_undisturbed_one_and_leave_nothing_behind",
    ),
    Mutation(
        "dtrain/checkpoint/store.py",
        "except OSError as error:",
        "except FileNotFoundError as error:",
        CRASH_POINTS
        + "test_every_failing_call_of_a_save_is_reported_and_leaves_a_whole_checkpoint",
    ),
    Mutation(
        "dtrain/checkpoint/run_folder.py",
        "except OSError as error:",
        "except FileNotFoundError as error:",
        CRASH_POINTS + "test_a_run_whose_records_cannot_be_written_ends_with_an_error_of_its_own",
    ),
    Mutation(
        "dtrain/tracking/metrics_file.py",
        "file.truncate(position)",
        "pass",
        "tests/rule/test_tracking.py::test_a_torn_line_of_metrics_is_removed",
    ),
    Mutation(
        "dtrain/comm/launcher.py",
        "prctl(PR_SET_PDEATHSIG, signal.SIGTERM)",
        "pass",
        "tests/system/test_kill.py::"
        "test_a_killed_run_loses_at_most_one_interval_and_ends_as_the_undisturbed_one",
    ),
)
"""At least one for each promise."""


if __name__ == "__main__":
    sys.exit(main())
