"""Write the tables of the pages about sites from the profiles: docs/sites.md and docs/sites/*.md.

    python docs/generate_sites.py

Invariant: only the lines between the two marks of a page are written; the others are by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from docstrings import cell, field_texts

from dtrain.schema import load_toml, snake, toml_text
from dtrain.slurm.site import SITES, Site, site_names

DOCS = Path(__file__).parent
BEGIN = "<!-- From the profiles, by docs/generate_sites.py: do not edit. -->"
END = "<!-- End of the written lines. -->"
WRITTEN = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.S)

PROSE = ("description", "tested")
"""Keys that stand above the table."""


def profile_lines(name: str) -> list[str]:
    """Return the contents of a profile as Markdown."""
    profile = load_toml(SITES / f"{name}.toml", "site profile")
    texts = field_texts(Site)
    lines = [f"Tested: {profile['tested']}.", "", "| key | value | meaning |", "|---|---|---|"]
    for key, value in profile.items():
        if key not in PROSE:
            lines.append(f"| `{key}` | `{_value(value)}` | {cell(texts[snake(key)])} |")
    return lines


def _value(value: Any) -> str:
    return toml_text(value).replace("|", "\\|")


def overview_lines() -> list[str]:
    """Return the table of all profiles."""
    lines = ["| profile | machine | tested |", "|---|---|---|"]
    for name in site_names():
        profile = load_toml(SITES / f"{name}.toml", "site profile")
        cells = f"[{name}](sites/{name}.md)", profile["description"], profile["tested"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pages() -> dict[Path, str]:
    """Return the text of every page, with the written lines as the profiles have them."""
    written = {DOCS / "sites" / f"{name}.md": profile_lines(name) for name in site_names()}
    written[DOCS / "sites.md"] = overview_lines()
    return {path: _fill(path, lines) for path, lines in written.items()}


def _fill(path: Path, lines: list[str]) -> str:
    """Return a page with other written lines."""
    text = "\n".join([BEGIN, "", *lines, "", END])
    page, count = WRITTEN.subn(lambda _: text, path.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{path} needs the lines {BEGIN} and {END} once")
    return page


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
