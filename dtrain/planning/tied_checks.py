"""Refuse runs that could not keep the copies of a tied parameter equal.

Invariant: the checks depend on the run and on the blocks alone, so all ranks refuse the same runs.
"""

from __future__ import annotations

from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.models.ties import Tie, Ties
from dtrain.schedules.update_lags import UpdateCycles

CURE = "or cut so that one block holds both"


def check_ties(run: RunConfig, ties: Ties, cycles: UpdateCycles | None, blocks: int) -> Ties:
    """Return the ties that are trained.

    Parameters
    ----------
    cycles : UpdateCycles or None
        Those of the schedule, if it has some.
    blocks : int
        Number of blocks of the run.

    Raises
    ------
    ConfigError
        The schedule, its options, the clip, the sync or frozen blocks would make copies differ.
    """
    ties = tuple(tie for tie in ties if _is_trained(run, tie, blocks))
    if not ties:
        return ()
    first, last, *_ = ties[0].copies
    where = (
        f"'{first.name}' of block {first.block} and '{last.name}' of block {last.block} are one "
        f"parameter"
    )
    _check_schedule(run, where, cycles)
    options = run.optimizer_options
    if options.clip and options.clip_over == "block":
        raise ConfigError(
            "model.tied-clip",
            f"{where}, but each block clips its own gradient: set [optimizer] clip-over = "
            f'"model", {CURE}',
        )
    _check_sync(run, where, cycles)
    return ties


def _is_trained(run: RunConfig, tie: Tie, blocks: int) -> bool:
    """Return whether the blocks of a tie are trained; refuse one that is frozen in some of them."""
    frozen = {run.partition.is_frozen(block, blocks) for block in tie.blocks}
    if len(frozen) > 1:
        raise ConfigError(
            "model.tied-frozen",
            f"'{tie.copies[0].name}' is trained in one block and frozen in another: freeze both "
            f"blocks or none, {CURE}",
        )
    return frozen == {False}


def _check_schedule(run: RunConfig, where: str, cycles: UpdateCycles | None) -> None:
    """Refuse a schedule without lags, and options that need one delay for all gradients."""
    schedule = run.schedule.instance
    if not schedule.flushes and cycles is None:
        raise ConfigError(
            "model.tied-schedule",
            f"{where}, but '{run.schedule.name}' updates blocks at different times, which depend "
            f'on the number of ranks: set schedule.name = "1f1b" or "fill-drain", {CURE}',
        )
    if not schedule.flushes and run.numerics.skip_limit is not None:
        raise ConfigError(
            "model.tied-skip",
            f"{where}, but '{run.schedule.name}' adds gradients of several updates, of which "
            f'[numerics] non-finite may skip one: set schedule.name = "1f1b", {CURE}',
        )
    requirements = schedule.optimizer_requirements()
    if requirements:
        raise ConfigError(
            "model.tied-delays",
            f"{where}, but [schedule] {requirements[0]} needs the delay of a gradient, and a step "
            f"of this parameter adds gradients of different delays: leave it out (weights = "
            f'"stash" is possible), {CURE}',
        )


def _check_sync(run: RunConfig, where: str, cycles: UpdateCycles | None) -> None:
    """Refuse a sync whose steps differ between copies, or that ends a segment before its last
    step."""
    traits = run.sync.instance.traits()
    if traits.lossy or traits.reparametrises or traits.replaces_optimizer:
        raise ConfigError(
            "model.tied-sync",
            f"{where}, and the sync '{run.sync.name}' would change its copies differently: choose "
            f"a sync that does not compress, {CURE}",
        )
    if cycles is not None and traits.replicas_diverge:
        raise ConfigError(
            "model.tied-diverging-sync",
            f"{where}, and '{run.schedule.name}' applies its last gradients after the last update "
            f"of a segment, when the sync '{run.sync.name}' has averaged the replicas: set "
            f'sync.name = "every-step", {CURE}',
        )
