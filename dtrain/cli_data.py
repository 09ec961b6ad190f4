"""The commands that prepare data sets: `dtrain data import`.

Invariant: they import no MPI, and torch only when they run.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_commands(commands: Commands) -> None:
    """Add the command `data` and its verbs to those of `dtrain`."""
    data = commands.add_parser("data", help="import, describe and prepare data sets")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    _add_import(verbs)


def _add_import(verbs: Commands) -> None:
    parser = verbs.add_parser(
        "import", help="images, .npz, .npy, .csv or IDX files to HDF5 files that runs read"
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="folder of class folders or a tar of one, .npz, .npy, .csv, an IDX file or a folder "
        "of MNIST's four",
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
    parser.add_argument("--x", metavar="NAME", help="array of the samples in .npz")
    parser.add_argument(
        "--y", metavar="NAME", help="array of the targets in .npz; their file for .npy and IDX"
    )
    parser.add_argument(
        "--target",
        metavar="COLUMN",
        help="column of the targets in .csv: its name, or its number from 0 (default: the last)",
    )
    parser.set_defaults(command=_import)


def _image_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no HEIGHTxWIDTH, as 224x224")
    return int(match[1]), int(match[2])


def _import(options: argparse.Namespace) -> int:
    """Convert a data set to HDF5 and print the paths of the files."""
    from dtrain.data.importing.import_data import ImportOptions, import_data

    keys = ("split", "size", "fit", "x", "y", "target")
    chosen = ImportOptions(**{key: getattr(options, key) for key in keys})
    for path in import_data(options.source, options.out, chosen):
        print(path)
    return 0
