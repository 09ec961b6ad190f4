"""Samples per second of a two-rank pipeline of eight layers of 1024, over torch's 1F1B.

`ratio` = samples per second of `mono-forward` with `stream`, at its best number of micro-batches
(1, 2, 4, 8), over those of torch 1F1B over gloo at its best of 2, 4, 8; the median of the pairs,
above 1 ours is faster. `spread` = its range. One round before the pairs chooses the best numbers.

Set-up: 2 ranks, one thread each, 256 samples per update, SGD without momentum on both sides, blocks
of four layers and a head. Further figures:

    ratio_1f1b          our `1f1b` with backprop over theirs, best micro-batches each
    bound_share         our 1f1b's efficiency over M / (M + P - 1); efficiency = its samples per
                        second over P times those of the same blocks on one rank, updates included
    ratio_rows          `ratio` at equal rows per micro-batch: both sides at the peer's best M
    work_factor         our backprop's seconds on one rank over those of mono-forward: the saved
                        work (no input gradient at a block's first layer), less that of the heads
    parallel_factor     `ratio` over `work_factor`: the saved waiting time

    python benchmarks/pipeline_step.py [--quick]

Label: measured.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from bench import Bench, alternate, medians, parse_quick, run_peer, spread
from record import publish

from dtrain.schema import Table

RANKS, BATCH, WIDTH, LAYERS = 2, 256, 1024, 8
OURS, THEIRS = (1, 2, 4, 8), (2, 4, 8)
LOCAL, GLOBAL = ("mono-forward", "stream"), ("backprop", "1f1b")
Row = dict[str, float]


def main() -> None:
    """Choose the best settings, measure pairs and publish the record."""
    quick = parse_quick(__doc__)
    bench, steps = Bench("pipeline_step", quick), 8 if quick else 20

    def ours(method: tuple[str, str], micros: int, ranks: int = RANKS) -> Row:
        result = bench.train(make_run(method, micros, steps), ranks)
        return {"rate": result.samples_per_s(), "busy": max(result.summary["utilisation"])}

    def theirs(micros: int) -> Row:
        return run_peer("pipeline_1f1b", RANKS, micros, steps, BATCH, WIDTH, LAYERS)

    local = best_micros(bench, "local", OURS, lambda m: ours(LOCAL, m)["rate"])
    flush = best_micros(bench, "flush", THEIRS, lambda m: ours(GLOBAL, m)["rate"])
    other = best_micros(bench, "peer", THEIRS, lambda m: theirs(m)["samples_per_s"])

    def measure_ours(number: int) -> Row:
        return bench.cached(f"ours-{number}", lambda: sample_rates(ours, local, flush, other))

    def measure_peer(number: int) -> Row:
        return bench.cached(f"theirs-{number}", lambda: theirs(other))

    our_rows, peer_rows = alternate(5, measure_ours, measure_peer)
    pairs = [pair_ratios(a, b, flush) for a, b in zip(our_rows, peer_rows, strict=True)]
    ratios = [pair["ratio"] for pair in pairs]
    figures = medians(pairs) | medians(our_rows)
    figures |= {"micros": local, "micros_1f1b": flush}
    del figures["ratio"]
    peer_figures = medians(peer_rows) | {"micros": other}
    publish(
        "pipeline_step", "measured", figures, peer_figures, median(ratios), spread(ratios),
        quick=quick,
    )  # fmt: skip


def best_micros(
    bench: Bench, part: str, micros: tuple[int, ...], rate: Callable[[int], float]
) -> int:
    """Return the fastest number of micro-batches; each is tried once."""
    rates = bench.cached(f"best-{part}", lambda: {str(m): rate(m) for m in micros})
    return int(max(rates, key=lambda m: rates[m]))


def sample_rates(ours: Callable[..., Row], local: int, flush: int, other: int) -> Row:
    """Return our samples per second in one round, and the busy share of 1f1b."""
    pipelined, equal_rows = ours(GLOBAL, flush), ours(LOCAL, other)
    return {
        "single_1f1b": ours(GLOBAL, flush, 1)["rate"],
        "single_backprop": ours(GLOBAL, local, 1)["rate"],
        "single_local": ours(LOCAL, local, 1)["rate"],
        "samples_per_s": ours(LOCAL, local)["rate"],
        "samples_per_s_rows": equal_rows["rate"],
        "samples_per_s_1f1b": pipelined["rate"],
        "busy_1f1b": pipelined["busy"],
    }


def pair_ratios(ours: Row, theirs: Row, flush: int) -> Row:
    """Return the ratios of one pair."""
    rate, bound = theirs["samples_per_s"], flush / (flush + RANKS - 1)
    ratio = ours["samples_per_s"] / rate
    work = ours["single_local"] / ours["single_backprop"]
    return {
        "ratio": ratio,
        "ratio_rows": ours["samples_per_s_rows"] / rate,
        "ratio_1f1b": ours["samples_per_s_1f1b"] / rate,
        "bound_share": ours["samples_per_s_1f1b"] / (RANKS * ours["single_1f1b"]) / bound,
        "work_factor": work,
        "parallel_factor": ratio / work,
    }


def make_run(method: tuple[str, str], micros: int, steps: int) -> Table:
    """Return the run file: four segments of `steps` updates, of which the first warms up."""
    objective, schedule = method
    data: dict[str, Any] = {"rows": BATCH * steps * 4, "width": WIDTH}
    return {
        "updates": steps * 4,
        "segment": steps,
        "batch-size": BATCH,
        "micro-batches": micros,
        "data": {"name": "user:noise", "normalise": False, **data},
        "model": {"name": "mlp", "widths": [WIDTH] * LAYERS},
        "partition": {"cuts": [LAYERS // RANKS]},
        "objective": {"name": objective},
        "schedule": {"name": schedule},
        "optimizer": {"name": "sgd", "lr": 0.01},
    }


if __name__ == "__main__":
    main()
