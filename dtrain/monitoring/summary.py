"""Contents of summary.json, and the text of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dtrain.monitoring.figures import SPREAD_KEYS, speed_figures
from dtrain.monitoring.run_totals import TEST_KEYS, RunTotals
from dtrain.planning.formatting import percent, pluralise
from dtrain.planning.plan import Plan


def evaluation_text(result: dict[str, Any]) -> str:
    """Return the result of `dtrain evaluate` for people."""
    per_block, samples = result["accuracy_per_block"], result["samples"]
    owner = "the vote's" if result["prediction"] == "vote" else "the last block's"
    loss = "-" if result["loss"] is None else f"{result['loss']:.4f}"
    lines = [
        f"folder    {result['folder']}",
        f"model     {result['objective']}, after {pluralise(result['updates'], 'update')} "
        f"({pluralise(result['epochs'], 'epoch')}), from {result['checkpoint']}",
        f"data      {pluralise(samples, 'sample')} of the {result['split']} split, "
        f"on {pluralise(result['ranks'], 'rank')}",
        f"loss      {loss}",
    ]
    if result["accuracy_vote"] is not None:
        counts = f" ({round(result['accuracy'] * samples):,} of {samples:,})"
        counts = counts if result["accuracy_of"] == "samples" else " of the positions"
        lines.append(f"accuracy  {percent(result['accuracy'])}{counts}, {owner}")
    lines += [
        f"{name:<9} {value_text(value)}"
        for name, value in result["metrics"].items()
        if name != "accuracy" or result["accuracy_vote"] is None
    ]
    if sum(accuracy is not None for accuracy in per_block) > 1:
        blocks = (f"{i}: {'-' if a is None else percent(a)}" for i, a in enumerate(per_block))
        lines += [f"vote      {percent(result['accuracy_vote'])}", f"blocks    {', '.join(blocks)}"]
    return "\n".join(lines) + "\n"


def metric_text(metrics: Mapping[str, float | None]) -> str:
    """Return the first metric for people, an accuracy without its name; empty where there is
    none."""
    for name, value in metrics.items():
        if name == "accuracy" and value is not None:
            return percent(value)
        return f"{name} {value_text(value)}"
    return ""


def value_text(value: float | None) -> str:
    """Return a metric for people."""
    return "-" if value is None else f"{value:.4g}"


def make_summary(
    plan: Plan, totals: RunTotals, status: str, digest: str | None = None
) -> dict[str, Any]:
    """Return the contents of `summary.json`; values that are not known yet are None.

    Lists of another length, which another layout of the same run left, become lists of None.
    """
    layout, stages = plan.layout, plan.layout.mesh.stages
    labels = plan.data.train.class_labels
    seconds = zip(totals.busy_s, totals.stage_s, strict=True)
    return {
        "status": status,
        "ranks": layout.mesh.ranks,
        "replicas": layout.mesh.replicas,
        "stages": layout.mesh.stages,
        "blocks": len(layout.block_layouts),
        "epochs": totals.update // plan.training_length.updates_per_epoch,
        "updates": totals.update,
        "samples": totals.samples,
        "attempts": totals.attempt,
        "wall_s": totals.wall_s,
        "samples_per_s": totals.samples_per_s,
        **speed_figures(plan, totals.samples_per_s, totals.latest),
        "peak_tflops": totals.latest.get("peak_tflops"),
        **{key: totals.latest.get(key) for key in SPREAD_KEYS},
        "train_loss": totals.train_loss,
        "train_loss_per_block": totals.losses(),
        **totals.metric_means(),
        **dict.fromkeys(TEST_KEYS),
        **totals.test,
        **totals.evaluations,
        "bytes_intra_node": totals.bytes_intra_node,
        "bytes_inter_node": totals.bytes_inter_node,
        **({"skipped_updates": skipped_updates(totals)} if totals.skips else {}),
        **low_rank_savings(totals.weights),
        "utilisation": _values_or_none(
            [busy / wall if wall else None for busy, wall in seconds], stages
        ),
        "peak_live_micros": _values_or_none(totals.peak_live, stages),
        "peak_memory_bytes": _values_or_none(totals.peak_bytes, layout.mesh.ranks),
        "rss_bytes": _values_or_none(totals.rss_bytes, layout.mesh.ranks),
        "staleness": list(plan.proof.staleness),
        "digest": digest,
        **({"class_labels": list(labels)} if labels else {}),
    }


def skipped_updates(totals: RunTotals) -> list[int]:
    """Return the number of updates that each block has skipped."""
    return [counts[0] for _, counts in sorted(totals.skips.items(), key=lambda row: int(row[0]))]


def low_rank_savings(weights: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return compression and saved traffic of low-rank weights, in total and by weight.

    `compression` is the model's elements over those of its factors. `traffic_saved` is the fraction
    of the bytes between nodes that `every-step` would have sent. Weights of full rank are listed in
    the total only.
    """

    def savings(entries: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
        elements, stored, sent, full = (
            sum(entry[key] for entry in entries) for key in ("numbers", "held", "sent", "plain")
        )
        return {
            "compression": elements / stored if stored else None,
            "traffic_saved": 1 - sent / full if full else None,
        }

    by_weight = {
        name: {"rank": entry["rank"], **savings([entry])}
        for name, entry in weights.items()
        if entry["rank"] is not None
    }
    return {**savings([*weights.values()]), "low_rank": dict(sorted(by_weight.items()))}


def _values_or_none(values: Sequence[Any], length: int) -> list[Any]:
    return list(values) if len(values) == length else [None] * length
