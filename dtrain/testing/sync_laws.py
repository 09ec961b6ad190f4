"""Laws of syncs: what every sync of dtrain keeps, and a user's own must keep."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.errors import NumericalError
from dtrain.objectives import MonoForward
from dtrain.syncs import PeriodicSync, Sync, SyncTraits
from dtrain.testing.laws import (
    BrokenLaw,
    Law,
    LawReport,
    check_laws,
    law_error,
    load_strategy,
    require_close,
    require_equal,
)
from dtrain.testing.small_run import NETS, Outcome, Strategies, make_run, train
from dtrain.testing.sync_updates import (
    UPDATES,
    BlockHistory,
    Snapshot,
    attach_block,
    clock_at,
    train_block,
)

HOSTS = "aab"
"""Nodes of two replicas and one."""


COPIES_TOLERANCE = 0.25
"""Copies of the parameters that small tensors of a sync may need beside those of its traits."""


def check_sync(sync: Sync | type[Sync] | str) -> LawReport:
    """Check a sync against the laws of training, in a few seconds.

    It trains one block with made-up gradients, and a small net, on replicas that are threads of
    this process, on two nodes. The training has 24 updates: choose fields with which the sync acts
    in these, as in ``check_sync(EveryNth(n=3))``.

    Parameters
    ----------
    sync : Sync, type or str
        An instance, a class that is instantiated with its defaults, or a name: "module:Class", or
        one word of a run file.

    Returns
    -------
    LawReport
        The laws that hold, and those that do not apply, with the reasons; `print` shows it.

    Raises
    ------
    LawError
        The first law that is broken, with figures and the usual cause.
    """
    name, instance = load_strategy("sync", sync)
    return check_laws(name, LAWS, _Subject(name, instance))


@dataclass
class _Subject:
    """A sync, and the runs of it that several laws compare."""

    name: str
    sync: Sync
    _histories: dict[str, list[BlockHistory]] = field(default_factory=dict)
    _outcomes: dict[tuple[int, int], Outcome] = field(default_factory=dict)

    @property
    def traits(self) -> SyncTraits:
        return self.sync.traits()

    def train_blocks(
        self, hosts: str = HOSTS, *, seed: int = 0, restarts: bool = False
    ) -> list[BlockHistory]:
        """Train one block with a replica on each host; return the histories of the replicas."""

        def work(comm: Comm) -> BlockHistory:
            comm.context.debug()
            return train_block(comm, self.sync, restarts=restarts)

        return run_ranks(len(hosts), work, seed=seed, hosts=list(hosts))

    def histories(self, hosts: str = HOSTS) -> list[BlockHistory]:
        """Train once for all laws that compare this training."""
        if hosts not in self._histories:
            self._histories[hosts] = self.train_blocks(hosts)
        return self._histories[hosts]

    def make_run(self) -> RunConfig:
        """Return the small run under the sync."""
        return make_run(NETS["vectors"], Strategies(MonoForward(), sync=self.sync), debug=True)

    def outcome(self, stages: int, replicas: int) -> Outcome:
        """Train once for all laws that compare this run; each replica has a node."""
        if (stages, replicas) not in self._outcomes:
            self._outcomes[stages, replicas] = self.train(stages, replicas)
        return self._outcomes[stages, replicas]

    def train(self, stages: int, replicas: int, **options: Any) -> Outcome:
        """Train the small run in debug mode, which compares replicas that are in sync."""
        hosts = [f"n{rank // stages}" for rank in range(stages * replicas)]
        try:
            return train(self.make_run(), stages, replicas, hosts=hosts, **options)
        except NumericalError as error:
            if error.key == "sync.replicas-differ":
                raise law_error(self.name, IN_SYNC, error.message) from error
            raise


# ---- the laws


def _in_sync(subject: _Subject) -> str | None:
    first, *others = subject.histories()
    for update, ours in first.in_sync.items():
        for replica, history in enumerate(others, 1):
            theirs = history.in_sync[update]
            if (ours is None) != (theirs is None):
                raise BrokenLaw(
                    f"after update {update} in_sync is {ours is not None} on replica 0 and "
                    f"{theirs is not None} on replica {replica}"
                )
            _require_same_replicas(ours or {}, theirs or {}, replica, f"after update {update}")
    if all(weights is None for weights in first.in_sync.values()):
        return f"in_sync is False after all {len(first.in_sync)} updates"
    return None


def _never_diverge(subject: _Subject) -> str | None:
    if subject.traits.replicas_diverge:
        return "its traits say that replicas diverge"
    first, *others = subject.histories()
    for update, ours in first.segment_ends.items():
        for replica, history in enumerate(others, 1):
            theirs = history.segment_ends[update]
            _require_same_replicas(ours, theirs, replica, f"after update {update}")
    return None


def _evaluation(subject: _Subject) -> None:
    first, *others = histories = subject.histories()
    for replica, history in enumerate(histories):
        if history.changed_by_evaluation:
            raise BrokenLaw(
                f"evaluating changes {history.changed_by_evaluation[0]} of replica {replica}"
            )
    for update, ours in first.shown.items():
        for replica, history in enumerate(others, 1):
            _require_same_replicas(ours, history.shown[update], replica, f"after update {update}")


def _require_same_replicas(ours: Snapshot, theirs: Snapshot, replica: int, when: str) -> None:
    require_equal(ours, theirs, (f"replica 0 {when}", f"replica {replica}"))


def _deterministic(subject: _Subject) -> None:
    for seed in (1, 2):
        other = subject.train_blocks(seed=seed)
        _require_same_end(subject.histories(), other, ("one order of the ranks", "another"))


def _restart(subject: _Subject) -> None:
    names = "an uninterrupted training", "one that was restored after every update"
    _require_same_end(subject.histories(), subject.train_blocks(restarts=True), names)


def _require_same_end(
    one: Sequence[BlockHistory], other: Sequence[BlockHistory], names: tuple[str, str]
) -> None:
    for ours, theirs in zip(one, other, strict=True):
        require_equal(ours.final, theirs.final, names)
        last = max(ours.shown)
        require_equal(ours.shown[last], theirs.shown[last], names)


def _due(subject: _Subject) -> str | None:
    if not isinstance(subject.sync, PeriodicSync):
        return "it is no PeriodicSync"
    answers = run_ranks(3, lambda comm: _is_due(comm, subject.sync), hosts=list(HOSTS))
    for replica, own_answers in enumerate(answers):
        for update, due in enumerate(own_answers):
            expected = answers[0][update][0]
            if due != [expected] * len(due):
                raise BrokenLaw(
                    f"is_due after update {update} is {expected} at first on replica 0, and "
                    f"{' then '.join(map(str, due))} on replica {replica}"
                )
    return None


def _is_due(comm: Comm, sync: Sync) -> list[list[bool]]:
    """Return for each update what `is_due` returns, twice."""
    own_sync, _ = attach_block(comm, sync)
    assert isinstance(own_sync, PeriodicSync)
    clocks = [clock_at(update, (2, 2, 1)) for update in range(UPDATES)]
    return [[bool(own_sync.is_due(clock)) for _ in range(2)] for clock in clocks]


def _memory(subject: _Subject) -> str | None:
    traits = subject.traits
    if traits.reparametrises:
        return "its traits say that it replaces parameters, whose number changes"
    held = max(history.peak_copies for history in subject.histories())
    if held > traits.parameter_copies + COPIES_TOLERANCE:
        raise BrokenLaw(
            f"it holds {held:.2f} copies of the trained parameters, and its traits state "
            f"{traits.parameter_copies}"
        )
    return None


def _traffic(subject: _Subject) -> str | None:
    alone = subject.histories("a")[0].bytes_sent
    if alone:
        raise BrokenLaw(f"one replica sends {alone:,} bytes in {UPDATES} updates")
    if not any(history.bytes_sent for history in subject.histories()):
        return f"3 replicas send nothing in {UPDATES} updates: choose fields with which it acts"
    return None


def _replicas(subject: _Subject) -> str | None:
    traits = subject.traits
    reasons = {
        "replicas diverge": traits.replicas_diverge,
        "its transfers lose information": traits.lossy,
    }
    for reason, applies in reasons.items():
        if applies:
            return f"its traits say that {reason}"
    one, three = subject.outcome(1, 1), subject.outcome(1, 3)
    require_close(one.weights[0], three.weights[0], ("1 replica", "3 replicas"))
    return None


def _stages(subject: _Subject) -> None:
    one, three = subject.outcome(1, 2), subject.outcome(3, 2)
    require_equal(one.weights[0], three.weights[0], ("1 stage", "3 stages"))


def _resumed(subject: _Subject) -> None:
    whole = subject.outcome(1, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subject.train(1, 2, folder=folder, stop_after=1)
        parts = subject.train(1, 2, folder=folder)
    names = "a run without interruption", "one that was resumed after an epoch"
    require_equal(whole.weights[0], parts.weights[0], names)


IN_SYNC: Law[_Subject] = Law(
    "in-sync",
    "all replicas hold the same parameters, to the bit, wherever in_sync is True",
    "in_sync that stays True when a replica steps alone: set it in after_update; a mean that "
    "not all replicas take",
    _in_sync,
)
LAWS: tuple[Law[_Subject], ...] = (
    Law(
        "due",
        "is_due returns the same on all replicas, and for the same clock again",
        "is_due that depends on the rank, on a time, or on a counter of its calls",
        _due,
    ),
    IN_SYNC,
    Law(
        "never-diverge",
        "replicas are equal at the end of every segment, if the traits say that they never diverge",
        "an update that one replica applies alone; random numbers of a replica's own",
        _never_diverge,
    ),
    Law(
        "evaluation",
        "all replicas evaluate the same weights, and evaluating them changes nothing",
        "evaluation_weights that returns a replica's own weights, or averages them in place",
        _evaluation,
    ),
    Law(
        "deterministic",
        "the order in which ranks compute changes no bit",
        "a choice by time, by the arrival of a message, or by torch's generator",
        _deterministic,
    ),
    Law(
        "restart",
        "state and restore after every update change no bit",
        "an attribute that decides what happens and that state does not return, or restore does "
        "not load",
        _restart,
    ),
    Law(
        "memory",
        "it holds no more copies of the parameters than its traits state",
        "parameter_copies of the traits, which planned and counted memory include",
        _memory,
    ),
    Law(
        "traffic",
        "one replica sends nothing",
        "a collective call over all ranks instead of the replicas",
        _traffic,
    ),
    Law(
        "replicas",
        "3 replicas, one of them without samples, train the same as 1, up to rounding, unless they "
        "diverge or transfers lose information",
        "a mean of means: weight the gradients of a replica by `weight`; traits that do not say "
        "what the sync does",
        _replicas,
    ),
    Law(
        "stages",
        "1 and 3 stages train the same bits",
        "a communicator of all ranks instead of the replicas of the block; a global",
        _stages,
    ),
    Law(
        "resumed",
        "a run that is resumed from a checkpoint ends in the same bits as one without interruption",
        "a trait that does not say that replicas diverge, or that parameters are replaced",
        _resumed,
    ),
)
"""The laws, in the order in which they are tested."""
