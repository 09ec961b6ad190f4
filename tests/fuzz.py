"""Hostile run folders: files are changed at random, and the commands that read them are run.

    python -m tests.fuzz --count 10000 --seed 0

A command may refuse a folder with one of dtrain's errors. Found are tracebacks, commands that take
longer than `LIMIT_S`, files opened outside of the folder, and files that were changed in it or
beside it. Whatever is found is printed with the number of the trial, which repeats it:
``--only NUMBER``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.checkpoint.manifest_file import write_manifest
from dtrain.checkpoint.shard_file import SHARD_HASH, hash_file
from dtrain.cli import main
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.comm.flight_recorder import FlightRecorder
from dtrain.errors import DtrainError
from dtrain.evaluation import evaluate_run
from dtrain.run_report import charts
from dtrain.run_report import page as page_module
from tests import tiny
from tests.harness import train_in_threads

LIMIT_S = 20
SECRET = "SECRET-OF-ANOTHER-FOLDER"

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.0, 1e308, -1e308),
    *(float("nan"), float("inf"), "", "\x00", "\ud800", "a" * 5000, "<script>alert(1)</script>"),
    *(
        "../../outside/secret",
        "/etc/passwd",
        "%s%n",
        "{0}",
        "\x1b[31m",
        [],
        {},
        [[[[[]]]]],
        {"": {}},
    ),
    *(["a", 1, None], {"a": {"b": [1, {"c": None}]}}, "0-99999", "99999999999999999999"),
)


class Trial(NamedTuple):
    """One change and what was found."""

    number: int
    change: str
    command: str
    problem: str


# ---- changes


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """Return data with some flipped bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Return the start of data, or data without a part."""
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:start] if rng.random() < 0.5 else data[:start] + data[stop:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """Return data with a part that occurs several times."""
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:stop] + data[start:stop] * rng.randrange(1, 5) + data[stop:]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Return data with foreign text in it."""
    place, value = rng.randrange(len(data) + 1), rng.choice(VALUES)
    texts = (
        rng.randbytes(rng.randrange(1, 9)),
        repr(value).encode("utf-8", "replace"),
        b"[" * 50_000,
    )
    return data[:place] + rng.choice(texts) + data[place:]


def replace_value(data: bytes, rng: random.Random) -> bytes:
    """Return JSON text in which one value, or one key, is another one; lines of it likewise."""
    lines = data.decode("utf-8", "replace").split("\n")
    numbers = [n for n, line in enumerate(lines) if line.lstrip()[:1] in ("{", "[")]
    if (data.lstrip()[:1] == b"{" and len(numbers) <= 1) or not numbers:
        return _replace_in(data, rng)
    number = rng.choice(numbers)
    lines[number] = _replace_in(lines[number].encode(), rng).decode("utf-8", "replace")
    return "\n".join(lines).encode("utf-8", "replace")


def _replace_in(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return flip_bits(data, rng)
    return json.dumps(_change(value, rng)).encode()


def _change(value: Any, rng: random.Random) -> Any:
    """Return a value in which one part is another one."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {(str(rng.choice(VALUES)) if k == key else k): v for k, v in value.items()}
        return value | {key: _change(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        return [*value[:index], _change(value[index], rng), *value[index + 1 :]]
    return rng.choice(VALUES)


TEXT_CHANGES = (flip_bits, cut, repeat, insert, replace_value, replace_value, replace_value)
BINARY_CHANGES = (flip_bits, flip_bits, cut, repeat, insert)


def spoil_kind(path: Path, rng: random.Random, outside: Path) -> str:
    """Put a link, a pipe, a folder or nothing in the place of a file."""
    kind = rng.choice(("link", "link to a folder", "circle", "pipe", "folder", "nothing"))
    path.unlink()
    if kind == "link":
        path.symlink_to(outside / path.name)
    elif kind == "link to a folder":
        path.symlink_to(outside)
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    return kind


def fix_hashes(folder: Path, rng: random.Random) -> None:
    """Let the manifest of a checkpoint fit its changed content and its changed shards."""
    with contextlib.suppress(Exception):
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        content.pop("sha256", None)
        for name, shard in content["shards"].items():
            shard[SHARD_HASH] = hash_file(folder / name)
            shard["bytes"] = (folder / name).stat().st_size
        write_manifest(folder, content)


# ---- commands


def quietly(*words: str | Path) -> None:
    """Run a command in this process without its output; an error of dtrain is a refusal."""
    output = io.StringIO()
    refusals = contextlib.suppress(DtrainError, SystemExit)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), refusals:
        main([str(word) for word in words])
    if SECRET in output.getvalue():
        raise AssertionError("the text of another folder is shown")
    if "Traceback" in output.getvalue():
        raise AssertionError(output.getvalue())


def evaluate(folder: Path) -> None:
    """Evaluate the newest checkpoint on one rank."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(DtrainError):
        evaluate_run(folder, Comm(SingleBackend()))


def commands(folder: Path, good: Path, out: Path) -> dict[str, Callable[[], None]]:
    """Return the commands that read a run folder, by name."""
    return {
        "status": lambda: quietly("status", folder),
        "status --json": lambda: quietly("status", folder, "--json"),
        "compare": lambda: quietly("compare", folder, good),
        "report": lambda: quietly("report", folder, good, out / "page.html"),
        "flight": lambda: quietly("flight", folder),
        "ls": lambda: quietly("checkpoint", "ls", folder),
        "verify": lambda: quietly("checkpoint", "verify", folder, "--json"),
        "diff": lambda: quietly("checkpoint", "diff", folder, good),
        "export": lambda: quietly("export", folder, out / "model.pt"),
        "evaluate": lambda: evaluate(folder),
    }


READERS = {
    "manifest.json": ("ls", "verify", "diff", "export", "evaluate", "status"),
    ".h5": ("verify", "diff", "export", "evaluate"),
    ".txt": ("flight",),
    ".stacks": ("flight",),
    ".toml": ("status", "compare"),
    "data-statistics.json": ("evaluate",),
}
"""The commands that read a file, by the end of its name; other files have `OTHERS`. Any file may be
read by `report`, which takes longer than all others."""

OTHERS = ("status", "status --json", "compare", "flight")

REPORTS = 0.05
"""Share of the trials that write a report."""


# ---- trials


class Fuzzer:
    """Two run folders in a place of their own, of which one is changed again and again."""

    def __init__(self, place: Path, reports: float) -> None:
        self.reports = reports
        self.good, self.folder = place / "good", place / "run"
        self.out, self.outside = place / "out", place / "outside"
        make_run(self.good)
        shutil.copytree(self.good, self.folder)
        self.out.mkdir()
        self.outside.mkdir()
        self.files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        for path in [*self.files, Path("secret")]:
            (self.outside / path.name).write_text(SECRET)
        self.opened: list[str] = []
        self.listens = False
        sys.addaudithook(self._note_open)

    def _note_open(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.listens and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            if arguments[2] & os.O_NOFOLLOW:  # a link is refused
                path = os.path.join(os.path.realpath(os.path.dirname(path)), "-")
            path = os.path.realpath(path)
            if path.startswith(str(self.outside)):
                self.opened.append(path)

    def run(self, number: int, seed: int) -> list[Trial]:
        """Change one file, or two, run a command, and undo the change."""
        rng = random.Random(f"{seed} {number}")
        chosen = rng.sample(self.files, rng.choice((1, 1, 1, 2)))
        changes = [self._spoil(path, rng) for path in chosen]
        checkpoint = chosen[0].parent
        if (checkpoint / "manifest.json").is_file() and rng.random() < 0.6:
            fix_hashes(checkpoint, rng)
        is_report = rng.random() < self.reports
        name = "report" if is_report else rng.choice(self._readers(chosen[0]))
        before = self._snapshot()
        problem = self._problem(commands(self.folder, self.good, self.out)[name])
        after = self._snapshot()
        if problem is None and after != before:
            names = {key for key in before | after if before.get(key) != after.get(key)}
            problem = f"changed or made: {', '.join(sorted(names))}"
        self._restore(chosen)
        return [] if problem is None else [Trial(number, "; ".join(changes), name, problem)]

    def _readers(self, path: Path) -> tuple[str, ...]:
        return next((names for end, names in READERS.items() if path.name.endswith(end)), OTHERS)

    def _spoil(self, path: Path, rng: random.Random) -> str:
        name = path.relative_to(self.folder)
        if rng.random() < 0.1:
            return f"{name}: {spoil_kind(path, rng, self.outside)}"
        change = rng.choice(BINARY_CHANGES if path.suffix == ".h5" else TEXT_CHANGES)
        path.write_bytes(change(path.read_bytes(), rng))
        return f"{name}: {change.__name__}"

    def _problem(self, command: Callable[[], None]) -> str | None:
        """Return what is wrong with a command on the folder."""

        def end(*_: object) -> None:
            raise TimeoutError("a hang")

        self.opened.clear()
        self.listens = True
        previous = signal.signal(signal.SIGALRM, end)
        signal.alarm(LIMIT_S)
        try:
            command()
        except BaseException:
            return traceback.format_exc()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
            self.listens = False
        return f"opened {self.opened[0]}" if self.opened else None

    def _snapshot(self) -> dict[str, Any]:
        """Return size and time of each file but those of the output."""
        paths = [p for root in (self.folder, self.good, self.outside) for p in root.rglob("*")]
        stats = {str(path): path.lstat() for path in paths}
        names = {path.name for path in self.out.iterdir()}
        allowed = {"page.html", "model.pt", "model.pt.statistics.json"}
        others = dict.fromkeys(names - allowed, (0, 0))
        return others | {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    def _restore(self, chosen: list[Path]) -> None:
        folders = {path.parent for path in chosen}
        for path in [*chosen, *(folder / "manifest.json" for folder in folders)]:
            source = self.good / path.relative_to(self.folder)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            if source.exists():
                shutil.copy2(source, path)


def make_run(folder: Path) -> None:
    """Train a tiny run with a timeline, and write flight records of its ranks."""
    with contextlib.redirect_stdout(io.StringIO()):
        train_in_threads(tiny.run(mesh__stages=2, trace=True, data__normalise=True), folder, 2)
    (folder / "flight").mkdir(exist_ok=True)
    for rank in range(3):
        recorder = FlightRecorder(f"rank {rank}", rank, 3, "localhost")
        recorder.folder = folder / "flight"
        recorder.note("action", "F0.1", "update", 3)
        recorder.dump("SIGURG", sys._getframe())
    (folder / "flight" / "rank-00002.stacks").write_text('Current thread\n  File "a.py", line 3\n')
    owner = {"host": "elsewhere", "process": 7, "since": "1", "machine": "x", "heartbeat_s": 5.0}
    (folder / "owner.json").write_text(json.dumps(owner))


@contextlib.contextmanager
def fuzzer(reports: float = REPORTS) -> Iterator[Fuzzer]:
    """Make the folders; charts are not drawn, which takes most of the time."""
    draw, save = charts.svg_text, page_module.save_figure
    charts.svg_text = lambda figure: "<svg/>"  # type: ignore[assignment]
    page_module.save_figure = lambda figure, path: path.touch()  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as name:
            yield Fuzzer(Path(name).resolve(), reports)
    finally:
        charts.svg_text, page_module.save_figure = draw, save


def run_trials(numbers: range | list[int], seed: int, reports: float = REPORTS) -> list[Trial]:
    """Run trials, a share of which write a report; return those that found something."""
    found = []
    with fuzzer(reports) as fuzz:
        for number in numbers:
            for trial in fuzz.run(number, seed):
                found.append(trial)
                print(f"--- trial {number}: {trial.command} after {trial.change}\n{trial.problem}")
    return found


def run_program() -> int:
    """Run the trials of the command line, print what they found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*")
    options = parser.parse_args()
    start = time.perf_counter()
    numbers = options.only or range(options.count)
    found = run_trials(numbers, options.seed)
    kinds = Counter(trial.problem.strip().splitlines()[-1][:100] for trial in found)
    for kind, count in kinds.most_common():
        print(f"{count:6}  {kind}")
    seconds = time.perf_counter() - start
    print(f"{len(found)} of {len(numbers)} trials found something, {seconds:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(run_program())
