"""Validation loss of a character transformer after equal times on two ranks, for each method.

`ratio` = validation loss of `local-head` with one private layer over that of `1f1b` with the same
seed after equal times, the median over seeds; below 1 the local head is better. `spread` = its
range.

Set-up: tinyshakespeare, 128 characters per sample, the last 3 % for validation (261 samples); 16
samples per update; a causal transformer of 8.0 million parameters (8 layers of width 288, 8 heads)
in two blocks on two ranks of one thread; learning rate 1e-3 after a warm-up; Adam, unless the label
says otherwise. `1f1b` has the faster of 4 and 8 micro-batches. The time is that of training alone,
without the start and the evaluations: a calibration gives the seconds of an update, from which the
number of updates follows; `train_s` is the time that they took.

`curves` has, by label and seed, [seconds, loss] at 20 points. `figures` has the mean loss at the
end of each label, `peer` that of `1f1b`. `rows` has updates, times, and the loss by seed. `blocks`
has the loss after equal numbers of tokens with 2, 4 and 8 blocks of as many layers, one seed;
the two blocks of the first table have equal costs, heads included.

    python benchmarks/lm_equal_time.py [--minutes 20] [--seeds 3] [--updates 300] [--quick]

Label: measured. Time: about (7 labels x seeds x minutes), and an hour for `blocks`. Each finished
run is kept: start the script again to continue. Reads `tinyshakespeare.txt` from ``DTRAIN_DATA``
(default ``../shared/data``). `--quick`: a small net, one seed, seconds in place of minutes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, final

from bench import Bench, RunResult, spread
from objectives_cifar10 import run_jobs
from record import ROOT, publish

from dtrain.objectives import OBJECTIVES
from dtrain.schema import Table

BATCH, LENGTH, TEST, POINTS = 16, 128, 0.03, 20
DEPTH, BLOCKS = 8, (2, 4, 8)

ADAM: Table = {"name": "adam", "lr": 1e-3}
NADAM: Table = {"name": "nadam", "lr": 1e-3, "betas": [0.99, 0.999]}
BACKPROP: Table = {"name": "backprop"}
Row = dict[str, Any]


@final
@dataclass(frozen=True)
class Method:
    """Objective, schedule and optimizer of a label, and the micro-batches to choose from."""

    objective: Table
    schedule: Table
    optimizer: Table
    micros: tuple[int, ...] = (1,)


def decoder(layers: int) -> Method:
    """Return local heads of so many private layers."""
    objective: Table = {"name": "local-head", "head": "decoder", "private-layers": layers}
    return Method(objective, {"name": "stream"}, ADAM)


METHODS = {
    "1f1b": Method(BACKPROP, {"name": "1f1b"}, ADAM, (4, 8)),
    "pipelined, predicted": Method(
        BACKPROP, {"name": "pipelined", "prediction": "optimizer"}, ADAM
    ),
    "pipedream, NAdam 0.99": Method(BACKPROP, {"name": "pipedream"}, NADAM),
    **{f"local-head {layers}": decoder(layers) for layers in (0, 1, 2)},
}
if "diffusion-blocks" in OBJECTIVES:
    METHODS["diffusion-blocks"] = Method({"name": "diffusion-blocks"}, {"name": "stream"}, ADAM)


@final
@dataclass(frozen=True)
class Settings:
    """Minutes, seeds and points of the first table, updates of the second, and sizes.

    A calibration has three segments of `calibration` updates, of which the first warms up.
    """

    minutes: float
    seeds: int
    updates: int
    points: int = POINTS
    calibration: int = 8
    width: int = 288
    length: int = LENGTH
    test: float = TEST
    quick: bool = False


def main() -> None:
    """Train what is missing; publish the record."""
    settings = parse_settings()
    bench = Bench("lm_equal_time", settings.quick)
    paces = {
        label: bench.cached(f"pace {label}", partial(calibrate, bench, method, settings))
        for label, method in METHODS.items()
    }
    cells = [(label, seed) for seed in range(settings.seeds) for label in METHODS]
    results = {
        (label, seed): bench.cached(
            f"{label} {settings.minutes:g} {seed}",
            partial(train_for_time, bench, label, seed, paces[label], settings),
        )
        for label, seed in cells
    }
    rows = {
        label: summarise([results[label, seed] for seed in range(settings.seeds)])
        for label in METHODS
    }
    blocks = loss_by_blocks(bench, settings)
    pairs = zip(rows["local-head 1"]["losses"], rows["1f1b"]["losses"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    figures = {label: row["loss"] for label, row in rows.items()}
    curves = {label: row.pop("curves") for label, row in rows.items()}
    publish(
        "lm_equal_time", "measured", figures, dict.fromkeys(figures, figures["1f1b"]),
        median(ratios), spread(ratios), quick=settings.quick, minutes=settings.minutes, rows=rows,
        blocks=blocks, block_updates=settings.updates, curves=curves,
    )  # fmt: skip


def parse_settings() -> Settings:
    """Parse the command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--minutes", type=float, default=20.0, help="of training of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=300, help="of each run of `blocks`")
    parser.add_argument("--quick", action="store_true", help="a small net, writes no record")
    given = parser.parse_args()
    if given.quick:
        return Settings(0.01, 1, 4, 2, 2, 32, 16, 0.001, quick=True)
    return Settings(given.minutes, given.seeds, given.updates)


def calibrate(bench: Bench, method: Method, settings: Settings) -> Row:
    """Return the fastest number of micro-batches, and the seconds of an update."""
    seconds = {}
    for micros in method.micros:
        updates = settings.calibration
        run = make_run(method, 2, 0, 3 * updates, updates, settings)
        run |= {"micro-batches": micros, "evaluate": {"every-updates": 3 * updates}}
        seconds[micros] = median(bench.train(run, 2).segment_seconds()[1:]) / updates
    best = min(seconds, key=lambda micros: seconds[micros])
    return {"micros": best, "update_s": seconds[best]}


def train_for_time(
    bench: Bench, label: str, seed: int, pace: Mapping[str, Any], settings: Settings
) -> Row:
    """Train for so many updates as fit into the time; return the curve of the validation loss."""
    interval = max(1, int(60 * settings.minutes / pace["update_s"]) // settings.points)
    updates = interval * settings.points
    run = make_run(METHODS[label], 2, seed, updates, interval, settings)
    result = bench.train(run | {"micro-batches": pace["micros"]}, 2)
    curve = loss_curve(result)
    return {
        "curve": curve,
        "updates": updates,
        "train_s": curve[-1][0],
        "loss": curve[-1][1],
    }


def loss_curve(result: RunResult) -> list[tuple[float, float]]:
    """Return seconds of training and validation loss at each evaluation."""
    ends = [record["update"] for record in result.train_records]
    seconds, total = {}, 0.0
    for end, segment_s in zip(ends, result.segment_seconds(), strict=True):
        total += segment_s
        seconds[end] = total
    return [(seconds[row["update"]], row["test_loss"]) for row in result.eval_records]


def summarise(results: list[Row]) -> Row:
    """Return the means over the seeds of one label."""
    return {
        "loss": mean(row["loss"] for row in results),
        "losses": [row["loss"] for row in results],
        "updates": [row["updates"] for row in results],
        "train_s": [row["train_s"] for row in results],
        "curves": [row["curve"] for row in results],
    }


def loss_by_blocks(bench: Bench, settings: Settings) -> dict[str, dict[str, float]]:
    """Return the validation loss after equal tokens, by label and number of blocks.

    One rank trains all blocks, since the layout does not change the trained model.
    """

    def measure(method: Method, blocks: int, name: str) -> Row:
        updates, interval = settings.updates, max(1, settings.updates // 4)
        run = make_run(method, blocks, 0, updates, interval, settings)
        run |= {"partition": {"cuts": [*range(1 + DEPTH // blocks, 1 + DEPTH, DEPTH // blocks)]}}
        result = bench.train(run, 1, subfolder=name)
        return {"loss": result.eval_records[-1]["test_loss"]}

    cells = {
        f"blocks {label} {blocks} {settings.updates}": (label, blocks)
        for blocks in BLOCKS
        for label in METHODS
        if label != "1f1b" or blocks == BLOCKS[0]  # the same gradients with any number of blocks
    }
    jobs = [
        (name, partial(measure, METHODS[label], blocks, name.replace(" ", "-")))
        for name, (label, blocks) in cells.items()
    ]
    results = run_jobs(bench, jobs, 2, until=float("inf"))
    table: dict[str, dict[str, float]] = {label: {} for label in METHODS}
    for name, (label, blocks) in cells.items():
        table[label][str(blocks)] = results[name]["loss"]
    return table


def make_run(
    method: Method, blocks: int, seed: int, updates: int, interval: int, settings: Settings
) -> Table:
    """Return the run file; it is evaluated every `interval` updates."""
    folder = Path(os.environ.get("DTRAIN_DATA", ROOT.parent / "shared" / "data"))
    data = {"train": str(folder / "tinyshakespeare.txt"), "tokens": "characters"}
    return {
        "seed": seed,
        "updates": updates,
        "segment": interval,
        "batch-size": BATCH,
        "data": {"name": "text", **data, "test": settings.test, "length": settings.length},
        "model": {
            "name": "transformer",
            "depth": DEPTH,
            "width": settings.width,
            "heads": 8,
        },
        "partition": {"blocks": blocks},
        "objective": method.objective,
        "schedule": method.schedule,
        "optimizer": method.optimizer,
        "lr": {"name": "constant", "warmup-updates": min(100, updates // 10)},
        "evaluate": {"every-updates": interval},
    }


if __name__ == "__main__":
    main()
