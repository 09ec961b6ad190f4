"""Tokens per second of a character transformer on two ranks, over torch's 1F1B.

`ratio` = tokens per second of our `1f1b` with backpropagation over those of torch 1F1B over gloo,
each at its best number of micro-batches; the median of the pairs, above 1 ours is faster. `spread`
= its range. One round before the pairs chooses the best numbers.

Set-up: 2 ranks, one thread each; a causal transformer of 8.0 million parameters (8 layers of width
288, 8 heads), batch 16 x 128 characters of 96, fused Adam on both sides; both sides run the same
layers, four on each stage. Further figures:

    ratio_local          `local-head` with `stream` over the peer: the head of block 0 is a norm and
                         a matrix, as the model's own; its best micro-batches
    local_min, _max      range of `ratio_local` over the pairs
    bound_share          our 1f1b's efficiency over M / (M + P - 1); efficiency = its tokens per
                         second over P times those of the same blocks on one rank, updates included
    work_factor          our backprop's seconds on one rank over those of `local-head`
    parallel_factor      `ratio_local` over `work_factor`: the saved waiting time
    compute_share        the peer's: seconds of its slowest stage alone over those of its step
    matmul_gflops        one thread's rate in the largest matrix product of a layer, float32
    most_ratio_local     `ratio_local` if both ranks ran all multiply-adds of `local-head` at that
                         rate and never waited: no program on these cores exceeds it

    python benchmarks/lm_step.py [--quick]

Label: measured.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from bench import Bench, alternate, medians, parse_quick, run_peer, spread
from pipeline_step import best_micros
from record import publish

from dtrain.config.parse import parse_run
from dtrain.planning.plan import make_plan
from dtrain.schema import Table

RANKS, BATCH, LENGTH, VOCABULARY = 2, 16, 128, 96
WIDTH, DEPTH, HEADS = 288, 8, 8
OURS, FLUSH, THEIRS = (1, 2, 4, 8), (2, 4, 8, 16), (2, 4, 8, 16)
DECODER: Table = {"name": "local-head", "head": "decoder", "private-layers": 0}
LOCAL: tuple[Table, str] = (DECODER, "stream")
GLOBAL: tuple[Table, str] = ({"name": "backprop"}, "1f1b")
Row = dict[str, float]


def main() -> None:
    """Choose the best settings, measure pairs and publish the record."""
    quick = parse_quick(__doc__)
    bench, steps, pairs = Bench("lm_step", quick), 3 if quick else 10, 1 if quick else 5

    def ours(method: tuple[Table, str], micros: int, ranks: int = RANKS) -> float:
        result = bench.train(make_run(method, micros, steps), ranks)
        return LENGTH * result.samples_per_s()

    def theirs(micros: int) -> Row:
        sizes = (BATCH, LENGTH, VOCABULARY, WIDTH, DEPTH, HEADS)
        return run_peer("pipeline_lm", RANKS, micros, 2 * steps, *sizes)

    local = best_micros(bench, "local", OURS, lambda m: ours(LOCAL, m))
    flush = best_micros(bench, "flush", FLUSH, lambda m: ours(GLOBAL, m))
    other = best_micros(bench, "peer", THEIRS, lambda m: theirs(m)["tokens_per_s"])

    def measure_ours(number: int) -> Row:
        return bench.cached(
            f"ours-{number}",
            lambda: {
                "tokens_per_s_1f1b": ours(GLOBAL, flush),
                "tokens_per_s_local": ours(LOCAL, local),
                "single_1f1b": ours(GLOBAL, flush, 1),
                "single_backprop": ours(GLOBAL, local, 1),
                "single_local": ours(LOCAL, local, 1),
            },
        )

    def measure_peer(number: int) -> Row:
        return bench.cached(f"theirs-{number}", lambda: theirs(other))

    our_rows, peer_rows = alternate(pairs, measure_ours, measure_peer)
    rows = [pair_ratios(a, b, flush) for a, b in zip(our_rows, peer_rows, strict=True)]
    ratios, locals_ = ([row[key] for row in rows] for key in ("ratio", "ratio_local"))
    figures = medians(rows) | medians(our_rows)
    figures |= {"local_min": min(locals_), "local_max": max(locals_)}
    figures |= {"micros_1f1b": flush, "micros_local": local}
    del figures["ratio"]
    peer_figures = medians(peer_rows) | {"micros": other}
    rate = bench.cached("matmul", lambda: {"gflops": matmul_gflops()})["gflops"]
    most = RANKS * rate * 1e9 / token_flops(bench, make_run(LOCAL, local, steps))
    figures |= {"matmul_gflops": rate, "most_ratio_local": most / peer_figures["tokens_per_s"]}
    bounds = {"ratio": 1.0, "ratio_local": 1.5}
    publish(
        "lm_step", "measured", figures, peer_figures, median(ratios), spread(ratios),
        quick=quick, bounds=bounds,
    )  # fmt: skip


def pair_ratios(ours: Row, theirs: Row, flush: int) -> Row:
    """Return the ratios of one pair."""
    rate, bound = theirs["tokens_per_s"], flush / (flush + RANKS - 1)
    ratio, work = ours["tokens_per_s_local"] / rate, ours["single_local"] / ours["single_backprop"]
    return {
        "ratio": ours["tokens_per_s_1f1b"] / rate,
        "ratio_local": ratio,
        "bound_share": ours["tokens_per_s_1f1b"] / (RANKS * ours["single_1f1b"]) / bound,
        "work_factor": work,
        "parallel_factor": ratio / work,
        "compute_share": theirs["compute_s"] / theirs["step_s"],
    }


def matmul_gflops(repetitions: int = 50) -> float:
    """Return the best rate of one thread in a product of (tokens, width) with (width, 4 width)."""
    torch.set_num_threads(1)
    left, right = torch.randn(BATCH * LENGTH, WIDTH), torch.randn(WIDTH, 4 * WIDTH)
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * left.numel() * 4 * WIDTH / min(seconds) / 1e9


def token_flops(bench: Bench, run: Table) -> float:
    """Return the floating-point operations of a token in training, two per multiply-add."""
    plan = make_plan(parse_run(run, bench.folder), RANKS)
    return 2 * sum(block.cost for block in plan.layout.block_layouts) / LENGTH


def make_run(method: tuple[Table, str], micros: int, steps: int) -> Table:
    """Return the run file: four segments of `steps` updates, of which the first warms up."""
    objective, schedule = method
    data: dict[str, Any] = {"rows": BATCH * steps * 4, "steps": LENGTH, "tokens": VOCABULARY}
    return {
        "updates": steps * 4,
        "segment": steps,
        "batch-size": BATCH,
        "micro-batches": micros,
        "data": {"name": "user:tokens", **data},
        "task": {"classes-last": True},
        "model": {"name": "transformer", "depth": DEPTH, "width": WIDTH, "heads": HEADS},
        "partition": {"cuts": [1 + DEPTH // RANKS]},
        "objective": objective,
        "schedule": {"name": schedule},
        "optimizer": {"name": "adam", "lr": 1e-3},
    }


if __name__ == "__main__":
    main()
