"""Validation loss of a character transformer after equal times on two ranks, for each method.

`ratio` = validation loss of `local-head` with one private layer over that of `1f1b` with the same
seed after equal times, the median over seeds; below 1 the local head is better. `spread` = its
range.

Set-up: tinyshakespeare, 128 characters per sample, the last 3 % for validation (261 samples); 16
samples per update; a causal transformer of 8.0 million parameters (8 layers of width 288, 8 heads)
in two blocks of equal cost, heads included, on two ranks of one thread; learning rate 1e-3 after a
warm-up; Adam, unless the label says otherwise. `1f1b` has the faster of 4 and 8 micro-batches, and
`diffusion-blocks` predicts by the mean of 4 chains. The time is that of training alone, without the
start and the evaluations: a calibration gives the seconds of an update, from which the number of
updates follows; `train_s` is the time that they took.

`runs` has one entry per seed and label: its commit and machine, the updates, `train_s`, the loss at
the end and the curve, [seconds, loss] at 10 points. All runs of a seed have the same processor.
`figures` has the mean loss at the end of each label over its runs, `peer` that of `1f1b`; `missing`
counts the runs that the record lacks.

    python benchmarks/lm_equal_time.py [--minutes 20] [--seeds 3] [--quick]

Label: measured. Time: about 2 h 35 min per seed (7 labels x minutes, and evaluations). The record
is written after each run, and a start measures only the runs that it lacks. Reads
`tinyshakespeare.txt` from ``DTRAIN_DATA`` (default ``../shared/data``). `--quick`: a small net, one
seed, seconds in place of minutes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, final

from bench import Bench, RunResult, spread
from record import ROOT, commit, machine, publish, read

from dtrain.schema import Table

BATCH, DEPTH = 16, 8

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
    "local-head 1": decoder(1),
    "pipelined, predicted": Method(
        BACKPROP, {"name": "pipelined", "prediction": "optimizer"}, ADAM
    ),
    "pipedream, NAdam 0.99": Method(BACKPROP, {"name": "pipedream"}, NADAM),
    "local-head 0": decoder(0),
    "local-head 2": decoder(2),
    "diffusion-blocks": Method({"name": "diffusion-blocks", "chains": 4}, {"name": "stream"}, ADAM),
}


@final
@dataclass(frozen=True)
class Settings:
    """Minutes of each run, number of seeds, points of a curve, and sizes.

    A calibration has three segments of `calibration` updates, of which the first warms up.
    """

    minutes: float = 20.0
    seeds: int = 3
    points: int = 10
    calibration: int = 8
    width: int = 288
    length: int = 128
    test: float = 0.03
    quick: bool = False


QUICK = Settings(0.01, 1, 2, 2, 32, 16, 0.001, quick=True)


def main() -> None:
    """Measure the runs that the record lacks; publish it after each."""
    settings = parse_settings()
    bench = Bench("lm_equal_time", settings.quick)
    wanted = [(seed, label) for seed in range(settings.seeds) for label in METHODS]
    runs = [] if settings.quick else kept_runs(settings.minutes)
    for seed, label in wanted[len(runs) :]:
        pace = bench.cached(f"pace {label}", partial(calibrate, bench, METHODS[label], settings))
        row = train_for_time(bench, label, seed, pace, settings)
        runs.append({"seed": seed, "label": label, "commit": commit(), "machine": machine()} | row)
        losses = losses_by_label(runs)
        pairs = zip(losses["1f1b"], losses.get("local-head 1", []), strict=False)
        ratios = [ours / theirs for theirs, ours in pairs]
        figures = {label: mean(values) for label, values in losses.items()}
        if ratios:
            publish(
                "lm_equal_time", "measured", figures, dict.fromkeys(figures, figures["1f1b"]),
                median(ratios), spread(ratios) if len(ratios) > 1 else None, quick=settings.quick,
                minutes=settings.minutes, missing=len(wanted) - len(runs), runs=runs,
            )  # fmt: skip


def kept_runs(minutes: float) -> list[Row]:
    """Return the runs of the record, in order.

    Those of an unfinished seed on another processor are not among them: equal times of two
    processors are not equal.
    """
    record = read("lm_equal_time")
    runs: list[Row] = record["runs"] if record and record["minutes"] == minutes else []
    unfinished = len(runs) % len(METHODS)
    if unfinished and processor(runs[-1]["machine"]) != processor(machine()):
        return runs[:-unfinished]
    return runs


def processor(name: str) -> str:
    """Return the processor and the number of cores in the name of a machine."""
    return name.partition(" cores")[0]


def losses_by_label(runs: Sequence[Row]) -> dict[str, list[float]]:
    """Return the losses at the end, in the order of the seeds."""
    return {
        label: [run["loss"] for run in runs if run["label"] == label]
        for label in dict.fromkeys(run["label"] for run in runs)
    }


def parse_settings() -> Settings:
    """Parse the command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--minutes", type=float, default=20.0, help="of training of each run")
    parser.add_argument("--seeds", type=int, default=3, help="that the record shall have")
    parser.add_argument("--quick", action="store_true", help="a small net, writes no record")
    given = parser.parse_args()
    return QUICK if given.quick else Settings(given.minutes, given.seeds)


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
