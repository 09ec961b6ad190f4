"""Check that the keys of a run file are in range and fit each other.

Invariant: the checks depend on the run alone. The first mistake is refused, with its fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.block.optimizer import check_optimizer
from dtrain.block.weight_prediction import VELOCITY_PREDICTIONS
from dtrain.config.run import RunConfig
from dtrain.config.sections import STOP_SIGNALS, StrategyChoice
from dtrain.errors import ConfigError, unknown_name


def validate_run(run: RunConfig) -> None:
    """Refuse mistakes between the keys of a run, whatever its data and ranks.

    Raises
    ------
    ConfigError
        A number is out of range, or keys exclude each other.
    """
    _check_minima(run)
    _check_length(run)
    _check_cuts(run)
    check_optimizer(run.optimizer.name, run.optimizer.fields)
    if run.optimizer_rest is not None:
        rest = run.optimizer_rest
        check_optimizer(rest.name, rest.fields, "optimizer.rest", extra_keys=())
    for optimizer in _optimizers(run):
        check_optimizer_requirements(
            run.schedule.instance.optimizer_requirements(), optimizer.name, optimizer.fields
        )
    _check_lr_scaling(run)
    _check_schedule_and_sync(run)
    _check_validation(run)
    _check_shares(run)
    _check_channels(run)
    _check_labels(run)
    _check_ema(run)
    _check_signals(run)
    _check_local_checkpoints(run)


def _optimizers(run: RunConfig) -> list[StrategyChoice]:
    """Return the optimizer of a run, and that of ``[optimizer.rest]``."""
    return [run.optimizer, *([] if run.optimizer_rest is None else [run.optimizer_rest])]


def check_optimizer_requirements(
    requirements: Sequence[str], name: str, fields: Mapping[str, Any]
) -> None:
    """Refuse keys of a schedule that have no formula for an optimizer.

    Parameters
    ----------
    requirements : sequence of str
        Keys and values, as `Schedule.optimizer_requirements` returns them.
    name, fields
        Those of the optimizer.

    Raises
    ------
    ConfigError
        The schedule predicts or compensates with the state of another optimizer.
    """
    kind = name.replace("-", "").lower()
    for requirement in requirements:
        value = requirement.split('"')[1]
        if value == "difference":
            continue
        if value == "optimizer":
            if kind not in ("sgd", "adam", "adamw"):
                raise ConfigError(
                    "schedule.optimizer-without-formula",
                    f"[schedule] {requirement} has formulas for sgd, adam and adamw, not for "
                    f"'{name}': set prediction = \"difference\", which needs only the weights",
                )
            if kind != "sgd":
                continue
        _check_velocity(requirement, value, name, fields)


def _check_velocity(requirement: str, value: str, name: str, fields: Mapping[str, Any]) -> None:
    """Refuse a prediction or compensation that needs the velocity of SGD, where there is none."""
    if name.replace("-", "").lower() != "sgd":
        others = 'prediction = "optimizer" or "difference"'
        raise ConfigError(
            "schedule.needs-sgd",
            f"[schedule] {requirement} needs the velocity of sgd, but the optimizer is '{name}': "
            f"set {others if value in VELOCITY_PREDICTIONS else 'the optimizer to sgd'}",
        )
    if value != "spike" and not fields.get("momentum"):
        raise ConfigError(
            "schedule.needs-momentum",
            f"[schedule] {requirement} needs a velocity, but [optimizer] momentum is 0: give a "
            'momentum, or set prediction = "difference"',
        )
    for field in ("dampening", "nesterov", "maximize"):
        if fields.get(field):
            raise ConfigError(
                "schedule.sgd-field-without-formula",
                f"[schedule] {requirement} has no formula for [optimizer] {field}: leave it out",
            )


def _check_minima(run: RunConfig) -> None:
    """Refuse numbers that are too small, and a seed that is too large."""
    settings, partition = run.settings, run.partition
    minima = {
        "batch-size": (settings.batch_size, 1),
        "micro-batches": (settings.micro_batches, 1),
        "seed": (settings.seed, 0),
        "segment": (settings.segment, 0),
        "epochs": (settings.epochs, 1),
        "updates": (settings.updates, 1),
        "threads": (None if settings.threads == "auto" else settings.threads, 1),
        "[data] workers": (run.data.workers, 0),
        "[mesh] stages": (run.mesh.stages, 1),
        "[partition] blocks": (partition.blocks, 1),
        "[checkpoint] every": (run.checkpoint.every, 0),
        "[checkpoint] every-minutes": (run.checkpoint.every_minutes, 0),
        "[checkpoint] keep": (run.checkpoint.keep, 1),
        "[evaluate] every": (run.evaluate.every, 1),
        "[evaluate] every-updates": (run.evaluate.every_updates, 0),
        "[stop] patience": (None if run.stop is None else run.stop.patience, 1),
        "[stop] min-delta": (None if run.stop is None else run.stop.min_delta, 0),
        "[numerics] max-skipped": (run.numerics.max_skipped, 1),
        "[numerics] check-replicas": (run.numerics.check_replicas, 0),
        "[ema] start": (None if run.ema is None else run.ema.start, 0),
    }
    for key, (value, minimum) in minima.items():
        if value is not None and value < minimum:
            raise ConfigError(
                "run-file.number-too-small",
                f"{key} = {value} is too small: give at least {minimum}",
            )
    if settings.seed >= 2**63:
        raise ConfigError(
            "run-file.seed-too-large", f"seed = {settings.seed} is too large: give less than 2**63"
        )


def _check_shares(run: RunConfig) -> None:
    """Refuse shares of replicas that are not positive, and a sync that would ignore them."""
    shares = run.mesh.shares
    if shares is not None and min(shares, default=0) < 1:
        raise ConfigError(
            "mesh.share-too-small",
            f"[mesh] shares = {list(shares)}: give one number for each replica, at least 1, in "
            "proportion to its speed",
        )
    if len(set(shares or ())) > 1 and not run.sync.instance.traits().weighs_samples:
        raise ConfigError(
            "mesh.shares-sync",
            f"[mesh] shares = {list(shares or ())}, but the sync '{run.sync.name}' counts every "
            "replica alike, however many samples it has: leave out shares, or set [sync] name = "
            '"every-step", whose means are over samples',
        )


def _check_validation(run: RunConfig) -> None:
    """Refuse a share of the training split that is none."""
    share = run.data.validation
    if isinstance(share, float) and not 0 <= share < 1:
        raise ConfigError(
            "data.validation-no-share",
            f"[data] validation = {share} must be at least 0 and less than 1, or a path",
        )


def _check_local_checkpoints(run: RunConfig) -> None:
    """Refuse two ways of saving behind the training at once."""
    if run.checkpoint.asynchronous and run.checkpoint.local is not None:
        raise ConfigError(
            "checkpoint.two-ways",
            "[checkpoint] asynchronous = true copies to memory, and local to a disk of the node: "
            "leave one of them out",
        )


def _check_signals(run: RunConfig) -> None:
    """Refuse names of signals after which a run cannot save and end."""
    for name in run.checkpoint.signals:
        if name not in STOP_SIGNALS:
            raise unknown_name(
                "signal", name.removeprefix("SIG"), STOP_SIGNALS, key="checkpoint.unknown-signal"
            )


def _check_channels(run: RunConfig) -> None:
    """Refuse an axis that is counted from the end, and images that have no channels first."""
    channels, augment = run.data.channels, run.data.augment
    if isinstance(channels, int) and channels < 0:
        raise ConfigError(
            "data.channels-negative",
            f'[data] channels = {channels} counts from the end: give "first", "last", or an axis '
            "of a sample from 0",
        )
    if augment == "crop-flip" and channels not in ("first", 0):
        raise ConfigError(
            "data.augment-channels",
            f'[data] augment = "crop-flip" needs images (channels, height, width), but channels = '
            f'{channels!r}: store the images with channels first, or set augment = "none"',
        )


def _check_labels(run: RunConfig) -> None:
    """Refuse to number class labels where the loss has none."""
    has_labels = run.task.kind_of(is_integer=True) == "classes" and run.task.target == "data"
    if run.data.labels == "compact" and not has_labels:
        target = ' and target = "input"' if run.task.target == "input" else ""
        raise ConfigError(
            "data.compact-without-classes",
            f'[data] labels = "compact" numbers class labels, but [task] loss = '
            f'"{run.task.loss_name}"{target} has none: leave labels out',
        )


def _check_ema(run: RunConfig) -> None:
    """Refuse an average of weights without a decay between 0 and 1, or of unequal replicas."""
    if run.ema is None:
        return
    if not 0 <= run.ema.decay < 1:
        raise ConfigError(
            "ema.decay-out-of-range",
            f"[ema] decay = {run.ema.decay} must be at least 0 and less than 1",
        )
    traits = run.sync.instance.traits()
    if not traits.keeps_weights_equal:
        reason = (
            "replaces weights by products of factors"
            if traits.reparametrises
            else "lets replicas differ between two synchronisations"
        )
        raise ConfigError(
            "ema.sync",
            f"[ema] averages the weights of equal replicas, but [sync] '{run.sync.name}' {reason}: "
            'set [sync] name = "every-step" or leave out [ema]',
        )


def _check_length(run: RunConfig) -> None:
    """Refuse a run without a length, or with two."""
    epochs, updates = run.settings.epochs, run.settings.updates
    if (epochs is None) == (updates is None):
        mistake = "neither is set" if epochs is None else "both are set"
        raise ConfigError("run-file.length", f"{mistake}: set either epochs or updates")


def _check_cuts(run: RunConfig) -> None:
    """Refuse keys that say again what explicit cuts say."""
    partition = run.partition
    if partition.explicit_cuts is not None and (
        partition.blocks is not None or partition.weights is not None
    ):
        raise ConfigError(
            "partition.cuts-exclude-blocks",
            "[partition] cuts already say where every block starts: leave out blocks and weights",
        )
    if partition.cut_function is not None and partition.weights is not None:
        raise ConfigError(
            "partition.function-excludes-weights",
            "[partition] cuts names a function, which decides alone where blocks start: leave out "
            "weights",
        )


def _check_lr_scaling(run: RunConfig) -> None:
    """Refuse a scaling of learning rate and momentum that has no formula."""
    reference = run.optimizer_options.scale_from
    if reference < 0:
        raise ConfigError(
            "optimizer.scale-from-negative",
            f"[optimizer] scale-from = {reference} must be a batch size of at least 1 (0: no "
            "scaling)",
        )
    has_formula = all(
        optimizer.name.lower() == "sgd" and 0 < optimizer.fields.get("momentum", 0) < 1
        for optimizer in _optimizers(run)
    )
    if reference and not has_formula:
        raise ConfigError(
            "optimizer.scale-from-needs-momentum",
            "[optimizer] scale-from scales learning rate and momentum of sgd: set name = "
            '"sgd" and a momentum between 0 and 1, or leave it out',
        )


def _check_schedule_and_sync(run: RunConfig) -> None:
    """Refuse a schedule that needs the optimizer step, or the parameters, that a sync replaces."""
    schedule, traits = run.schedule.instance, run.sync.instance.traits()
    requirements = schedule.optimizer_requirements()
    if schedule.asynchronous and traits.reparametrises:
        raise ConfigError(
            "schedule.sync-reparametrises",
            f"[schedule] '{run.schedule.name}' applies delayed gradients, and [sync] "
            f"'{run.sync.name}' replaces the parameters meanwhile: set a synchronous schedule",
        )
    if requirements and traits.replaces_optimizer:
        raise ConfigError(
            "schedule.sync-replaces-optimizer",
            f"[schedule] {requirements[0]} relies on the optimizer step that [sync] "
            f"'{run.sync.name}' replaces: leave one of them out",
        )
