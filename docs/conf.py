"""Settings of Sphinx for the documentation site: `make docs`. It needs no network."""

import re
from typing import Any

project = "dtrain"
author = "the dtrain developers"
copyright = "2026, the dtrain developers"

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True

# Titles are anchors, as on code hosts; titles in other pages are checked, too.
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page may start a table of contents at its second level

smartquotes = False  # texts in quotes are values

html_theme = "furo"
html_title = "dtrain"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

OUTSIDE = re.compile(r"\]\((\.\./[^)#]*\.md)(#[^)]*)?\)")
"""Links to Markdown files beside `docs/`: the site offers them as files."""


def link_outside(app: Any, page: str, source: list[str]) -> None:
    """Mark the links of a page to Markdown files that are no pages of the site."""
    source[0] = OUTSIDE.sub(r"](path:\1)", source[0])


def setup(app: Any) -> None:
    """Register the hook."""
    app.connect("source-read", link_outside)


# Prompts and programs' output are not in a language that can be coloured.
highlight_language = "none"
