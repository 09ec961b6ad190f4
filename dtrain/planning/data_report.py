"""Descriptions of data, those of `dtrain data describe`, as text.

Invariant: pure functions of plain values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.planning.formatting import align_columns, pluralise

Table = Mapping[str, Any]


MAX_LABELS = 20
"""Labels whose counts are printed; of more, the most and the least frequent ones are."""


MAX_CHANNELS = 8


def file_text(table: Table) -> str:
    """Return the contents of a file for people."""
    size = f", {size_text(table['file_bytes'])}" if "file_bytes" in table else ""
    lines = [f"{table['file']}{size}", "", *_array_lines(table["arrays"])]
    for name, targets in table["targets"].items():
        lines += ["", f"Targets {name}: {_range_text(targets)}"]
        lines += _count_lines(targets, table["class_names"])
    if table["statistics"] is not None:
        lines += ["", "Statistics in the file, in the units of the stored samples"]
        lines += [
            f"{key:4}  {_numbers_text(numbers)}" for key, numbers in table["statistics"].items()
        ]
    elif any("chunks" in array for array in table["arrays"]):
        lines += ["", "No statistics in the file: a run computes them at its start"]
    for array in table["arrays"]:
        if "not_finite" in array:
            lines += ["", f"Values {array['name']}: {_finite_text(array['not_finite'])}"]
    return "\n".join(lines) + "\n"


def run_text(table: Table) -> str:
    """Return what a run makes of its data for people."""
    lines = [f"{table['run']}, data '{table['data']}'", "", *_split_lines(table["splits"]), ""]
    lines += align_columns([("as the model sees them", ""), *_input_rows(table)])
    for name, split in table["splits"].items():
        if "targets" in split:
            lines += ["", f"Targets of {name}: {_range_text(split['targets'])}"]
            lines += _count_lines(split["targets"], table["class_names"])
    for name, split in table["splits"].items():
        if "not_finite" in split:
            lines += ["", f"Values of {name}: {_finite_text(split['not_finite'])}"]
    return "\n".join(lines) + "\n"


def size_text(count: int) -> str:
    """Return a number of bytes: "640 bytes", "1.5 MB"."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return pluralise(count, "byte")


def _array_lines(arrays: Sequence[Table]) -> list[str]:
    is_hdf5 = any("chunks" in array for array in arrays)
    header = ["array", "shape", "dtype"]
    header += ["chunks", "compression", "on disk"] if is_hdf5 else []
    rows = [[*header, "in memory"]]
    for array in arrays:
        row = [array["name"], _shape_text(array["shape"]), array["dtype"]]
        if is_hdf5:
            layout = "virtual" if array["virtual"] else "contiguous"
            row += [
                _shape_text(array["chunks"]) if array["chunks"] else layout,
                array["compression"] or "none",
                size_text(array["stored_bytes"]),
            ]
        rows.append([*row, size_text(array["bytes"])])
    return align_columns(rows)


def _split_lines(splits: Mapping[str, Table]) -> list[str]:
    rows = [("split", "samples", "size", "samples are")]
    for name, split in splits.items():
        held = "held in memory" if split["in_memory"] else "read from the files in pieces"
        rows.append((name, f"{split['samples']:,}", size_text(split["bytes"]), held))
    return align_columns(rows)


def _input_rows(table: Table) -> list[tuple[str, str]]:
    """Return what the model gets, and in which order."""
    inputs, target = table["input"], table["target"]
    stored = inputs["stored_dtype"]
    rows = [("input", f"{_shape_text(inputs['shape'])} {inputs['dtype']}, stored as {stored}")]
    rows += [
        (f"input {number}", f"{_shape_text(other['shape'])} {other['dtype']}")
        for number, other in enumerate(table["further_inputs"], start=2)
    ]
    shape = f"{_shape_text(target['shape'])} " if target["shape"] else ""
    sources = {"given": "with the statistics of the data", "computed": "computed at the start"}
    normalisation = "none"
    if table["normalise"]:
        channels, source = table["channels"], sources[table["statistics"]]
        normalisation = f"per channel ({channels}), {source}"
    kind = "classes" if target["kind"] == "classes" else "outputs per value"
    rows += [
        ("target", f"{shape}{target['dtype']}, {target['kind']}"),
        (kind, f"{table['classes']:,}"),
        ("normalisation", normalisation),
        ("augmentation", table["augment"]),
        ("sampler", table["sampler"]),
        ("shuffle", table["shuffle"]),
        (
            "updates",
            f"{table['updates_per_epoch']:,} per epoch of {table['batch_size']:,} samples, the "
            f"last of {table['last_batch_size']:,}; {table['updates']:,} in all",
        ),
    ]
    return rows


def _range_text(targets: Table) -> str:
    if targets["smallest"] is None:
        return str(targets["kind"])
    text = f"{targets['kind']} from {targets['smallest']} to {targets['largest']}"
    if targets["counts"] is not None:
        text += f", {pluralise(len(targets['counts']), 'different value')}"
    return text


def _count_lines(targets: Table, names: Sequence[str] | None) -> list[str]:
    """Return the counts of labels, and the classes that have no sample."""

    def label(number: int) -> str:
        is_named = names is not None and 0 <= number < len(names)
        return f"{number} {names[number]}" if is_named and names is not None else str(number)

    if targets["counts"] is None:
        return []
    counts = {int(number): count for number, count in targets["counts"].items()}
    shown = list(counts)
    if len(shown) > MAX_LABELS:
        ordered = sorted(counts, key=lambda number: (-counts[number], number))
        shown = ordered[: MAX_LABELS // 2] + ordered[-MAX_LABELS // 2 :]
    rows = [("label", "count"), *((label(number), f"{counts[number]:,}") for number in shown)]
    lines = align_columns(rows)
    if len(counts) > len(shown):
        lines.insert(1 + MAX_LABELS // 2, f"... ({pluralise(len(counts) - len(shown), 'label')})")
    empty = targets["classes_without_samples"]
    if empty:
        listed = ", ".join(map(label, empty[:MAX_LABELS]))
        more = ", ..." if len(empty) > MAX_LABELS else ""
        lines.append(f"without a sample: {listed}{more}")
    return lines


def _finite_text(count: Table) -> str:
    if count["first_sample"] is None:
        return "all numbers are finite"
    return (
        f"{count['nan']:,} NaN and {count['infinite']:,} infinite, first in sample "
        f"{count['first_sample']}"
    )


def _numbers_text(numbers: Sequence[float | None]) -> str:
    shown = " ".join(
        "not finite" if number is None else f"{number:.6g}" for number in numbers[:MAX_CHANNELS]
    )
    return shown + (f" ... ({len(numbers):,} channels)" if len(numbers) > MAX_CHANNELS else "")


def _shape_text(shape: Sequence[int]) -> str:
    return " x ".join(f"{length:,}" for length in shape) or "one value"
