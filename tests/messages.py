"""The golden file of error messages: `python -m tests.messages --write` reads them from the source.

Each line of `tests/messages.txt` is `Class key: text`, sorted by key; `{...}` is an expression of
the source. An error that `unknown_name` makes has the key that is given there, or `<kind>.unknown`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "messages.txt"
ERRORS = (
    *("ConfigError", "DataError", "NumericalError", "CheckpointError"),
    *("HangError", "RankLostError"),
)
COMMAND = "python -m tests.messages --write"


class Message(NamedTuple):
    """One error of the source.

    Attributes
    ----------
    key : str
        With `{...}` where the source computes it.
    place : str
        File and line of the source, for the reader of a failing test.
    """

    key: str
    kind: str
    text: str
    place: str

    @property
    def line(self) -> str:
        """The line of the golden file."""
        return f"{self.kind} {self.key}: {self.text}"


def messages() -> list[Message]:
    """Return all errors of the source, sorted by key."""
    paths = set((ROOT / "dtrain").rglob("*.py")) - {ROOT / "dtrain" / "errors.py"}
    return sorted(message for path in paths for message in _messages_of(path))


def golden_lines(messages: Sequence[Message]) -> list[str]:
    """Return the lines of the golden file, as the source has them."""
    return list(dict.fromkeys(message.line for message in messages))


def _messages_of(path: Path) -> Iterator[Message]:
    """Yield the errors that a file makes, and those of `unknown_name` that it raises or returns."""
    name = path.relative_to(ROOT)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Call(func=ast.Name(id=kind), args=[key, text, *_]) if kind in ERRORS:
                yield Message(_text(key), kind, _text(text), f"{name}:{node.lineno}")
            case ast.Raise(exc=ast.Call() as call) | ast.Return(value=ast.Call() as call):
                if isinstance(call.func, ast.Name) and call.func.id == "unknown_name":
                    yield _unknown_name(call, f"{name}:{node.lineno}")


def _unknown_name(call: ast.Call, place: str) -> Message:
    """Return the error of a call of `unknown_name`."""
    kind, name = (_text(argument) for argument in call.args[:2])
    keys = [_text(keyword.value) for keyword in call.keywords if keyword.arg == "key"]
    key = keys[0] if keys else f"{kind.replace(' ', '-')}.unknown"
    return Message(key, "ConfigError", f"unknown {kind} '{name}'", place)


def _text(node: ast.expr) -> str:
    """Return a text of the source, with `{...}` for what it computes."""
    match node:
        case ast.Constant(value=str(text)):
            return text.replace("\n", "\\n")
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.FormattedValue(value=value):
            return "{" + " ".join(ast.unparse(value).split()) + "}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case _:
            return "{" + " ".join(ast.unparse(node).split()) + "}"


if __name__ == "__main__":
    text = "".join(f"{line}\n" for line in golden_lines(messages()))
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
