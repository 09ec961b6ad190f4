"""`numbers_in(warning)`: assert the numbers of a warning, not its words."""

from __future__ import annotations

import re


def numbers_in(text: str) -> set[str]:
    """Return all numbers of a text as they are written, as in "1,000" or "0.5"."""
    return set(re.findall(r"\d[\d.,]*\d|\d", text))
