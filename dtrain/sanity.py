"""Sanity: keys of a run file that are out of range or exclude each other.

Invariant: pure in the run; the first thing that is wrong is refused, in words that say what to
write instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtrain import optimizers
from dtrain.errors import Refusal
from dtrain.foretell import suits

if TYPE_CHECKING:
    from dtrain.config import Run


def check(run: Run) -> None:
    """Refuse what is wrong between the keys of a run, whatever its data and ranks."""
    _ranges(run)
    optimizers.check(run.optimizer.name, run.optimizer.fields)
    suits(run.make_schedule().asks(), run.optimizer.name, run.optimizer.fields)
    _scales(run)
    _fits(run)


def _ranges(run: Run) -> None:
    """Refuse numbers that are out of range and keys that exclude each other."""
    top, cut = run.top, run.partition
    least = {
        "batch-size": (top.batch_size, 1),
        "micro-batches": (top.micro_batches, 1),
        "seed": (top.seed, 0),
        "segment": (top.segment, 0),
        "epochs": (top.epochs, 1),
        "updates": (top.updates, 1),
        "threads": (None if top.threads == "auto" else top.threads, 1),
        "[mesh] stages": (run.mesh.stages, 1),
        "[partition] blocks": (cut.blocks, 1),
        "[checkpoint] every": (run.checkpoint.every, 0),
        "[checkpoint] keep": (run.checkpoint.keep, 1),
        "[evaluate] every": (run.evaluate.every, 1),
    }
    for key, (value, low) in least.items():
        if value is not None and value < low:
            raise Refusal(f"{key} = {value} is too small: give at least {low}")
    if top.seed >= 2**63:
        raise Refusal(f"seed = {top.seed} is too large: give less than 2**63")
    if (top.epochs is None) == (top.updates is None):
        found = "neither stands there" if top.epochs is None else "both stand there"
        raise Refusal(f"a run has a length: give epochs or updates ({found})")
    if cut.cuts is not None and (cut.blocks is not None or cut.weights is not None):
        raise Refusal("[partition] cuts say where every block starts: leave out blocks and weights")


def _scales(run: Run) -> None:
    """Refuse a scaling that has no formula."""
    reference, fields = run.step.scale_from, run.optimizer.fields
    if reference < 0:
        raise Refusal(f"[optimizer] scale-from = {reference} is no batch: give 1 or more")
    suited = run.optimizer.name.lower() == "sgd" and 0 < fields.get("momentum", 0) < 1
    if reference and not suited:
        raise Refusal(
            "[optimizer] scale-from scales learning rate and momentum of sgd: give name = "
            '"sgd" and a momentum between 0 and 1, or leave it out'
        )


def _fits(run: Run) -> None:
    """Refuse a schedule that goes by what a sync puts something else in the place of: the
    optimizer's rule, or parameters that are still to be learnt."""
    schedule, sync = run.make_schedule(), run.make_sync()
    asked = schedule.asks()
    if schedule.late and sync.reforms:
        raise Refusal(
            f"[schedule] '{run.schedule.name}' learns late with weights that [sync] "
            f"'{run.sync.name}' has replaced by others: take a schedule that is never late"
        )
    if asked and sync.ruled:
        raise Refusal(
            f"[schedule] {asked[0]} goes by the rule of the optimizer, and [sync] "
            f"'{run.sync.name}' steps by its own: leave one of them out"
        )
