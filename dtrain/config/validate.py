"""Sanity: keys of a run file that are out of range or exclude each other.

Invariant: pure in the run; the first thing that is wrong is refused, in words that say what to
write instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtrain.block import optimizer as optimizers
from dtrain.block.weight_prediction import VELOCITY_PREDICTIONS
from dtrain.errors import ConfigError

if TYPE_CHECKING:
    from dtrain.config.run import RunConfig


def check_optimizer_requirements(
    requirements: Sequence[str], name: str, fields: Mapping[str, Any]
) -> None:
    """Refuse keys of a schedule that an optimizer has no rule for.

    Parameters
    ----------
    asked : sequence of str
        Keys and values, as `Schedule.asks` gives them.
    name, fields
        Of the optimizer.
    """
    kind = name.replace("-", "").lower()
    for key in requirements:
        value = key.split('"')[1]
        if value == "difference":
            continue
        if value == "optimizer":
            if kind not in ("sgd", "adam", "adamw"):
                raise ConfigError(
                    "todo.key",
                    f"[schedule] {key} knows the steps of sgd, adam and adamw, not of '{name}': "
                    'set prediction = "difference", which goes by the weights alone',
                )
            if kind != "sgd":
                continue
        if kind != "sgd":
            other = (
                'prediction = "optimizer" or "difference"'
                if value in VELOCITY_PREDICTIONS
                else "sgd"
            )
            raise ConfigError(
                "todo.key",
                f"[schedule] {key} goes by the velocity of sgd, and the optimizer is '{name}': "
                f"take {other}",
            )
        if value != "spike" and not fields.get("momentum"):
            raise ConfigError(
                "todo.key",
                f"[schedule] {key} goes by a velocity, and [optimizer] momentum is 0: give a "
                'momentum, or set prediction = "difference"',
            )
        for field in ("dampening", "nesterov", "maximize"):
            if fields.get(field):
                raise ConfigError(
                    "todo.key",
                    f"[schedule] {key} has no formula for [optimizer] {field}: leave it out",
                )


def validate_run(run: RunConfig) -> None:
    """Refuse what is wrong between the keys of a run, whatever its data and ranks."""
    _check_ranges(run)
    optimizers.check_optimizer(run.optimizer.name, run.optimizer.fields)
    check_optimizer_requirements(
        run.make_schedule().optimizer_requirements(), run.optimizer.name, run.optimizer.fields
    )
    _check_lr_scaling(run)
    _check_schedule_and_sync(run)


def _check_ranges(run: RunConfig) -> None:
    """Refuse numbers that are out of range and keys that exclude each other."""
    top, cut = run.settings, run.partition
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
            raise ConfigError("todo.key", f"{key} = {value} is too small: give at least {low}")
    if top.seed >= 2**63:
        raise ConfigError("todo.key", f"seed = {top.seed} is too large: give less than 2**63")
    if (top.epochs is None) == (top.updates is None):
        found = "neither stands there" if top.epochs is None else "both stand there"
        raise ConfigError("todo.key", f"a run has a length: give epochs or updates ({found})")
    if cut.cuts is not None and (cut.blocks is not None or cut.weights is not None):
        raise ConfigError(
            "todo.key",
            "[partition] cuts say where every block starts: leave out blocks and weights",
        )


def _check_lr_scaling(run: RunConfig) -> None:
    """Refuse a scaling that has no formula."""
    reference, fields = run.optimizer_options.scale_from, run.optimizer.fields
    if reference < 0:
        raise ConfigError(
            "todo.key", f"[optimizer] scale-from = {reference} is no batch: give 1 or more"
        )
    suited = run.optimizer.name.lower() == "sgd" and 0 < fields.get("momentum", 0) < 1
    if reference and not suited:
        raise ConfigError(
            "todo.key",
            "[optimizer] scale-from scales learning rate and momentum of sgd: give name = "
            '"sgd" and a momentum between 0 and 1, or leave it out',
        )


def _check_schedule_and_sync(run: RunConfig) -> None:
    """Refuse a schedule that goes by what a sync puts something else in the place of: the
    optimizer's rule, or parameters that are still to be learnt."""
    schedule, traits = run.make_schedule(), run.make_sync().traits()
    asked = schedule.optimizer_requirements()
    if schedule.asynchronous and traits.reparametrises:
        raise ConfigError(
            "todo.key",
            f"[schedule] '{run.schedule.name}' learns late with weights that [sync] "
            f"'{run.sync.name}' has replaced by others: take a schedule that is never late",
        )
    if asked and traits.replaces_optimizer:
        raise ConfigError(
            "todo.key",
            f"[schedule] {asked[0]} goes by the rule of the optimizer, and [sync] "
            f"'{run.sync.name}' steps by its own: leave one of them out",
        )
