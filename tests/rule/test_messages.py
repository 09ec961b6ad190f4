"""Error messages: their keys are stable and well formed, and a golden file shows their texts."""

from __future__ import annotations

import re

import pytest

from tests.messages import COMMAND, FILE, Message, golden_lines, messages

KEY = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\.[a-z0-9]+(-[a-z0-9]+)*")
COMPUTED = re.compile(r"\{[^{}]*\}")


@pytest.fixture(scope="session")
def source_messages() -> list[Message]:
    """All errors of the source, which takes a second to parse."""
    return messages()


def test_the_golden_file_shows_the_messages_of_the_source(source_messages: list[Message]) -> None:
    golden = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    assert golden.splitlines() == golden_lines(source_messages), f"look, then rewrite: {COMMAND}"


def test_every_error_has_a_key_of_its_own(source_messages: list[Message]) -> None:
    assert not [message.place for message in source_messages if message.key == "todo.key"]


def test_keys_are_an_area_and_a_mistake_in_kebab_case(source_messages: list[Message]) -> None:
    """A part that the source computes counts as one word."""
    malformed = [
        f"{message.place} {message.key}"
        for message in source_messages
        if not KEY.fullmatch(COMPUTED.sub("x", message.key)) and message.key != "{key}"
    ]
    assert not malformed


def test_no_key_belongs_to_two_classes(source_messages: list[Message]) -> None:
    kinds: dict[str, set[str]] = {}
    for message in source_messages:
        if message.key not in ("todo.key", "{key}"):
            kinds.setdefault(message.key, set()).add(message.kind)
    assert not {key: names for key, names in kinds.items() if len(names) > 1}
