"""Names of arrays in a file that holds several: which of them are inputs and targets of a split.

===================  ====================================================
a file of its own    those that the run file gives for all splits
either               the same with "test" in place of "train"
either               where the run file gives none: those of `LAYOUTS`
===================  ====================================================

The first ones that the file has are taken. Names that a run file gives for the split have
precedence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

DEFAULT_NAMES = ("x", "y")


LAYOUTS = (
    *(("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_x", "{}_y"), ("{}/x", "{}/y")),
    *(("{}_images", "{}_labels"), ("{}/images", "{}/labels")),
)
"""Usual names of inputs and targets; `{}` is the split."""


SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test",),
    "validation": ("validation", "valid", "val"),
}
"""Usual names of the splits."""


MOST_LISTED = 8


class SplitNames(NamedTuple):
    """The arrays of one split: those of the inputs, and that of the targets."""

    inputs: tuple[str, ...]
    targets: str


@dataclass(frozen=True)
class NameRules:
    """The names that a run file gives.

    Attributes
    ----------
    inputs, targets
        Names for every split.
    own : mapping
        Names for one split, in place of them: (inputs, targets), each None where there is none.
    """

    inputs: tuple[str, ...]
    targets: str
    own: Mapping[str, tuple[tuple[str, ...] | None, str | None]]

    def find(
        self, split: str, has: Callable[[str], bool], *, is_shared: bool, needs_targets: bool
    ) -> SplitNames | None:
        """Return the names of a split in a file that `has` some, None where it lacks them.

        Parameters
        ----------
        is_shared : bool
            Whether the file is that of the training split.
        """
        for names in self._candidates(split, is_shared, needs_targets):
            if all(map(has, _needed(names, needs_targets))):
                return names
        return None

    def first(self, split: str, *, is_shared: bool, needs_targets: bool) -> list[str]:
        """Return the names that a split should have, for an error."""
        names = next(self._candidates(split, is_shared, needs_targets), None)
        return [] if names is None else _needed(names, needs_targets)

    def _candidates(self, split: str, is_shared: bool, needs_targets: bool) -> Iterator[SplitNames]:
        """Yield the names that a split may have, the most likely ones first."""
        own_inputs, own_targets = self.own.get(split, (None, None))
        for names in self._usual_names(split, is_shared):
            inputs = own_inputs or names.inputs
            targets = own_targets or names.targets
            is_training = inputs == self.inputs or (needs_targets and targets == self.targets)
            if not (is_shared and is_training):
                yield SplitNames(inputs, targets)

    def _usual_names(self, split: str, is_shared: bool) -> Iterator[SplitNames]:
        words = SPLIT_WORDS[split]
        if not is_shared:
            yield SplitNames(self.inputs, self.targets)
        for word in words:
            inputs = tuple(_replace_split(name, word) for name in self.inputs)
            yield SplitNames(inputs, _replace_split(self.targets, word))
        if (*self.inputs, self.targets) == DEFAULT_NAMES:
            for word in words:
                for x, y in LAYOUTS:
                    yield SplitNames((x.format(word),), y.format(word))


def _needed(names: SplitNames, needs_targets: bool) -> list[str]:
    return [*names.inputs, names.targets] if needs_targets else [*names.inputs]


def _replace_split(name: str, word: str) -> str:
    """Return a name of the training split with another split's word."""

    def replace(match: re.Match[str]) -> str:
        return word.capitalize() if match[0][0].isupper() else word

    return re.sub("[Tt]rain(ing)?", replace, name)


def list_arrays(shapes: Mapping[str, tuple[int, ...]], wanted: Sequence[str]) -> str:
    """Return the part of an error that says which names there are: all with shapes, the closest."""
    if not shapes:
        return "no array"
    listed = [f"{name} {shape}" for name, shape in [*shapes.items()][:MOST_LISTED]]
    more = f" and {len(shapes) - MOST_LISTED} more" if len(shapes) > MOST_LISTED else ""
    close = [match for name in wanted if (match := closest(name, shapes)) is not None]
    hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
    return f"{', '.join(listed)}{more}{hint}"


def closest(name: str, names: Sequence[str] | Mapping[str, object]) -> str | None:
    """Return the name that is most like another one, as a whole or without its groups."""
    short = {each.rpartition("/")[2].lower(): each for each in names}
    whole = difflib.get_close_matches(name, [*names], 1)
    last = difflib.get_close_matches(name.rpartition("/")[2].lower(), [*short], 1)
    return whole[0] if whole else short[last[0]] if last else None
