"""The commands of data sets: `dtrain data import`, `describe`, `stats` and `rechunk`.

Invariant: they import no MPI, and torch only when they run.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_commands(commands: Commands) -> None:
    """Add the command `data` and its verbs to those of `dtrain`."""
    data = commands.add_parser("data", help="import, describe and prepare data sets")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    _add_import(verbs)
    _add_describe(verbs)
    _add_stats(verbs)
    _add_rechunk(verbs)


def _add_import(verbs: Commands) -> None:
    parser = verbs.add_parser(
        "import",
        help="images, .npz, .npy, .csv, IDX, .txt or Planetoid files to HDF5 files that runs read",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="folder of class folders or a tar of one, .npz, .npy, .csv, an IDX file or a folder "
        "of MNIST's four, a text (.txt), or a folder of Planetoid's eight",
    )
    parser.add_argument("out", type=Path, metavar="OUT.h5")
    parser.add_argument("--split", metavar="NAME", help="import only this split")
    parser.add_argument(
        "--size", type=_image_size, metavar="HxW", help="size that all images get: 224x224"
    )
    parser.add_argument(
        "--fit",
        choices=("resize", "crop"),
        help="resize the shorter side and crop the centre (default), or only crop",
    )
    parser.add_argument(
        "--tokens",
        choices=("bytes", "characters"),
        help="tokens of a text (default: bytes)",
    )
    _add_array_names(parser, "array of the targets in .npz; their file for .npy and IDX")
    parser.set_defaults(command=_import)


def _add_array_names(parser: argparse.ArgumentParser, y_help: str) -> None:
    """Add the options that name samples and targets in a file."""
    parser.add_argument("--x", metavar="NAME", help="array of the samples in .npz")
    parser.add_argument("--y", metavar="NAME", help=y_help)
    parser.add_argument(
        "--target",
        metavar="COLUMN",
        help="column of the targets in .csv: its name, or its number from 0 (default: the last)",
    )


def _add_describe(verbs: Commands) -> None:
    parser = verbs.add_parser(
        "describe", help="show what a file holds, or what a run makes of its data"
    )
    parser.add_argument("source", type=Path, metavar="FILE|RUN.toml")
    parser.add_argument("--values", action="store_true", help="read all; count NaN and infinity")
    parser.add_argument("--json", action="store_true", help="print plain values")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run"
    )
    _add_array_names(parser, "array of the targets in HDF5 or .npz (default: y)")
    parser.set_defaults(command=_describe)


def _add_stats(verbs: Commands) -> None:
    parser = verbs.add_parser(
        "stats", help="write mean and standard deviation of the samples into an HDF5 file"
    )
    parser.add_argument("file", type=Path, metavar="FILE.h5")
    parser.add_argument(
        "--x", default="x", metavar="NAME", help="array of the samples (default: x)"
    )
    parser.add_argument(
        "--channels",
        type=_axis,
        default="first",
        metavar="first|last|AXIS",
        help="axis of the channels in a sample (default: first)",
    )
    parser.set_defaults(command=_stats)


def _add_rechunk(verbs: Commands) -> None:
    parser = verbs.add_parser(
        "rechunk", help="copy an HDF5 file to chunks of few samples, for shuffled reading"
    )
    parser.add_argument("source", type=Path, metavar="SRC.h5")
    parser.add_argument("out", type=Path, metavar="OUT.h5")
    parser.add_argument(
        "--chunk-bytes",
        type=int,
        metavar="N",
        help="size of a chunk (default: 1,048,576), or one sample",
    )
    parser.add_argument(
        "--compression",
        choices=("none", "gzip", "lzf"),
        default="none",
        help="default: none, the fastest to read",
    )
    parser.set_defaults(command=_rechunk)


def _image_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no HEIGHTxWIDTH, as 224x224")
    return int(match[1]), int(match[2])


def _axis(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _import(options: argparse.Namespace) -> int:
    """Convert a data set to HDF5 and print the paths of the files."""
    from dtrain.data.importing.import_data import ImportOptions, import_data

    keys = ("split", "size", "fit", "x", "y", "target", "tokens")
    chosen = ImportOptions(**{key: getattr(options, key) for key in keys})
    for path in import_data(options.source, options.out, chosen):
        print(path)
    return 0


def _describe(options: argparse.Namespace) -> int:
    """Print the contents of a file, or the data of a run."""
    from dtrain.planning.data_report import file_text, run_text

    if options.source.suffix == ".toml":
        from dtrain.planning.run_data import describe_run_data
        from dtrain.run import Run

        run = Run.read(options.source, options.set)
        table, text = describe_run_data(run.config, options.values), run_text
    else:
        from dtrain.data.importing.import_data import ImportOptions
        from dtrain.data.tools.file_description import describe_file

        names = ImportOptions(x=options.x, y=options.y, target=options.target)
        table, text = describe_file(options.source, names, options.values), file_text
    print(json.dumps(table, indent=2) if options.json else text(table).rstrip())
    return 0


def _stats(options: argparse.Namespace) -> int:
    """Write statistics into a file and print them."""
    from dtrain.data.tools.file_statistics import store_statistics

    mean, deviation = store_statistics(options.file, options.channels, options.x)
    for key, numbers in (("mean", mean), ("std", deviation)):
        shown = " ".join(f"{number:.6g}" for number in numbers[:8])
        print(f"{key:4}  {shown}{' ...' if len(numbers) > 8 else ''}")
    return 0


def _rechunk(options: argparse.Namespace) -> int:
    """Copy a file to other chunks and print the path of the copy."""
    from dtrain.data.formats.hdf5_writer import CHUNK_BYTES
    from dtrain.data.tools.rechunk import rechunk

    size = CHUNK_BYTES if options.chunk_bytes is None else options.chunk_bytes
    print(rechunk(options.source, options.out, size, options.compression))
    return 0
