"""Compute the statistics of a set's training split as the start of a run does, on these ranks.

Prints one JSON line on rank 0: `statistics_s`, from the opened set to the same statistics on all
ranks.

    python statistics_pass.py TRAIN.h5 TEST.h5
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from dtrain.data import load_data
from dtrain.rank_process import init
from dtrain.shared_statistics import share_statistics


def main() -> None:
    """Measure and print."""
    comm = init()
    torch.set_num_threads(1)
    train, test = sys.argv[1:]
    splits = load_data("hdf5", {"train": train, "test": test}, Path())
    for split in splits.by_name().values():
        split.keep_on_disk() if hasattr(split, "keep_on_disk") else None
    comm.allgather_object("start")
    start = time.perf_counter()
    share_statistics(splits, comm, lambda _: None)
    comm.allgather_object("end")
    if comm.rank == 0:
        print(json.dumps({"statistics_s": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
