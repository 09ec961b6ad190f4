"""Validation loss of a character transformer in 2, 4 and 8 blocks after equal numbers of tokens.

`ratio` = validation loss of `local-head` with one private layer in 8 blocks over that of
backpropagation; 1 says that the local objectives cost nothing. One seed.

Set-up: the net, the data and the methods of `lm_equal_time`, blocks of as many layers each, 300
updates of 16 samples. One rank trains all blocks, since the layout does not change the trained
model. `figures` has the loss by label and number of blocks, `peer` that of `1f1b`, whose gradients
do not depend on the blocks.

    python benchmarks/lm_blocks.py [--quick]

Label: measured. Time: about 75 minutes; each finished run is kept: start the script again to
continue. Reads `tinyshakespeare.txt` from ``DTRAIN_DATA`` (default ``../shared/data``). `--quick`:
a small net, 4 updates.
"""

from __future__ import annotations

from functools import partial

from bench import Bench, parse_quick
from lm_equal_time import DEPTH, METHODS, QUICK, Method, Row, Settings, make_run
from objectives_cifar10 import run_jobs
from record import publish

BLOCKS = 2, 4, 8


def main() -> None:
    """Train what is missing; publish the record."""
    quick = parse_quick(__doc__)
    bench = Bench("lm_blocks", quick)
    cells = [
        (label, blocks)
        for blocks in BLOCKS
        for label in METHODS
        if label != "1f1b" or blocks == BLOCKS[0]  # the same gradients with any number of blocks
    ]
    jobs = [
        (f"{label} {blocks}", partial(measure, bench, METHODS[label], blocks, quick))
        for label, blocks in cells
    ]
    results = run_jobs(bench, jobs, 2, until=float("inf"))
    losses = {name: row["loss"] for name, row in results.items()}
    base = losses[f"1f1b {BLOCKS[0]}"]
    publish(
        "lm_blocks", "measured", losses, dict.fromkeys(losses, base),
        losses[f"local-head 1 {BLOCKS[-1]}"] / base, None, quick=quick,
        updates=update_count(quick),
    )  # fmt: skip


def update_count(quick: bool) -> int:
    """Return the updates of every run."""
    return 4 if quick else 300


def measure(bench: Bench, method: Method, blocks: int, quick: bool) -> Row:
    """Train one method in so many blocks."""
    updates = update_count(quick)
    run = make_run(method, blocks, 0, updates, updates // 4, QUICK if quick else Settings())
    run |= {"partition": {"cuts": [*range(1 + DEPTH // blocks, 1 + DEPTH, DEPTH // blocks)]}}
    objective, schedule = method.objective, method.schedule
    name = "-".join(map(str, [*objective.values(), *schedule.values(), blocks]))
    return {"loss": bench.train(run, 1, subfolder=name).eval_records[-1]["test_loss"]}


if __name__ == "__main__":
    main()
