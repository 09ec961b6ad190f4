"""Write the reference pages from the code: docs/reference-run-file.md and docs/reference-api.md.

    python docs/generate_reference.py

Invariant: the pages depend on the code alone, not on the versions of other packages.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))

from docstrings import Docstring, cell, field_texts, markdown, parse

import dtrain
from dtrain.block.lr_schedule import LR_SCHEDULES
from dtrain.config import sections
from dtrain.data import DATASETS
from dtrain.models import MODELS
from dtrain.objectives import OBJECTIVES
from dtrain.schedules import SCHEDULES
from dtrain.schema import TOML_TYPES, kebab, toml_text
from dtrain.syncs import SYNCS
from dtrain.tasks.task import Task
from dtrain.tracking import TRACKERS

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/generate_reference.py from the code: do not edit. -->\n"

Tables = Iterable[tuple[str, type | None, str]]

SECTIONS: Tables = (
    ("Keys outside any table", sections.RunSection, "[training](training.md)"),
    ("[data]", sections.DataSection, "[data](data.md)"),
    ("[task]", None, "[tasks](tasks.md)"),
    ("[model]", sections.ModelSection, "[models](models.md)"),
    ("[mesh]", sections.Mesh, "[concepts](concepts.md#mesh)"),
    ("[partition]", sections.Partition, "[partitioning](partitioning.md)"),
    ("[objective]", None, "[objectives](objectives.md)"),
    ("[schedule]", None, "[schedules](schedules.md)"),
    ("[sync]", None, "[communication](communication.md)"),
    ("[optimizer]", sections.OptimizerSection, "[training](training.md#choose-the-optimizer)"),
    ("[lr]", None, "[training](training.md#schedule-the-learning-rate)"),
    ("[checkpoint]", sections.Checkpoint, "[training](training.md#keep-the-best-weights)"),
    ("[evaluate]", sections.Evaluate, "[training](training.md#evaluate-during-the-run)"),
    ("[stop]", sections.Stop, "[training](training.md#stop-early)"),
    ("[ema]", sections.Ema, "[training](training.md#average-the-weights)"),
    ("[log]", sections.Log, "[monitoring](monitoring.md)"),
    ("[numerics]", sections.Numerics, "[training](training.md#losses-that-are-not-finite)"),
    ("[timeouts]", sections.Timeouts, "[faults](faults.md#a-run-that-hangs)"),
    ("[sweep]", None, "[sweeps](sweeps.md)"),
)
"""The tables of a run file, with the class of the keys that every strategy has, and the page."""

STRATEGIES: Mapping[str, tuple[str, Mapping[str, type]]] = {
    "[data]": ("no default", DATASETS),
    "[model]": ("no default", MODELS),
    "[objective]": ('default `"mono-forward"`', OBJECTIVES),
    "[schedule]": ("default: that of the objective", SCHEDULES),
    "[sync]": ('default `"every-step"`', SYNCS),
    "[lr]": ('default `"constant"`', LR_SCHEDULES),
}

REMARKS = {
    "[task]": "All other keys are the arguments of the loss class of `torch.nn`.",
    "[optimizer]": (
        "`name` has no default: an optimizer of `torch.optim` in lower case. All other keys are "
        "the arguments of its class. The table `[optimizer.rest]` is a second optimizer, for the "
        "parameters that are no matrices."
    ),
    "[log]": f"Names of trackers: {', '.join(f'`{name}`' for name in TRACKERS)}.",
    "[stop]": "Without this table no run stops early.",
    "[ema]": "Without this table no weights are averaged.",
    "[sweep]": (
        'Each key is a key of the run, with a list of values, or `"A..B"` for whole numbers; all '
        "combinations are trained."
    ),
}

WITHOUT_MEMBERS = ("Task",)
"""Classes whose methods only dtrain itself calls."""

LONGEST_DEFAULT = 40
"""Characters of a default in a signature."""

WRAPPED = "table `[sync.inner]`: the wrapped sync, with its `name` and keys"


# ---- the reference of run files


def run_file_page() -> str:
    """Return the page of all keys of a run file."""
    lines = [
        NOTE,
        "# Run-file reference",
        "",
        "This page lists every table and key of a run file, with its values and its default. It is",
        "written from the code. A key without a default is left out by default. Every name of a",
        'strategy may also be `"module:Class"` or `"module:function"` of your own.',
        "",
    ]
    for title, kind, page in SECTIONS:
        lines += _section(title, kind, page)
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, kind: type | None, page: str) -> Iterator[str]:
    """Yield the lines of one table of a run file."""
    yield from (f"## {_code(title)}", "", f"More: {page}.", "")
    if title in REMARKS:
        yield from (REMARKS[title], "")
    if title == "[task]":
        yield from _task_rows()
    if kind is not None:
        yield from _key_table(kind)
    if title in STRATEGIES:
        default, strategies = STRATEGIES[title]
        yield from (f"`name`, {default}:", "")
        for name, strategy in strategies.items():
            yield from _strategy(title, name, strategy)


def _code(title: str) -> str:
    return f"`{title}`" if title.startswith("[") else title


def _strategy(title: str, name: str, kind: type) -> Iterator[str]:
    """Yield the lines of one strategy."""
    yield from (f"### `{title[1:-1]}`: `{name}`", "", markdown(parse(kind.__doc__).summary), "")
    if dataclasses.fields(kind):
        yield from _key_table(kind)


def _key_table(kind: type) -> Iterator[str]:
    """Yield the table of the fields of a class."""
    hints, texts = typing.get_type_hints(kind), field_texts(kind)
    yield from ("| key | values | default | meaning |", "|---|---|---|---|")
    for field in dataclasses.fields(kind):
        if field.init:
            default, values = _default(field), values_text(hints[field.name])
            text = WRAPPED if field.name == "inner" else cell(texts.get(field.name, ""))
            yield f"| `{kebab(field.name)}` | {values} | {default} | {text} |"
    yield ""


def _task_rows() -> Iterator[str]:
    """Yield the table of the keys of `[task]`, which are arguments of `Task`."""
    parameters, texts = inspect.signature(Task).parameters, field_texts(Task)
    yield from ("| key | default | meaning |", "|---|---|---|")
    for name, parameter in parameters.items():
        if name in ("folder", "fields"):
            continue
        default = "" if parameter.default is None else f"`{toml_text(parameter.default)}`"
        yield f"| `{kebab(name)}` | {default} | {cell(texts[name])} |"
    yield ""


def _default(field: dataclasses.Field[Any]) -> str:
    """Return the default of a field as a run file has it."""
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else "every-step"
    return "" if field.default is None else f"`{toml_text(field.default)}`"


def values_text(hint: Any) -> str:
    """Return the values of a type that a run file can have."""
    return ", ".join(dict.fromkeys(_value_texts(hint)))


def _value_texts(hint: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for part in arguments:
            yield from _value_texts(part)
    elif origin is Literal:
        yield from (f"`{toml_text(value)}`" for value in arguments)
    elif origin is tuple:
        yield f"a list (each: {values_text(arguments[0])})"
    elif origin is dict:
        yield "a table"
    elif hint in TOML_TYPES:
        yield TOML_TYPES[hint]


# ---- the reference of the Python API


def api_page() -> str:
    """Return the page of all names of `import dtrain`."""
    values = {name: getattr(dtrain, name) for name in dtrain.__all__}
    lines = [
        NOTE,
        "# Python API reference",
        "",
        "This page lists the names of `import dtrain` with their docstrings. It is written from",
        "the code. [The Python API](python.md) shows how to use them.",
        "",
    ]
    groups = {
        "Functions": [n for n, v in values.items() if inspect.isfunction(v)],
        "Classes": [n for n, v in values.items() if inspect.isclass(v) and not _is_error(v)],
        "Errors": [n for n, v in values.items() if inspect.isclass(v) and _is_error(v)],
        "Modules": [n for n, v in values.items() if inspect.ismodule(v)],
    }
    for title, names in groups.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += _entry(name, values[name])
    return "\n".join(lines).rstrip() + "\n"


def _is_error(kind: type) -> bool:
    return issubclass(kind, BaseException)


def _entry(name: str, value: Any) -> Iterator[str]:
    """Yield the lines of one public name."""
    yield from (f"### `{name}`", "")
    if inspect.ismodule(value):
        yield from _module(name, value)
        return
    yield from ("```", *_signature(f"dtrain.{name}", value), "```", "")
    yield from _docstring(parse(value.__doc__))
    if inspect.isclass(value) and not _is_error(value):
        for member_name, member in () if name in WITHOUT_MEMBERS else _members(value):
            yield from _member(name, member_name, member)


def _signature(name: str, value: Any) -> list[str]:
    """Return the call of a function or class, on several lines where it is long."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        return [name]
    words = [_argument(each) for each in parameters if each.name != "self"]
    markers = [each.kind for each in parameters if each.name != "self"]
    if inspect.Parameter.KEYWORD_ONLY in markers and "VAR" not in str(markers[0]):
        words.insert(markers.index(inspect.Parameter.KEYWORD_ONLY), "*")
    line = f"{name}({', '.join(words)})"
    if len(line) <= 88:
        return [line]
    return [f"{name}(", *(f"    {word}," for word in words), ")"]


def _argument(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    stars = next((mark for kind, mark in star.items() if kind == parameter.kind), "")
    default = parameter.default
    text = "" if default is inspect.Parameter.empty else f"={_short_repr(default)}"
    return f"{stars}{parameter.name}{text}"


def _short_repr(value: Any) -> str:
    """Return a default; a long one is left out."""
    text = repr(value)
    return text if len(text) <= LONGEST_DEFAULT else "..."


def _docstring(text: Docstring, head: bool = True) -> Iterator[str]:
    """Yield a docstring as Markdown."""
    if head:
        yield from (markdown(text.summary), "")
    if text.body:
        yield from (markdown(text.body), "")
    for title, items in text.sections.items():
        yield from (f"**{title}**", "")
        for item in items:
            names = ", ".join(f"`{each}`" for each in item.names)
            kind = f" ({markdown(item.kind)})" if item.kind else ""
            yield f"- {names}{kind}: {markdown(item.text)}" if item.text else f"- {names}{kind}"
        yield ""


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines itself, with docstrings."""
    for name, member in vars(kind).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if (
            name not in ("to_table", "table")
            and name[0] != "_"
            and getattr(function, "__doc__", None)
        ):
            is_property = isinstance(function, property) or hasattr(function, "attrname")
            if inspect.isfunction(function) or is_property:
                yield name, function


def _member(kind: str, name: str, member: Any) -> Iterator[str]:
    """Yield the lines of one method or property."""
    call = _signature(name, _unbound(member))[0] if inspect.isfunction(member) else name
    if call.endswith("("):
        call = f"{name}(...)"
    text = parse(member.__doc__)
    yield from (f"**`{kind}.{call}`**: {markdown(text.summary)}", "")
    yield from _docstring(text, head=False)


def _unbound(function: Any) -> Any:
    """Return a function whose signature lacks `cls`."""
    signature = inspect.signature(function)
    kept = [each for name, each in signature.parameters.items() if name not in ("self", "cls")]
    copy = types.FunctionType(function.__code__, {}, function.__name__)
    copy.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return copy


def _module(name: str, module: types.ModuleType) -> Iterator[str]:
    """Yield the first paragraph of a module and a table of its public classes and functions."""
    yield from (markdown(parse(module.__doc__).summary), "")
    public = getattr(module, "__all__", None) or [
        each
        for each, value in vars(module).items()
        if not each.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    rows = [
        (each, getattr(module, each))
        for each in public
        if inspect.isclass(getattr(module, each)) or inspect.isfunction(getattr(module, each))
    ]
    yield from ("| name | |", "|---|---|")
    for each, value in rows:
        yield f"| `dtrain.{name}.{each}` | {cell(parse(value.__doc__).summary)} |"
    yield ""


def pages() -> dict[Path, str]:
    """Return the text of every generated page."""
    return {
        DOCS / "reference-run-file.md": run_file_page(),
        DOCS / "reference-api.md": api_page(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
