"""Numbers and tables as text for people."""

from __future__ import annotations

from collections.abc import Sequence


def pluralise(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 rank", "2 ranks"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def percent(fraction: float, digits: int = 1) -> str:
    """Return a fraction in percent: "12.5 %"."""
    return f"{fraction:.{digits}%}".replace("%", " %")


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a header and rows as lines; columns of numbers are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    are_numbers = [all(_is_number(row[i]) for row in rows[1:]) for i in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, are_numbers, strict=True)
        ).rstrip()
        for row in rows
    ]


def _is_number(cell: str) -> bool:
    return cell.strip("-0123456789,.%") == ""


def size_text(size: float) -> str:
    """Return a number of bytes: "640 bytes", "1.5 MB"."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return pluralise(round(size), "byte")
