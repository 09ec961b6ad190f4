"""Findings as data, and their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final

from dtrain.errors import DtrainError

Severity = Literal["ok", "note", "problem"]


@final
@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth a look.

    Attributes
    ----------
    key : str
        Stable name, "area.what" in kebab-case; that of the error by which `dtrain train` refuses,
        where it does.
    severity : "ok", "note" or "problem"
        A problem makes the exit code 1.
    what : str
        The facts.
    cure : str
        The thing to do.
    """

    key: str
    severity: Severity
    what: str
    cure: str = ""


def finding_of(error: DtrainError) -> Finding:
    """Return the finding of an error by which dtrain refuses."""
    what, _, cure = error.message.rpartition(": ")
    return Finding(error.key, "problem", what or cure, cure if what else "")


@final
@dataclass(frozen=True)
class Area:
    """The findings of one area, and a line with its facts."""

    name: str
    summary: str
    findings: Sequence[Finding] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def has_problem(areas: Sequence[Area]) -> bool:
    """Return whether any finding is a problem."""
    return any(finding.severity == "problem" for area in areas for finding in area.findings)


def report_text(areas: Sequence[Area], advice: Sequence[str] = ()) -> str:
    """Return a line per area, then the findings with their cures, then the advice."""
    lines = [f"{area.name:<11}{area.summary}" for area in areas if area.summary]
    findings = [finding for area in areas for finding in area.findings]
    for severity in ("problem", "note"):
        for finding in (finding for finding in findings if finding.severity == severity):
            lines += ["", f"{severity:<11}{finding.what} [{finding.key}]"]
            lines += [f"{'':<11}-> {finding.cure}"] if finding.cure else []
    if advice:
        lines += ["", *advice]
    if not has_problem(areas):
        lines += ["", "No problem found."]
    return "\n".join(lines).strip("\n")


def report_table(areas: Sequence[Area], advice: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the report as plain values."""
    return {
        "ok": not has_problem(areas),
        "areas": [asdict(area) for area in areas],
        "advice": advice,
    }


def area_from_table(table: Mapping[str, Any]) -> Area:
    """Return the area of its plain values."""
    findings = [Finding(**finding) for finding in table["findings"]]
    return Area(table["name"], table["summary"], findings, table["facts"])
