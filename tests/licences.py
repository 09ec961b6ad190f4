"""Licences of the packages that dtrain installs: `make licences`.

Invariant: reads what is installed here; needs no network. A package that is not installed is named.

The packages are those of `install_requires` and of all extras, and the packages that these require.
A licence of the GPL family would decide under which licence dtrain may be passed on, so it is an
error, unless the package offers another licence or `REVIEWED` has the reason.
"""

from __future__ import annotations

import configparser
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

SETUP = Path(__file__).parents[1] / "setup.cfg"

COPYLEFT = re.compile(r"\b(?:A|L)?GPL|GNU (?:Affero|Lesser|Library|General)", re.I)

EXCEPTION = re.compile(r"[\w.+-]*GPL[\w.+-]* WITH [\w.-]*exception[\w.-]*", re.I)
"""A licence whose exception allows use in programs of any licence."""

REVIEWED = {
    "docutils": "one editor mode, which is not installed, has the GPL; the rest is public or BSD",
}
"""Packages whose metadata name a licence of the GPL family, and why they may be used."""


def requirements() -> list[str]:
    """Return the names of the packages that setup.cfg lists."""
    config = configparser.ConfigParser()
    config.read(SETUP, encoding="utf-8")
    extras = config["options.extras_require"]
    lines = [config["options"]["install_requires"], *extras.values()]
    return sorted({_name(line) for text in lines for line in text.splitlines() if line.strip()})


def _name(requirement: str) -> str:
    """Return the normalised name of a requirement."""
    [name] = re.findall(r"^[\w.-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", str(name)).lower()


def closure(names: Iterable[str]) -> dict[str, str | None]:
    """Return the licences of packages and of all that they require; None: not installed."""
    licences: dict[str, str | None] = {}
    pending = [*names]
    while pending:
        name = pending.pop()
        if name in licences:
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            licences[name] = None
            continue
        licences[name] = licence_text(package.metadata)
        needs = [need for need in package.requires or () if "extra ==" not in need]
        pending += [_name(need) for need in needs if is_installed(_name(need))]
    return dict(sorted(licences.items()))


def is_installed(name: str) -> bool:
    """Return whether a package is installed; a need of another platform is not."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def licence_text(package: metadata.PackageMetadata) -> str:
    """Return the licence that the metadata of a package state."""
    if package["License-Expression"]:
        return str(package["License-Expression"])
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in package.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    first_line = (package["License"] or "").strip().partition("\n")[0]
    return "; ".join(filter(None, [*classifiers, first_line])) or "unknown"


def is_copyleft(licence: str) -> bool:
    """Return whether a licence is of the GPL family, without an alternative."""
    choices = re.split(r"\bOR\b", EXCEPTION.sub("", licence))
    return all(COPYLEFT.search(choice) for choice in choices)


def problems(licences: dict[str, str | None]) -> list[str]:
    """Return the packages whose licence forbids their use, and those that state none."""
    return [
        f"{name}: {licence}"
        for name, licence in licences.items()
        if licence is not None
        and name not in REVIEWED
        and (is_copyleft(licence) or licence == "unknown")
    ]


def main() -> int:
    """Print the licence of every package."""
    licences = closure(requirements())
    for name, licence in licences.items():
        print(f"{name:28} {licence or 'not installed here'}")
    found = problems(licences)
    print(f"{len(licences)} packages, {len(found)} with a licence to look at")
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
