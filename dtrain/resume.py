"""Which checkpoint a run goes on from, and what may differ from the run that wrote it.

Invariant: whatever decides what is trained must be the same; only the length, the mesh, the device
and what is reported may change, the length not where learning rates followed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.checkpoint import Manifest, latest
from dtrain.config import Run
from dtrain.errors import Refusal
from dtrain.folder import OWNER
from dtrain.tables import Table, text

FREE = (
    "epochs",
    "updates",
    "device",
    "threads",
    "debug",
    "trace",
    "mesh.",
    "log.",
    "partition.recompute",
    "evaluate.",
    "checkpoint.keep",
)
LENGTH = ("epochs", "updates")
OURS = {"summary.json", "checkpoints", OWNER}
CHECKPOINTS = "checkpoints"


def find(out: Path, resume: str) -> Manifest | None:
    """Return the checkpoint that a run into `out` goes on from; None: it starts afresh.

    Parameters
    ----------
    resume : str
        "auto": the newest in `out`; "never": none, and `out` must be empty; else the folder of a
        run whose newest is taken, unless `out` has gone on from there already.

    Raises
    ------
    Refusal
        A folder that is not empty, holds no run of ours, or lacks the checkpoint asked for.
    """
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    held -= {name for name in held if name.startswith(f".{OWNER}")}
    if resume == "never" and held - {OWNER}:
        raise Refusal(f"--resume never, but {out} is not empty: delete it or choose another --out")
    if held and not held & OURS:
        raise Refusal(
            f"{out} is not empty and no run folder ({', '.join(sorted(held)[:3])}): "
            "choose another --out"
        )
    own = latest(out / CHECKPOINTS)
    if own is not None or resume in ("auto", "never"):
        return own
    manifest = latest(Path(resume) / CHECKPOINTS)
    if manifest is None:
        raise Refusal(f"--resume {resume}: there is no complete checkpoint in {resume}")
    return manifest


def refuse_changes(out: Path, before: Table | None, run: Run, reached: bool = False) -> None:
    """Refuse what would not be the same run, or would overwrite its run file.

    Parameters
    ----------
    before : dict or None
        The resolved run of the checkpoint to go on from.
    reached : bool
        Whether that checkpoint holds all updates of `run`: then nothing is left to train, at
        whatever rate.
    """
    if run.path == (out / "run.toml").resolve():
        raise Refusal(f"--out {out} would overwrite the run file {run.path}: choose another --out")
    old, new = dict(_flat(before or {})), dict(_flat(run.table()))
    told = {
        key: f"{key} (was {_text(old, key)}, is {_text(new, key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    changed = [words for key, words in told.items() if not key.startswith(FREE)]
    if before is not None and changed:
        raise Refusal(
            f"the run to go on from was begun with other settings: {', '.join(changed)}; put them "
            f"back, or choose another --out than {out}"
        )
    length = [told[key] for key in LENGTH if key in told]
    if before is not None and length and not reached:
        for what in followers(run):
            raise Refusal(
                f"the {what} followed the length that the run was begun with: "
                f"{', '.join(length)}; put it back, or choose another --out than {out}"
            )


def followers(run: Run) -> Iterator[str]:
    """Yield in words what follows the length of a run, which then cannot be made longer."""
    if run.make_rate().horizon:
        yield f"learning rates of '{run.rate.name}'"
    if run.make_sync().horizon:
        yield f"phases of '{run.sync.name}'"


def _flat(table: Table, outer: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the nested tables as dotted keys; lists and tuples are the same."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{outer}{key}.")
        else:
            yield outer + key, list(value) if isinstance(value, tuple) else value


def _text(table: Table, key: str) -> str:
    return text(table[key]) if key in table else "absent"
