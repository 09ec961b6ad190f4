"""Seconds of an update of the CIFAR-10 MLP on one rank, over a plain PyTorch loop.

`ratio` = our seconds per update over the peer's, the median of the pairs; 1 means no overhead.
`spread` = its range.

Set-up: 3072-1000-1000-1000-10, `backprop`, one block, Adam, 128 samples per update, one thread on
both sides. The peer reads the same file through the same dataset class, standardised likewise, in
an order drawn the same way, and records no loss. Both use fused optimizer steps. The first segment
of both warms up and does not count.

    python benchmarks/single_rank_overhead.py [--quick]

Label: measured. Reads `cifar10-jpeg.tar.gz` from ``DTRAIN_DATA`` (default ``../shared/data``).
"""

from __future__ import annotations

from statistics import median

from bench import Bench, alternate, cifar_paths, medians, parse_quick, run_peer, spread
from record import publish

from dtrain.schema import Table

BATCH, WIDTHS, SEGMENTS = 128, [1000] * 3, 6


def main() -> None:
    """Measure pairs and publish the record."""
    quick = parse_quick(__doc__)
    bench, steps = Bench("single_rank_overhead", quick), 20 if quick else 60
    train, test = cifar_paths()

    def ours() -> dict[str, float]:
        return {"update_s": BATCH / bench.train(run(train, test, steps), 1).samples_per_s()}

    def theirs() -> dict[str, float]:
        return run_peer("plain_loop", 1, train, test, BATCH, steps, SEGMENTS)

    our_rows, peer_rows = alternate(
        5 if quick else 7,
        lambda number: bench.cached(f"ours-{number}", ours),
        lambda number: bench.cached(f"peer-{number}", theirs),
    )
    ratios = [a["update_s"] / b["update_s"] for a, b in zip(our_rows, peer_rows, strict=True)]
    publish(
        "single_rank_overhead", "measured", medians(our_rows), medians(peer_rows), median(ratios),
        spread(ratios), quick=quick,
    )  # fmt: skip


def run(train: str, test: str, steps: int) -> Table:
    """Return the run file."""
    return {
        "updates": steps * SEGMENTS,
        "segment": steps,
        "batch-size": BATCH,
        "data": {"name": "hdf5", "train": train, "test": test},
        "model": {"name": "mlp", "widths": WIDTHS},
        "partition": {"blocks": 1},
        "objective": {"name": "backprop"},
        "optimizer": {"name": "adam", "lr": 1e-3},
    }


if __name__ == "__main__":
    main()
