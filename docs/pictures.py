"""Draw the pictures of docs/concepts.md: the mesh, blocks, schedules and syncs.

    python docs/pictures.py    writes docs/mesh.svg, blocks.svg, schedules.svg and syncs.svg

Invariant: the timelines are those of proven plans; the same code draws the same files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dtrain.config.parse import parse_run
from dtrain.planning.plan import make_plan
from dtrain.schedules.simulator import Span

DOCS = Path(__file__).parent

BLUE, LIGHT, GREEN, RED, GREY, ORANGE = (
    *("#2a6f97", "#a9cfe5", "#7fb069"),
    *("#c1121f", "#666666", "#e09f3e"),
)


class Drawing:
    """The elements of an SVG file."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="13" '
            f'role="img"><title>{escape(title)}</title>'
        )
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" '
            f'fill="{colour}"/></marker>'
            for name, colour in (("forward", BLUE), ("back", RED), ("mean", GREEN))
        )
        self._lines = [f"<defs>{heads}</defs>", '<rect width="100%" height="100%" fill="white"/>']

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, text: str = "", **style: str
    ) -> None:
        """Add a rectangle with text in its middle."""
        extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
        self._lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}"{extra}/>'
        )
        if text:
            colour = "white" if fill in (BLUE, RED, GREY) else "black"
            self.text(x + w / 2, y + h / 2 + 4.5, text, colour, anchor="middle")

    def text(
        self, x: float, y: float, text: str, fill: str = "black", anchor: str = "start"
    ) -> None:
        """Add a line of text."""
        self._lines.append(
            f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def arrow(
        self, x: float, y: float, to_x: float, to_y: float, kind: str, both: bool = False
    ) -> None:
        """Add an arrow: "forward", "back" or "mean"."""
        colour = {"forward": BLUE, "back": RED, "mean": GREEN}[kind]
        start = f' marker-start="url(#{kind})"' if both else ""
        self._lines.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" '
            f'stroke-width="2" marker-end="url(#{kind})"{start}/>'
        )

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: str, **style: str) -> None:
        """Add a line."""
        extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
        self._lines.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}"{extra}/>'
        )

    def svg(self) -> str:
        """Return the text of the file."""
        return "\n".join([self._head, *self._lines, "</svg>"]) + "\n"


def mesh() -> str:
    """Draw six ranks as three stages of two replicas."""
    drawing = Drawing(700, 270, "A mesh of 2 replicas and 3 stages")
    for stage in range(3):
        drawing.text(190 + 190 * stage, 30, f"stage {stage}", anchor="middle")
    for replica in range(2):
        y = 50 + 110 * replica
        drawing.box(*(95, y - 8, 570, 66, "#f7f7f7"), stroke=GREY, stroke_dasharray="4 4", rx="6")
        drawing.text(10, y + 30, f"replica {replica}")
        for stage in range(3):
            x = 125 + 190 * stage
            drawing.box(x, y, 130, 50, LIGHT, f"rank {3 * replica + stage}", rx="4")
            if stage:
                drawing.arrow(x - 58, y + 25, x - 3, y + 25, "forward")
    for stage in range(3):
        x = 190 + 190 * stage
        drawing.arrow(x, 103, x, 157, "mean", both=True)
        drawing.text(x + 8, 134, f"mean of block {stage}", GREEN)
    drawing.arrow(20, 246, 60, 246, "forward")
    drawing.text(68, 250, "activations, per micro-batch")
    drawing.arrow(290, 246, 330, 246, "mean", both=True)
    drawing.text(338, 250, "sync of replicas")
    drawing.box(480, 236, 26, 18, "#f7f7f7", stroke=GREY, stroke_dasharray="4 4")
    drawing.text(514, 250, "a node: stages-in-node")
    return drawing.svg()


def blocks() -> str:
    """Draw layers, cuts, blocks and stages, with what travels in both ways of learning."""
    drawing = Drawing(700, 330, "Layers, blocks and stages")
    names, cuts, places = ("fc1", "fc2", "fc3", "fc4", "fc5", "head"), (2, 4), (0, 0, 1)
    for number, name in enumerate(names):
        drawing.box(100 + 96 * number, 20, 84, 34, LIGHT, name, rx="4")
    drawing.text(10, 42, "layers")
    for cut in cuts:
        x = 94 + 96 * cut
        drawing.line(x, 10, x, 112, RED, stroke_width="2", stroke_dasharray="5 4")
        drawing.text(x + 5, 70, "cut", RED)
    drawing.text(10, 100, "blocks")
    starts = (0, *cuts, len(names))
    for block in range(3):
        x, width = 100 + 96 * starts[block], 96 * (starts[block + 1] - starts[block]) - 12
        drawing.box(x, 80, width, 32, ORANGE, f"block {block}", rx="4")
    drawing.text(10, 148, "stages")
    for stage in range(2):
        first, count = places.index(stage), places.count(stage)
        drawing.box(100 + 192 * first, 128, 192 * count - 12, 32, GREY, f"stage {stage}", rx="4")
    _learning(drawing, 200, "local", "local learning: a loss in each block, nothing is sent back")
    _learning(drawing, 265, "global", "backpropagation: one loss, gradients are sent back")
    return drawing.svg()


def _learning(drawing: Drawing, y: float, kind: str, title: str) -> None:
    drawing.text(100, y - 6, title)
    drawing.text(10, y + 22, kind)
    for block in range(3):
        x = 100 + 192 * block
        has_loss = kind == "local" or block == 2
        drawing.box(x, y, 110, 34, ORANGE, "block" if not has_loss else "block + loss", rx="4")
        if block:
            drawing.arrow(x - 80, y + 12, x - 3, y + 12, "forward")
            if kind == "global":
                drawing.arrow(x - 3, y + 25, x - 80, y + 25, "back")


PLANS: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("stream (mono-forward)", {"objective": "mono-forward", "schedule": "stream"}),
    ("1f1b (backprop): ranks wait, no gradient is late", {"schedule": "1f1b"}),
    (
        "pipelined (backprop): ranks do not wait, gradients are late",
        {"schedule": "pipelined", "micro-batches": 1, "batch-size": 4},
    ),
)
"""The title and the keys of each timeline."""

STAGES, WINDOW, UNIT = 3, 24, 23
"""Ranks of a timeline, its length in units, and the pixels of a unit."""


def schedules() -> str:
    """Draw the planned timelines of three schedules on one scale."""
    drawing = Drawing(90 + WINDOW * UNIT + 20, 430, "Timelines of three schedules")
    for row, (title, keys) in enumerate(PLANS):
        y = 36 + 128 * row
        drawing.text(90, y - 12, title)
        for stage in range(STAGES):
            drawing.box(90, y + 28 * stage, WINDOW * UNIT, 24, "#f2f2f2")
            drawing.text(12, y + 28 * stage + 17, f"stage {stage}")
        _bars(drawing, y, _timeline(keys))
    for x, colour, label in ((90, LIGHT, "forward"), (200, BLUE, "backward")):
        drawing.box(x, 404, 16, 16, colour)
        drawing.text(x + 24, 417, label)
    drawing.box(310, 404, 4, 16, RED)
    drawing.text(324, 417, "update (optimizer step); numbers: micro-batches")
    return drawing.svg()


def _timeline(keys: Mapping[str, Any]) -> Iterable[Span]:
    """Return the planned actions of a run of three blocks on three stages."""
    table = {
        "epochs": 1,
        "batch-size": keys.get("batch-size", 16),
        "micro-batches": keys.get("micro-batches", 4),
        "data": {"name": "digits"},
        "model": {"name": "mlp", "widths": [32, 32]},
        "mesh": {"stages": STAGES},
        "objective": {"name": keys.get("objective", "backprop")},
        "schedule": {"name": keys["schedule"]},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    return make_plan(parse_run(table, DOCS / "picture.toml"), STAGES).proof.timeline


def _bars(drawing: Drawing, top: float, timeline: Iterable[Span]) -> None:
    """Draw the actions that begin in the window; micro-batches are counted over updates."""
    spans = sorted(timeline, key=lambda span: (span.start, span.stage))
    counts: dict[tuple[int, str], int] = {}
    marks: list[tuple[float, float]] = []
    for span in spans:
        kind, y = span.action.kind, top + 28 * span.stage
        x = 90 + UNIT * span.start
        if span.start > WINDOW or (span.end > WINDOW and kind != "U"):
            continue
        if kind == "U":
            marks.append((min(x, 88 + UNIT * WINDOW) - 2, y - 2))
            continue
        number = counts[span.stage, kind] = counts.get((span.stage, kind), -1) + 1
        colour = LIGHT if kind == "F" else BLUE
        width = UNIT * (span.end - span.start)
        drawing.box(x, y, width, 24, colour, f"{number}", stroke="white")
    for x, y in marks:
        drawing.box(x, y, 4, 28, RED)


def syncs() -> str:
    """Draw when two replicas on two nodes average, for three syncs."""
    drawing = Drawing(700, 400, "When replicas average")
    rows = (
        ("every-step: gradients, in each update", 1),
        ("local-sgd, every = 4: parameters, after 4 local updates", 4),
        ("daso: parameters are sent, their mean is merged later", 0),
    )
    for row, (title, every) in enumerate(rows):
        top = 40 + 120 * row
        drawing.text(110, top - 12, title)
        for replica in range(2):
            y = top + 50 * replica
            drawing.text(12, y + 17, f"replica {replica}")
            for update in range(9):
                drawing.box(110 + 62 * update, y, 50, 26, LIGHT, f"{update}", rx="4")
        for update in range(9):
            x = 135 + 62 * update
            if every and (update + 1) % every == 0:
                drawing.arrow(x, top + 29, x, top + 48, "mean", both=True)
            if not every and update in (1, 5):
                for replica in range(2):
                    edge = (top + 29, top + 48)[replica]
                    drawing.arrow(x, edge, x + 54, top + 38.5, "mean")
                    drawing.arrow(x + 70, top + 38.5, x + 122, edge, "mean")
                drawing.box(x + 54, top + 32, 16, 13, GREEN)
    drawing.arrow(110, 382, 150, 382, "mean", both=True)
    drawing.text(160, 387, "a mean that ranks wait for")
    drawing.box(360, 375, 16, 13, GREEN)
    drawing.text(386, 387, "a mean that is computed beside updates")
    return drawing.svg()


def pictures() -> dict[Path, str]:
    """Return the text of every picture."""
    drawings = {"mesh": mesh, "blocks": blocks, "schedules": schedules, "syncs": syncs}
    return {DOCS / f"{name}.svg": draw() for name, draw in drawings.items()}


if __name__ == "__main__":
    for path, text in pictures().items():
        path.write_text(text, encoding="utf-8")
