"""Measurements of one rank over one segment: sums, traffic, memory, rates and norms."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from dtrain.block.optimizer import squared_norm
from dtrain.build import RankJob
from dtrain.engine.skipped_updates import skip_records


def segment_record(
    job: RankJob, bytes_before: tuple[int, int], kept_bytes: int, peak_flops: float | None
) -> dict[str, Any]:
    """Return what this rank measured in a segment, as plain values.

    Parameters
    ----------
    bytes_before : tuple of int
        Bytes that this rank had sent inside and between nodes before the segment.
    kept_bytes : int
        Memory of the averaged weights and of copies for checkpoints.
    peak_flops : float or None
        Measured peak of the machine, in operations per second.
    """
    engine, traffic = job.engine, job.groups.control.traffic
    return {
        "stage": job.position.stage,
        "replica": job.position.replica,
        **asdict(engine.metric_sums),
        "bytes_intra_node": traffic.bytes_intra - bytes_before[0],
        "bytes_inter_node": traffic.bytes_inter - bytes_before[1],
        "peak_live": engine.peak_live,
        "peak_bytes": engine.peak_bytes() + kept_bytes,
        "rss_bytes": _rss_bytes(),
        "memory_bytes": _memory_bytes(engine.engine_spec.device),
        "peak_flops": peak_flops,
        "weights": _low_rank_stats(job),
        "block_values": _block_values(job),
        **_skip_values(job),
    }


def _low_rank_stats(job: RankJob) -> Mapping[str, Any]:
    """Return rank and traffic of the weights that may be products; replica 0 reports for all."""
    syncs = () if job.position.replica else job.engine.syncs.values()
    return {name: stats for sync in syncs for name, stats in sync.low_rank_stats().items()}


def _memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank: of its device, or of its process on the CPU."""
    is_cuda = device.type == "cuda"
    return int(torch.cuda.max_memory_allocated(device)) if is_cuda else _rss_bytes()


def _block_values(job: RankJob) -> dict[int, dict[str, float]]:
    """Return the learning rate of the last update of each block, and on request the norms of its
    gradient and of the weights; replica 0 reports for all."""
    step = job.engine.update_step
    values = {}
    for index, block in ({} if job.position.replica else job.engine.blocks).items():
        values[index] = {"lr": block.lr}
        if step.records_norms:
            weights = [*block.trainable_tensors().values()]
            values[index]["gradient_norm"] = step.gradient_norms.get(index, 0.0)
            values[index]["weight_norm"] = squared_norm(weights) ** 0.5
    return values


def _skip_values(job: RankJob) -> dict[str, Any]:
    """Return the skipped updates of this rank's blocks, and why it skipped those of the segment."""
    skips = job.engine.update_step.skips
    return {
        "skips": {} if skips is None else skips.state(),
        "skip_reasons": [] if skips is None else skip_records(skips.reasons),
    }


def _rss_bytes() -> int:
    """Return the peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
