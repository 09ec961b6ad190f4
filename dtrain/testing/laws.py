"""Laws, the check of a strategy against a list of them, and its report.

Invariant: a law holds, is broken with figures, or does not apply for a reason; nothing passes
without one of the three.
"""

from __future__ import annotations

import copy
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dtrain.comm.call_order import CollectiveMismatch
from dtrain.config.strategies import BASES, BUILT_IN, name_strategy, read_strategy
from dtrain.errors import ConfigError, DtrainError, HangError

SubjectT = TypeVar("SubjectT")


class BrokenLaw(Exception):
    """Figures that break the law that is being tested."""


@dataclass(frozen=True)
class Law(Generic[SubjectT]):
    """One law of a kind of strategies.

    Attributes
    ----------
    name : str
        One or two words in kebab-case; the key of the error is ``law.<name>``.
    statement : str
        What holds, as a sentence without a full stop.
    causes : str
        What usually breaks it, and the cure.
    test : callable
        Returns None where the law holds, or the reason for which it does not apply; raises
        `BrokenLaw` with the figures.
    """

    name: str
    statement: str
    causes: str
    test: Callable[[SubjectT], str | None]


class LawError(DtrainError, AssertionError):
    """A strategy breaks a law.

    Attributes
    ----------
    law : str
        The name of the law; `key` is ``law.<name>``.
    """

    def __init__(self, key: str, message: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(key, message, on_all_ranks=on_all_ranks)
        self.law = key.removeprefix("law.")


@dataclass(frozen=True)
class LawReport:
    """The laws that a strategy was checked against; its text lists them.

    Attributes
    ----------
    subject : str
        The strategy.
    held : dict of str to str
        The laws that hold: statements by name.
    not_applicable : dict of str to str
        The laws that do not apply: reasons by name.
    """

    subject: str
    held: Mapping[str, str]
    not_applicable: Mapping[str, str]

    def __str__(self) -> str:
        width = max(map(len, [*self.held, *self.not_applicable]), default=0)
        lines = [f"{self.subject}: {len(self.held)} laws hold"]
        lines += _list_items(self.held, width)
        if self.not_applicable:
            lines += ["do not apply:", *_list_items(self.not_applicable, width)]
        return "\n".join(lines)


CALLS: Law[Any] = Law(
    "calls",
    "all ranks make the same collective calls, and every message is received",
    "a collective call, or a message, that depends on the rank, on its samples or on the time; a "
    "route that one end does not serve",
    lambda subject: None,
)
"""The law that every training tests."""


def check_laws(subject_name: str, laws: Sequence[Law[SubjectT]], subject: SubjectT) -> LawReport:
    """Test a strategy against laws, in their order, and return the report.

    Raises
    ------
    LawError
        The first law that is broken.
    """
    held, not_applicable = {CALLS.name: CALLS.statement}, {}
    for law in laws:
        try:
            with _unchanged_process():
                reason = law.test(subject)
        except BrokenLaw as broken:
            raise law_error(subject_name, law, str(broken)) from broken.__cause__
        except (HangError, CollectiveMismatch) as error:
            raise law_error(subject_name, CALLS, str(error)) from error
        except LawError:
            raise
        except Exception as error:
            error.add_note(f"[{subject_name}, law '{law.name}': {law.statement}]")
            raise
        if reason is None:
            held[law.name] = law.statement
        else:
            not_applicable[law.name] = reason
    return LawReport(subject_name, held, not_applicable)


def law_error(subject_name: str, law: Law[Any], figures: str) -> LawError:
    """Return the error of a strategy that breaks a law."""
    return LawError(
        f"law.{law.name}",
        f"{subject_name} breaks the law '{law.name}': {law.statement}\n"
        f"  found: {figures}\n  usual cause: {law.causes}",
    )


def load_strategy(section: str, strategy: object) -> tuple[str, Any]:
    """Return name and instance of a strategy: an instance, a class, or a name of either.

    Parameters
    ----------
    section : str
        "objective", "schedule" or "sync".
    strategy : Strategy, type or str
        A class is instantiated with its defaults; a name is one word of a run file, or
        "module:Class".

    Raises
    ------
    ConfigError
        It is no strategy of the section, or the name is unknown.
    """
    if isinstance(strategy, str):
        with _unchanged_process():
            named = read_strategy(section, {"name": strategy}, Path.cwd())
        return f"{section} {named.name}", named.instance
    base = BASES[section]
    instance = strategy() if isinstance(strategy, type) else strategy
    if not isinstance(instance, base):
        raise ConfigError(
            "testing.no-strategy",
            f"{instance!r} is no {section}: give an instance of a class that is derived from "
            f"{base.__module__}.{base.__name__}",
        )
    name = name_strategy(section, instance).name
    text = name if name in BUILT_IN[section] else repr(instance)
    return f"{section} {text}", copy.deepcopy(instance)


def require_equal(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: tuple[str, str]
) -> None:
    """Raise `BrokenLaw` unless two sets of tensors are the same bits.

    Parameters
    ----------
    names : tuple of str
        Of both sets, as in "1 rank".
    """
    _require_same_names(one, other, names)
    different = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    if different:
        raise BrokenLaw(_difference(one, other, different, names))


def require_close(
    one: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    names: tuple[str, str],
    rtol: float = 1e-9,
    atol: float = 1e-11,
) -> None:
    """Raise `BrokenLaw` unless two sets of tensors are the same up to rounding."""
    _require_same_names(one, other, names)
    different = [
        name
        for name, tensor in one.items()
        if not torch.allclose(tensor, other[name], rtol=rtol, atol=atol, equal_nan=True)
    ]
    if different:
        raise BrokenLaw(_difference(one, other, different, names))


def _require_same_names(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: tuple[str, str]
) -> None:
    difference = sorted(one.keys() ^ other.keys())
    if difference:
        raise BrokenLaw(f"only one of {' and '.join(names)} has {', '.join(difference[:4])}")
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            shapes = tuple(tensor.shape), tuple(other[name].shape)
            raise BrokenLaw(
                f"'{name}' has shape {shapes[0]} with {names[0]}, {shapes[1]} with {names[1]}"
            )


def _difference(
    one: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    different: Sequence[str],
    names: tuple[str, str],
) -> str:
    """Return the largest difference of two sets of tensors as a sentence."""
    distances = {
        name: float((one[name].double() - other[name].double()).abs().max())
        for name in different
        if not one[name].is_complex()
    }
    name = max(distances, key=lambda key: distances[key], default=different[0])
    scale = float(one[name].abs().double().max())
    return (
        f"{len(different)} of {len(one)} tensors differ between {names[0]} and {names[1]}, "
        f"'{name}' by {distances.get(name, float('nan')):.2g} (its largest number is {scale:.2g})"
    )


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Compute with one thread of torch, and restore what a run changes in this process."""
    threads, path, state = torch.get_num_threads(), list(sys.path), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        sys.path[:] = path


def _list_items(items: Mapping[str, str], width: int) -> list[str]:
    """Return one entry per item, wrapped, with the names in a column."""
    return [
        textwrap.fill(
            text,
            width=100,
            initial_indent=f"  {name:<{width}}  ",
            subsequent_indent=" " * (width + 4),
        )
        for name, text in items.items()
    ]
