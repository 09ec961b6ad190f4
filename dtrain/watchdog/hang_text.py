"""The error of a run that hangs, and the note on a rank that is slow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dtrain.comm.flight_recorder import format_ranks
from dtrain.errors import DtrainError, HangError, RankLostError
from dtrain.watchdog.observer import Hang
from dtrain.watchdog.positions import Position
from dtrain.watchdog.process_state import GONE

MAX_SHOWN = 4
"""Culprits and waits that a message shows one by one."""


STACK_LINES = 16
"""Lines of a stack on the screen: eight calls."""


@dataclass(frozen=True)
class Ranks:
    """What is known about all ranks.

    Attributes
    ----------
    names : sequence of str
        "rank 3 of 4 on n017" of every rank.
    states : mapping of int to str
        States of the processes of silent ranks, as far as they are known.
    """

    names: Sequence[str]
    states: Mapping[int, str]


def hang_error(hang: Hang, own: Position, folder: Path, ranks: Ranks) -> DtrainError:
    """Return the error of a run that hangs.

    Parameters
    ----------
    own : Position
        That of the rank that reports.
    folder : Path
        Where the flight records are.
    ranks : Ranks
        Names and states.
    """
    causes, first = "; ".join(_cause_texts(hang, own, ranks)), hang.culprits[0]
    section = _section(hang, own)
    limit = f"[timeouts] {section} = {own.limit_s:g} s has passed: " if section else ""
    advice = (
        f"{limit}all ranks end; start the same command again to resume from the last checkpoint, "
        f"or set a longer limit; last events and stacks of the ranks: {folder} (`dtrain flight`)"
    )
    if hang.is_deadlock:
        return HangError("hang.deadlock", f"the run hangs: {causes}; {advice}")
    if first not in hang.silent:
        return HangError("hang.no-progress", f"the run hangs: {causes}; {advice}")
    if ranks.states.get(first) == GONE:
        return RankLostError("rank.gone", f"a rank is lost: {causes}; {advice}")
    return HangError("hang.no-answer", f"the run hangs: {causes}; {advice}")


def slow_note(hang: Hang, own: Position, ranks: Ranks) -> str:
    """Return the note on ranks that others have waited for; the run goes on."""
    return (
        f"dtrain: note: {'; '.join(_cause_texts(hang, own, ranks))}; the run ends with code "
        f"{HangError.code} if nothing moves for {own.limit_s:g} s ([timeouts] {own.section})"
    )


def culprit_stack(hang: Hang, folder: Path) -> str:
    """Return the innermost lines of the stack of the first culprit, from its flight record."""
    rank = hang.culprits[0]
    with suppress(OSError, ValueError):
        text = (folder / f"rank-{rank:05d}.txt").read_text(encoding="utf-8")
        stack, _, others = text.partition("\nstack\n")[2].partition("\nstack of thread ")
        lines = stack.rstrip().splitlines()[-STACK_LINES:]
        if lines and others:  # that of a thread which reads samples
            name, *other = others.partition("\nstack of thread ")[0].rstrip().splitlines()
            lines = [*lines, f"its thread {name}:", *other[-STACK_LINES:]]
        if lines and rank not in hang.silent:
            return "\n".join([f"stack of rank {rank}, innermost last:", *lines])
    return ""


def _cause_texts(hang: Hang, own: Position, ranks: Ranks) -> Iterator[str]:
    """Yield a text per culprit, and one on the ranks that wait."""
    if hang.is_deadlock:
        yield (
            f"{_ranks_text(hang.culprits)} wait only for each other: they call different "
            "collectives (`debug = true` names these), or the network loses messages"
        )
    for rank in hang.culprits[:MAX_SHOWN]:
        yield _culprit_text(hang, rank, own, ranks)
    if (more := len(hang.culprits) - MAX_SHOWN) > 0:
        yield f"and {more} more ranks"
    if hang.is_deadlock:
        return
    if blocked := hang.blocked[hang.culprits[0]]:
        wait, others = "waits" if blocked == 1 else "wait", len(ranks.names) - 1
        waiting = f"{blocked} of the other {others} ranks {wait} for rank {hang.culprits[0]}"
        yield waiting + _first_wait(hang)


def _culprit_text(hang: Hang, rank: int, own: Position, ranks: Ranks) -> str:
    """Return a text on one culprit."""
    position = hang.positions.get(rank)
    if position is None or rank in hang.silent:
        state = ranks.states.get(rank, "does not answer")
        return f"{ranks.names[rank]} {state}{_work_text(position)}"
    if position.what is not None:
        return f"{ranks.names[rank]} has waited {position.still_s:.0f} s for {position.what}"
    place = f", at {position.place}" if position.place else ""
    if position.still_s < own.still_s / 2:
        return f"{ranks.names[rank]} is slow: it makes progress{_work_text(position)}{place}"
    work = f"{_work_text(position)}{place}"
    return f"{ranks.names[rank]} has made no progress for {position.still_s:.0f} s{work}"


def _work_text(position: Position | None) -> str:
    """Return section, update and action of a rank in parentheses."""
    if position is None:
        return ""
    action = f", action {position.action}" if position.action else ""
    update = f", last update {position.update}" if position.update else ""
    return f" (section '{position.section}'{update}{action})"


def _first_wait(hang: Hang) -> str:
    """Return the text of one wait for the first culprit."""
    for rank, position in sorted(hang.positions.items()):
        if position.wait is not None and rank not in hang.silent:
            return f": rank {rank} for {position.what}"
    return ""


def _section(hang: Hang, own: Position) -> str | None:
    """Return the section whose limit has passed."""
    for rank in hang.culprits:
        if rank in hang.positions and rank not in hang.silent:
            return hang.positions[rank].section
    return own.section


def _ranks_text(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {format_ranks(ranks)}"
