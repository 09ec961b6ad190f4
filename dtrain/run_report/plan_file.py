"""Read `plan.txt` of a run folder: mesh, blocks, timeline, messages and memory.

Invariant: a section that is missing or has another form is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, final

from dtrain.mesh import RankMesh

TRUNCATED = "…"


class DrawnAction(NamedTuple):
    """An action of a stage on a timeline.

    Attributes
    ----------
    row : int
        The row of the timeline, a stage or a rank.
    kind : str
        "F", "again" (a further forward), "B", "W", "U" or "wait".
    label : str
        Number of the micro-batch or update.
    """

    row: int
    start: float
    end: float
    kind: str
    label: str = ""


class PlannedMessage(NamedTuple):
    """A message between two stages, and its bytes in a full micro-batch."""

    route: str
    source_stage: int
    target_stage: int
    size: int
    is_sent: bool


@final
@dataclass(frozen=True)
class RunPlan:
    """The contents of `plan.txt`.

    Attributes
    ----------
    mesh : RankMesh or None
        The ranks.
    updates, updates_per_epoch, batch_size, micro_batches : int
        Sizes of the run; 0 where they are not known.
    blocks : list of dict of str to str
        The table of blocks, by the names of its columns.
    timeline : list of DrawnAction
        The first updates, in units of one forward.
    bubble : float or None
        Share of the time in which stages wait for others, by the schedule alone.
    messages : list of PlannedMessage
        The messages of a full micro-batch.
    memory : dict of int to dict of str to int
        Planned bytes by stage and part; "total" is their peak.
    notes : list of str
        Warnings about the run.
    """

    mesh: RankMesh | None
    updates: int
    updates_per_epoch: int
    batch_size: int
    micro_batches: int
    blocks: list[dict[str, str]]
    timeline: list[DrawnAction]
    bubble: float | None
    messages: list[PlannedMessage]
    memory: dict[int, dict[str, int]]
    notes: list[str]

    @property
    def rows_per_micro_batch(self) -> int:
        """Samples of the largest micro-batch, 0 where that is not known."""
        if self.mesh is None or not self.batch_size:
            return 0
        shares = self.mesh.shares or (1,) * self.mesh.replicas
        rows = -(-self.batch_size * max(shares) // sum(shares))
        return -(-rows // max(self.micro_batches, 1))


def parse_plan(text: str) -> RunPlan:
    """Return the contents of `plan.txt`."""
    sections = _sections(text)
    updates, per_epoch, batch_size, micro_batches = _sizes(text)
    bubble = re.search(r"\bbubble ([\d.]+) ?%", text)
    return RunPlan(
        mesh=_mesh(text),
        updates=updates,
        updates_per_epoch=per_epoch,
        batch_size=batch_size,
        micro_batches=micro_batches,
        blocks=_rows(sections.get("Blocks", [])),
        timeline=list(_timeline(text)),
        bubble=None if bubble is None else float(bubble[1]) / 100,
        messages=list(_messages(_rows(sections.get("Messages", [])))),
        memory=_memory(_rows(sections.get("Peak", []))),
        notes=sections.get("Notes", []),
    )


def _sections(text: str) -> dict[str, list[str]]:
    """Return the lines below each title, by the first word of the title."""
    sections = {}
    for part in re.split(r"\n\s*\n", text):
        title, *lines = part.strip("\n").split("\n")
        sections[title.split(" ")[0]] = lines
    return sections


def _int(text: str) -> int:
    return int(text.replace(",", ""))


def _mesh(text: str) -> RankMesh | None:
    match = re.match(
        r"[\d,]+ ranks? = ([\d,]{1,9}) replicas? x ([\d,]{1,9}) stages?, ([\w-]+)"
        r"(?:, shares ([\d ]+))?",
        text,
    )
    if match is None:
        return None
    try:
        shares = tuple(map(int, (match[4] or "").split()))
        return RankMesh(_int(match[1]), _int(match[2]), match[3], shares)
    except Exception:  # a damaged file
        return None


def _sizes(text: str) -> tuple[int, int, int, int]:
    """Return updates, updates per epoch, samples per update and micro-batches."""
    match = re.search(
        r"^([\d,]{1,19}) updates?, ([\d,]{1,19}) per epoch; ([\d,]{1,19}) samples? per update in "
        r"([\d,]{1,19}) micro-batch",
        text,
        re.MULTILINE,
    )
    return (0, 0, 0, 0) if match is None else tuple(map(_int, match.groups()))  # type: ignore[return-value]


def _rows(lines: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of an aligned table, by the names of its columns."""
    if not lines:
        return []
    header = re.split(r" {2,}", lines[0].strip())
    rows = [re.split(r" {2,}", line.strip()) for line in lines[1:]]
    return [
        dict(zip(header, row, strict=False)) | ({"": row[-1]} if len(row) > len(header) else {})
        for row in rows
        if len(row) >= len(header) - 1
    ]


def _timeline(text: str) -> Iterator[DrawnAction]:
    """Yield the actions of the drawn timeline; an update marks the end of its column."""
    for stage_text, row in re.findall(r"^stage +(\d{1,6}) \|(.*)\|$", text, re.MULTILINE):
        stage, cells = int(stage_text), row.rstrip(TRUNCATED)
        cells = cells[::2] if " " in cells else cells
        updates = [column + 1 for column, symbol in enumerate(cells) if symbol == "U"]
        # An update hides the last column of the action before it.
        cells = re.sub(r"([^U.])U", r"\1\1", cells).replace("U", ".")
        column = 0
        for symbol, group in groupby(cells):
            start, column = column, column + len(list(group))
            if symbol != ".":
                yield DrawnAction(stage, start, column, *_symbol(symbol))
        yield from (DrawnAction(stage, end, end, "U") for end in updates)


def _symbol(symbol: str) -> tuple[str, str]:
    """Return kind and number of a character of the timeline."""
    for first, kind in (("0", "F"), ("k", "again"), ("a", "B"), ("A", "W")):
        if 0 <= ord(symbol) - ord(first) < 10:
            return kind, str(ord(symbol) - ord(first))
    return "F", ""


def _messages(rows: Sequence[dict[str, str]]) -> Iterator[PlannedMessage]:
    for row in rows:
        stages = [re.search(r"\(stage (\d{1,9})\)", row.get(end, "")) for end in ("from", "to")]
        size = re.fullmatch(r"[\d,]{1,24}", row.get("bytes", ""))
        source, target = stages
        if source and target and size:
            yield PlannedMessage(
                row["route"], int(source[1]), int(target[1]), _int(size[0]), source[1] != target[1]
            )


def _memory(rows: Sequence[dict[str, str]]) -> dict[int, dict[str, int]]:
    memory = {}
    for row in rows:
        if all(re.fullmatch(r"[\d,]{1,24}", cell) for cell in row.values()) and "stage" in row:
            parts = {part: _int(size) for part, size in row.items() if part != "stage"}
            memory[_int(row["stage"])] = parts
    return memory
