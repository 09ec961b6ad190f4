"""Build the contents of summary.json and the text of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dtrain.monitoring.run_totals import RunTotals
from dtrain.planning.plan import Plan
from dtrain.planning.report import TEST_KEYS, percent, pluralise


def evaluation_text(result: dict[str, Any]) -> str:
    """Return what `dtrain evaluate` found, for people."""
    per_block, samples = result["accuracy_per_block"], result["samples"]
    right = round(result["accuracy"] * samples)
    own = "the vote's" if result["prediction"] == "vote" else "the last block's"
    loss = "-" if result["loss"] is None else f"{result['loss']:.4f}"
    lines = [
        f"folder    {result['folder']}",
        f"model     {result['objective']}, after {pluralise(result['updates'], 'update')} "
        f"({pluralise(result['epochs'], 'epoch')}), from {result['checkpoint']}",
        f"tested    {pluralise(samples, 'sample')} of the {result['split']} split, "
        f"on {pluralise(result['ranks'], 'rank')}",
        f"loss      {loss}",
        f"accuracy  {percent(result['accuracy'])} ({right:,} of {samples:,}), {own}",
    ]
    if sum(each is not None for each in per_block) > 1:
        blocks = (f"{i}: {'-' if a is None else percent(a)}" for i, a in enumerate(per_block))
        lines += [f"vote      {percent(result['accuracy_vote'])}", f"blocks    {', '.join(blocks)}"]
    return "\n".join(lines) + "\n"


def make_summary(
    plan: Plan, totals: RunTotals, status: str, digest: str | None = None
) -> dict[str, Any]:
    """Return the contents of `summary.json`; what is not known yet is None.

    Lists that another layout of the same run left behind, of another length, are not known.
    """
    layout, stages = plan.layout, plan.layout.mesh.stages
    pairs = zip(totals.busy_s, totals.stage_s, strict=True)
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
        "train_loss": totals.train_loss,
        "train_loss_per_block": totals.losses(),
        **totals.metric_means(),
        **(totals.test or dict.fromkeys(TEST_KEYS)),
        "bytes_intra_node": totals.bytes_intra_node,
        "bytes_inter_node": totals.bytes_inter_node,
        **low_rank_savings(totals.weights),
        "utilisation": _values_or_none(
            [busy / wall if wall else None for busy, wall in pairs], stages
        ),
        "peak_live_micros": _values_or_none(totals.peak_live, stages),
        "peak_memory_bytes": _values_or_none(totals.peak_bytes, layout.mesh.ranks),
        "rss_bytes": _values_or_none(totals.rss_bytes, layout.mesh.ranks),
        "staleness": list(plan.proof.staleness),
        "digest": digest,
    }


def low_rank_savings(weights: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how much smaller a model is with its products as factors, and what that saved between
    nodes beside `every-step`; by weight, too, for those that were products."""

    def saved(entries: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
        numbers, held, sent, plain = (
            sum(entry[key] for entry in entries) for key in ("numbers", "held", "sent", "plain")
        )
        return {
            "compression": numbers / held if held else None,
            "traffic_saved": 1 - sent / plain if plain else None,
        }

    thin = {name: each for name, each in weights.items() if each["rank"] is not None}
    told = {name: {"rank": each["rank"], **saved([each])} for name, each in thin.items()}
    return {**saved([*weights.values()]), "low_rank": dict(sorted(told.items()))}


def _values_or_none(values: Sequence[Any], length: int) -> list[Any]:
    return list(values) if len(values) == length else [None] * length
