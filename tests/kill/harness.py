"""Attempts of a disturbed run until it has finished, and the comparison with the undisturbed one.

Invariant: the random numbers of a part follow from its case and number, which a failure names.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dtrain.comm.backends.threads import run_ranks
from dtrain.config.parse import read_run
from dtrain.training import train
from tests.kill.cases import Case, Layout
from tests.kill.processes import TARGETS, find_targets, kill
from tests.process import carriers, command, sweep

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("rank_program.py")

NODE_NAMES = """
import os, pathlib, platform

if "OMPI_COMM_WORLD_RANK" in os.environ:
    node = int(os.environ["OMPI_COMM_WORLD_RANK"]) // int(os.environ["DTRAIN_KILL_STAGES"])
    read_text = pathlib.Path.read_text

    def read_own_text(path, *words, **options):
        text = read_text(path, *words, **options)
        return f"node-{node}-{text}" if path.name == "boot_id" else text

    platform.node = lambda: f"node-{node}"
    pathlib.Path.read_text = read_own_text
"""
"""`sitecustomize` of cases with several nodes: each replica is on one with a kernel of its own."""

ORPHAN_LIMIT_S = 10.0
"""Seconds after a kill after which no process of the run may be left."""

NAP_S = 0.003
"""Seconds that a rank sleeps after every update, so that kills hit at different updates."""

CALLS = {"save": 17, "end": 4}
"""Calls of rank 0 among which the one of a kill is drawn: those of a save, and of the end."""

SHARD_CALLS = 3
"""Calls of the other ranks in a save."""

REFUSALS = (2, 3, 5)
"""Exit codes of a start that is refused: run file or folder, data, checkpoint."""

KEYS = (
    "status", "epochs", "updates", "samples", "train_loss", "train_loss_per_block", "test_loss",
    "test_accuracy", "accuracy_per_block", "digest",
)  # fmt: skip
"""Keys of `summary.json` that do not depend on the layout."""

TRAFFIC_KEYS = ("bytes_intra_node", "bytes_inter_node", "staleness")
"""Keys that depend on the layout, and are compared where it never changes."""

OWN_KEYS = {
    "time_s", "unix_s", "attempt", "eval_s", "save_s",
}  # fmt: skip
TRAIN_KEYS = ("loss", "samples", "accuracy", "epoch")


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes
    ----------
    target : str
        One of `TARGETS`; `number` chooses the rank.
    phase : str
        "start": from outside, some time after the command was started. "train": some time after
        training has begun. "save": at a file call inside a save. "end": at one after the last
        update.
    killer : int
        The rank that kills.
    delay_s : float
        The time after which it kills.
    call : int
        Number of the file call before which it kills, counted over saves.
    torn : bool
        Whether that call, if it writes, writes half of its data.
    wait_s : float
        Seconds for which the killer stands still afterwards.
    """

    target: str
    phase: str
    number: int
    killer: int = 0
    delay_s: float = 0.0
    call: int = 0
    torn: bool = False
    wait_s: float = 0.0


@dataclass
class Counts:
    """Counts of one part.

    Attributes
    ----------
    kills : list of str
        Phase and target of each kill that hit, as "save: rank".
    missed : list of str
        Kills that the end of the run, or of the killer, forestalled.
    refused, hangs, orphans, failures : int
        Starts that were refused, attempts that reached their limit, processes that were left after
        `ORPHAN_LIMIT_S`, attempts that failed without a kill.
    ends, identical_ends : int
        Runs that finished, and those whose end is that of the undisturbed run.
    max_lost : int
        The largest number of updates between the last one that was trained and the restart.
    gone_s : float
        The longest time from a kill to the end of all processes.
    fresh_s, restart_s : list of (int, float)
        Ranks, and seconds from the command to the first update, of starts without and with a
        checkpoint.
    notes : list of str
        What went wrong.
    """

    kills: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    starts: int = 0
    layout_changes: int = 0
    refused: int = 0
    hangs: int = 0
    orphans: int = 0
    failures: int = 0
    ends: int = 0
    identical_ends: int = 0
    max_lost: int = 0
    gone_s: float = 0.0
    fresh_s: list[tuple[int, float]] = field(default_factory=list)
    restart_s: list[tuple[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self) -> dict[str, Any]:
        """Return the counts as JSON has them."""
        return asdict(self)


def draw_kills(rng: random.Random, count: int) -> list[Kill]:
    """Return kills, at least half of them inside a save, the last one at the end of the run."""
    phases = ["save"] * (count - count // 2) + [
        ("end", "train", "start", "train")[number % 4] for number in range(count // 2)
    ]
    others = [phase for phase in phases if phase != "end"]
    rng.shuffle(others)
    phases = others + [phase for phase in phases if phase == "end"]
    first = rng.randrange(len(TARGETS))
    targets = itertools.islice(itertools.cycle(TARGETS), first, None)
    return [_draw_kill(rng, phase, target) for phase, target in zip(phases, targets, strict=False)]


def _draw_kill(rng: random.Random, phase: str, target: str) -> Kill:
    longest = {"start": 1.0, "train": 0.1}.get(phase, 0.0)
    return Kill(
        target=target,
        phase=phase,
        number=rng.randrange(12),
        killer=0 if phase == "end" else rng.randrange(12),
        delay_s=rng.uniform(0.0, longest),
        call=rng.randrange(CALLS.get(phase, 1)),
        torn=rng.random() < 0.5,
        wait_s=rng.choice([0.0, 0.02, 0.3]),
    )


def undisturbed(case: Case, folder: Path) -> Path:
    """Train a case without kills, on ranks that are threads; return its run folder."""
    out = folder / "undisturbed"
    if (out / "summary.json").exists():
        return out
    write_files(case, folder)
    layout = case.layouts[0]
    config = read_run(folder / "run.toml", [f"mesh.stages={layout.stages}"])
    ranks = range(layout.ranks)
    hosts = [f"node-{rank // layout.stages if case.nodes else 0}" for rank in ranks]
    run_ranks(layout.ranks, lambda comm: train(config, comm, out), hosts=hosts, timeout_s=600)
    summary = read_json(out / "summary.json")
    assert case.nodes == (summary["bytes_inter_node"] > 0)
    return out


def write_files(case: Case, folder: Path) -> None:
    """Write the run file of a case and its data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(case.run_file)
    blobs = ROOT / "tests" / "system" / "user" / "blobs.py"
    (folder / "blobs.py").write_text(blobs.read_text())
    if case.nodes:
        (folder / "sitecustomize.py").write_text(NODE_NAMES)


class Part:
    """A run of a case that is killed some times and then left to finish.

    Parameters
    ----------
    folder : Path
        An empty folder for the run.
    reference : Path
        The run folder of the undisturbed run.
    limit_s : float
        Seconds after which an attempt counts as hanging.
    start_s : float
        Seconds that a start takes about; kills from outside hit inside them.
    orphan_limit_s : float
        Seconds after a kill after which no process may be left.
    """

    def __init__(
        self, case: Case, number: int, folder: Path, reference: Path, limit_s: float = 240.0,
        start_s: float = 4.0,
        orphan_limit_s: float = ORPHAN_LIMIT_S,
    ) -> None:  # fmt: skip
        self.case = case
        self.name = f"{case.name}, part {number}"
        self.folder = folder
        self.reference = reference
        self.limit_s = limit_s
        self.start_s = start_s
        self.orphan_limit_s = orphan_limit_s
        self.counts = Counts()
        self._rng = random.Random(self.name)
        self._trained = 0
        self._mark = f"DTRAIN_MARK=kill-{os.getpid()}-{self._rng.random()}"
        write_files(case, folder)

    def run(self, kills: int) -> Counts:
        """Kill so many times, then let the run finish; return the counts."""
        planned = draw_kills(self._rng, kills)
        for number in range(kills + 5):
            layout, before = self._layout(number), self._layout(max(0, number - 1))
            self.counts.layout_changes += layout != before
            if self._attempt(layout, planned.pop(0) if planned else None):
                self._compare()
                break
        else:
            self._note("the run did not finish")
        return self.counts

    def _layout(self, number: int) -> Layout:
        return self.case.layouts[number // 2 % len(self.case.layouts)]

    def _attempt(self, layout: Layout, planned: Kill | None) -> bool:
        """Start the run once; return whether it has finished."""
        self._clear("progress.jsonl", "kills.jsonl")
        started = time.time()
        child = self._start(layout, planned)
        self.counts.starts += 1
        killed_at = None
        if planned is not None and planned.phase == "start":
            killed_at = self._kill_from_outside(child, planned)
        code = self._wait(child)
        struck = self._records("kills.jsonl")
        if struck:
            killed_at = struck[0]["time"]
        self._await_end(killed_at)
        self._judge(code, killed_at is not None, planned)
        self._note_progress(layout, started)
        return code == 0

    def _start(self, layout: Layout, planned: Kill | None) -> subprocess.Popen[bytes]:
        names = ("OMPI_", "PMI", "PRTE_", "SLURM_")
        environ = {k: v for k, v in os.environ.items() if not k.startswith(names)}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        environ |= dict([self._mark.split("=")]) | {"PYTHONPATH": f"{ROOT}:{self.folder}"}
        environ["DTRAIN_KILL"] = ""
        if planned is not None:
            writers = self.case.writers(layout) if planned.phase == "save" else layout.ranks
            killer = planned.killer % writers
            call = planned.call % SHARD_CALLS if killer else planned.call
            changes = {"killer": killer, "call": call}
            environ["DTRAIN_KILL"] = json.dumps(asdict(planned) | changes)
        environ["DTRAIN_KILL_STAGES"] = str(layout.stages)
        environ["DTRAIN_KILL_NAP_S"] = str(NAP_S)
        words = ["-m", "dtrain", "run", str(PROGRAM), "--ranks", str(layout.ranks)]
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *words],
                cwd=self.folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _kill_from_outside(self, child: subprocess.Popen[bytes], planned: Kill) -> float | None:
        """Kill after a while, but before training has begun; return when.

        None: the run has ended by then.
        """
        deadline = time.time() + self.start_s * planned.delay_s
        while True:
            while time.time() < deadline and not (self.folder / "progress.jsonl").exists():
                time.sleep(0.01)
            targets = find_targets(planned.target, child.pid, planned.number)
            if child.poll() is not None:
                return None
            if targets:
                break
            deadline = time.time() + 0.02
        now = time.time()
        kill(targets)
        return now

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        try:
            return child.wait(timeout=self.limit_s)
        except subprocess.TimeoutExpired:
            self.counts.hangs += 1
            left = [command(pid) for pid in carriers(self._mark)]
            self._note(f"no end after {self.limit_s} s: {left}")
            sweep(self._mark)
            return child.wait()

    def _await_end(self, killed_at: float | None) -> None:
        """Wait until no process is left; kill those that outlive the limit."""
        begun = time.time() if killed_at is None else killed_at
        while left := carriers(self._mark):
            if time.time() - begun > self.orphan_limit_s:
                self.counts.orphans += len(left)
                self._note(f"left after {self.orphan_limit_s} s: {[command(pid) for pid in left]}")
                sweep(self._mark)
                break
            time.sleep(0.05)
        if killed_at is not None:
            self.counts.gone_s = max(self.counts.gone_s, time.time() - killed_at)

    def _judge(self, code: int, was_killed: bool, planned: Kill | None) -> None:
        """Count how an attempt ended."""
        if was_killed:
            assert planned is not None
            self.counts.kills.append(f"{planned.phase}: {planned.target}")
        elif code in REFUSALS:
            self.counts.refused += 1
            self._note(f"refused with code {code}")
        elif code != 0:
            self.counts.failures += 1
            self._note(f"ended with code {code} and was not killed")
        elif planned is not None:
            self.counts.missed.append(str(planned))

    def _note_progress(self, layout: Layout, started: float) -> None:
        """Count what an attempt trained, and what was lost before it."""
        progress = self._records("progress.jsonl")
        if not progress:
            return
        first = progress[0]["update"]
        lost = self._trained - first
        self.counts.max_lost = max(self.counts.max_lost, lost)
        if lost > self.case.max_lost:
            self._note(f"{self._trained} updates were trained, and the restart has {first}")
        updates = [record for record in progress if record["event"] == "update"]
        self._trained = max([first, *(record["update"] for record in updates)])
        if updates:
            seconds = self.counts.restart_s if first else self.counts.fresh_s
            seconds.append((layout.ranks, updates[0]["time"] - started))
            self.start_s = updates[0]["time"] - started

    def _compare(self) -> None:
        """Compare summary, digest and metrics with those of the undisturbed run."""
        self.counts.ends += 1
        differences = list(self._differences())
        self.counts.identical_ends += not differences
        for text in differences:
            self._note(text)

    def _differences(self) -> list[str]:
        out, texts = self.folder / "out", list[str]()
        ours, theirs = (read_json(path / "summary.json") for path in (out, self.reference))
        keys = KEYS + (TRAFFIC_KEYS if len(self.case.layouts) == 1 else ())
        for key in keys:
            if ours[key] != theirs[key]:
                texts.append(f"{key} is {ours[key]}, undisturbed {theirs[key]}")
        expected = deduplicated(read_lines(self.reference / "metrics.jsonl"))
        records = read_lines(out / "metrics.jsonl")
        found = deduplicated(records)
        texts += [f"metrics.jsonl lacks {key}" for key in expected.keys() - found.keys()]
        for record in records:
            if (key := record_key(record)) is not None and values(record) != values(
                expected.get(key, {"kind": key[0]})
            ):
                texts.append(f"{key} of attempt {record['attempt']} differs: {values(record)}")
        if (ours["bytes_inter_node"] > 0) != self.case.nodes:
            texts.append(f"{ours['bytes_inter_node']} bytes were sent between nodes")
        if ours["attempts"] > self.counts.starts:
            texts.append(f"{ours['attempts']} attempts of {self.counts.starts} starts")
        return texts

    def _note(self, text: str) -> None:
        output = (self.folder / "output.txt").read_bytes()[-1500:].decode(errors="replace")
        self.counts.notes.append(f"{self.name}, start {self.counts.starts}: {text}\n{output}")

    def _records(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return read_lines(path) if path.exists() else []

    def _clear(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines; a torn one is an error."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record_key(record: Mapping[str, Any]) -> tuple[str, int, str] | None:
    """Return what a record of training or evaluation measures."""
    if record["kind"] not in ("train", "eval"):
        return None
    return record["kind"], record["update"], record.get("split", "")


def values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a record that neither time nor layout changes."""
    if record["kind"] == "train":
        return {key: record.get(key) for key in TRAIN_KEYS}
    return {key: value for key, value in record.items() if key not in OWN_KEYS}


def deduplicated(records: list[dict[str, Any]]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Return the last record of each measurement."""
    return {key: record for record in records if (key := record_key(record)) is not None}
