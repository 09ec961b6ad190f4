"""The keys of a run file, table by table: names, types and defaults.

Invariant: a field is a key, written with hyphens in the file. A strategy declares the keys of its
own table, beside `name`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dtrain.errors import ConfigError, unknown_name
from dtrain.object_names import object_name
from dtrain.schema import Table, kebab, to_table
from dtrain.tracking import TRACKERS
from dtrain.tracking.base import Tracker
from dtrain.user_code import PATTERN, GivenArray, value_text

STOP_SIGNALS = ("TERM", "USR1", "USR2")
"""Signals after which a run may save and end."""


CutFunction = Callable[[list[Any], int], list[Any]]
"""A user's function: (layers, blocks) -> names or indices at which blocks 1, 2, ... start."""


AUGMENTS = ("none", "crop-flip")
"""Changes of training samples that a run file names by one word."""


SAMPLERS = ("uniform", "balanced")
"""Samplers that a run file names by one word."""


def without_defaults(section: Any, *names: str) -> Table:
    """Return the table of a section, without those of its fields `names` that have the default."""
    defaults = {field.name: field.default for field in fields(section)}
    unchanged = {kebab(name) for name in names if getattr(section, name) == defaults[name]}
    return {key: value for key, value in to_table(section).items() if key not in unchanged}


@dataclass(frozen=True)
class StrategyChoice:
    """The name and the keys of a data set, model or optimizer, which is made later.

    Attributes
    ----------
    fields : dict
        The keys of the table beside `name`, in snake_case.
    target : object, optional
        The object that was given in Python; None: it is found by its name.
    fingerprint : str
        Identifies an object that its name does not.
    """

    name: str
    fields: Table
    target: Any = field(default=None, compare=False, repr=False)
    fingerprint: str = ""

    def to_table(self) -> Table:
        """Return the table of a run file that makes this choice, without the keys that are None."""
        values = {kebab(key): value for key, value in self.fields.items() if value is not None}
        fingerprint = {"fingerprint": self.fingerprint} if self.fingerprint else {}
        return {"name": self.name} | values | fingerprint


@dataclass(frozen=True)
class DataSection:
    """``[data]``: the keys that every data set has; the others belong to the named one.

    Attributes
    ----------
    normalise : bool
        Whether inputs are standardised with the statistics of the training split.
    channels : "first", "last" or int
        The axis of a sample along which statistics are kept, one mean and deviation per index.
    shuffle : "full" or "chunks"
        A random permutation of all samples, or of chunks of neighbouring samples, for large files.
    augment : str or callable
        Random changes of the training samples: "none", "crop-flip", or "module:function", a
        function (sample, index, epoch, generator) -> sample; in Python also the function itself.
    validation : float, str or tuple of str
        Share of the training split that is held out for validation; 0: none. Or the path of a file,
        or several, as `train` has them.
    labels : "as-stored" or "compact"
        The number of a class: its label, or the place of its label among the sorted distinct
        labels of the training split.
    sampler : str, callable or array
        How often training samples are drawn: "uniform", once per epoch; "balanced", each class
        equally often; or "module:function", a function of the training targets that returns one
        weight per sample; in Python also the function itself, or the weights.
    workers : int
        Processes per rank that read samples; 0: a thread.
    """

    normalise: bool = True
    channels: Literal["first", "last"] | int = "first"
    shuffle: Literal["full", "chunks"] = "full"
    augment: str | Callable[..., Any] = "none"
    validation: float | str | tuple[str, ...] = 0.0
    labels: Literal["as-stored", "compact"] = "as-stored"
    sampler: str | Callable[..., Any] | GivenArray = "uniform"
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuse names that are unknown."""
        if _is_unknown(self.augment, AUGMENTS):
            raise unknown_name("augment", str(self.augment), [*AUGMENTS, PATTERN])
        if _is_unknown(self.sampler, SAMPLERS):
            raise unknown_name("sampler", str(self.sampler), [*SAMPLERS, PATTERN])

    def to_table(self) -> Table:
        """Return the keys as a run file has them, without those that change nothing."""
        table = without_defaults(self, "validation", "channels", "labels", "sampler", "workers")
        texts = {key: value_text(table[key]) for key in ("augment", "sampler") if key in table}
        return table | texts


def _is_unknown(value: object, names: Sequence[str]) -> bool:
    """Return whether a value is a name, but none of these nor that of a user's object."""
    return isinstance(value, str) and value not in names and ":" not in value


@dataclass(frozen=True)
class ModelSection:
    """``[model]``: the keys that every model has; the others belong to the named one.

    Attributes
    ----------
    open : tuple of str
        Dotted names of sub-modules whose parts are layers of their own, so that a cut may stand
        inside. The containers around a layer that `[partition] cuts` names are open anyway.
    weights : str, optional
        File with initial weights, `.pt` or `.safetensors`, under the names of the model; or the
        folder of another run, whose newest checkpoint is taken.
    strict : bool
        Whether the file must hold every tensor of the model and no other.
    """

    open: tuple[str, ...] = ()
    weights: str | None = None
    strict: bool = True

    def to_table(self) -> Table:
        """Return the keys as a run file has them, without those that change nothing."""
        opened = {"open": list(self.open)} if self.open else {}
        strict = {} if self.strict else {"strict": False}
        return opened | ({"weights": self.weights} | strict if self.weights else {})


@dataclass(frozen=True)
class Mesh:
    """``[mesh]``: ranks along the model, and which axis stays inside a node.

    Attributes
    ----------
    stages : int, optional
        Ranks along the model; replicas = ranks / stages. Left out: all ranks.
    placement : "stages-in-node" or "replicas-in-node"
        The axis whose ranks share a node.
    shares : tuple of int, optional
        One number for each replica, in proportion to its speed: its part of the samples of an
        update. Left out: equal parts.
    """

    stages: int | None = None
    placement: Literal["stages-in-node", "replicas-in-node"] = "stages-in-node"
    shares: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Partition:
    """``[partition]``: where blocks start, which stage holds each, and how it is trained.

    Attributes
    ----------
    blocks : int, optional
        Number of blocks; left out: one per stage.
    balance : str
        The cost that the cuts balance over the blocks. "time" is measured before training.
    weights : tuple of float, optional
        One per block: its cost is divided by its weight before costs are balanced.
    recompute : bool or tuple of int
        All blocks, or those of these numbers, keep only input and output of a micro-batch and
        compute the rest again in the backward: less memory for one more forward.
    frozen : bool or tuple of int
        The layers of all blocks but the last, or of those of these numbers, keep their first
        weights.
    activation_compression : "exact" or "int8"
        Format in which per-sample tensors travel between blocks during training.
    cuts : tuple of int or str, str, or callable, optional
        First layers of all blocks but the first, by index or name, in place of balanced cuts. Or a
        function, or its name "module:function", that returns them.
    places : tuple of int, optional
        The stage of each block; left out: the schedule places them.
    """

    blocks: int | None = None
    balance: Literal["flops", "parameters", "layers", "memory", "time"] = "flops"
    weights: tuple[float, ...] | None = None
    recompute: bool | tuple[int, ...] = False
    frozen: bool | tuple[int, ...] = False
    activation_compression: Literal["exact", "int8"] = "exact"
    cuts: tuple[int | str, ...] | str | CutFunction | None = None
    places: tuple[int, ...] | None = None

    @property
    def explicit_cuts(self) -> tuple[int | str, ...] | None:
        """The cuts, None where they are balanced or a function chooses them."""
        cuts = self.cuts
        return None if cuts is None or isinstance(cuts, str) or callable(cuts) else tuple(cuts)

    @property
    def cut_function(self) -> str | CutFunction | None:
        """The function that chooses the cuts, or its name; None where there is none."""
        return None if self.explicit_cuts is not None else self.cuts  # type: ignore[return-value]

    @property
    def chosen_blocks(self) -> int | None:
        """The number of blocks that the keys say, None where the number of stages decides."""
        if self.explicit_cuts is not None:
            return len(self.explicit_cuts) + 1
        return len(self.places) if self.blocks is None and self.places else self.blocks

    def blocks_by_key(self) -> dict[str, tuple[int, ...]]:
        """Return the numbers of blocks that the run file lists, by key."""
        keys = {"recompute": self.recompute, "frozen": self.frozen}
        return {key: () if isinstance(value, bool) else value for key, value in keys.items()}

    def is_frozen(self, block: int, blocks: int) -> bool:
        """Return whether the layers of a block, one of `blocks`, keep their first weights."""
        if isinstance(self.frozen, bool):
            return self.frozen and block < blocks - 1
        return block in self.frozen


@dataclass(frozen=True)
class OptimizerSection:
    """``[optimizer]``: the keys that belong to dtrain, not to the optimizer.

    Attributes
    ----------
    clip : float
        Largest L2 norm of a gradient, after it was averaged over the replicas; 0: no limit.
    clip_over : "block" or "model"
        The gradient whose norm is limited. The norm of the model couples its blocks.
    scale_from : int
        Batch size for which lr and momentum are given, where it is not `batch-size`; 0 leaves
        them as they are.
    no_decay : tuple of str
        Patterns; parameters whose name, or whose module's class, contains one have a weight decay
        of 0.
    """

    clip: float = 0.0
    clip_over: Literal["block", "model"] = "block"
    scale_from: int = 0
    no_decay: tuple[str, ...] = ()

    def to_table(self) -> Table:
        """Return the keys as a run file has them, without those that change nothing."""
        clip = {"clip": self.clip, "clip-over": self.clip_over} if self.clip else {}
        scale_from = {"scale-from": self.scale_from} if self.scale_from else {}
        return clip | scale_from | ({"no-decay": self.no_decay} if self.no_decay else {})


@dataclass(frozen=True)
class Checkpoint:
    """``[checkpoint]``: after each epoch, and every `every` updates in it; the last `keep` stay.

    Attributes
    ----------
    every : int
        Updates between checkpoints inside an epoch; 0: after every epoch only.
    every_minutes : float
        Minutes after which a checkpoint is saved at the next possible update; 0: by updates only.
        It never changes what is trained.
    keep : int
        Complete checkpoints that remain.
    asynchronous : bool
        Copy the tensors to memory and write them behind the training.
    local : str, optional
        Folder on a disk of each node, with environment variables: checkpoints are written there,
        and copied from there behind the training.
    best : str, optional
        The metric whose best evaluation is kept beside them, in ``checkpoints/best``.
    signals : tuple of str
        Signals that let a run save and end with exit code 75: "TERM", "USR1", "USR2".
    stop_before_limit : "auto" or bool
        Save and end before the job's time ends, with exit code 75. "auto": in a Slurm job.
    """

    every: int = 0
    every_minutes: float = 0.0
    keep: int = 2
    asynchronous: bool = False
    local: str | None = None
    best: str | None = None
    signals: tuple[str, ...] = STOP_SIGNALS
    stop_before_limit: Literal["auto"] | bool = "auto"

    def to_table(self) -> Table:
        """Return the keys as a run file has them, without those that change nothing."""
        return without_defaults(
            self, "every_minutes", "asynchronous", "signals", "stop_before_limit"
        )


@dataclass(frozen=True)
class Evaluate:
    """``[evaluate]``: epochs between two evaluations, or updates, counted from the run's start.

    Attributes
    ----------
    every : int
        Epochs between two evaluations.
    every_updates : int
        Updates between two evaluations, in place of epochs; 0: `every` counts.
    """

    every: int = 1
    every_updates: int = 0

    def to_table(self) -> Table:
        """Return the one key that counts."""
        key = "every" if self.every_updates else "every_updates"
        table = to_table(self)
        del table[kebab(key)]
        return table


@dataclass(frozen=True)
class Stop:
    """``[stop]``: early stopping.

    Attributes
    ----------
    metric : str
        The metric that has to improve.
    patience : int
        Evaluations in a row without an improvement after which the run ends.
    min_delta : float
        A change that is not larger than this is no improvement.
    """

    metric: str = "loss"
    patience: int = 5
    min_delta: float = 0.0


@dataclass(frozen=True)
class Ema:
    """``[ema]``: exponential moving average of the weights.

    Attributes
    ----------
    decay : float
        Part of the average that remains in each update.
    start : int
        Updates after which the averaging begins; before, the average is a copy of the weights.
    evaluate : bool
        Whether every evaluation also tests the averaged weights.
    """

    decay: float = 0.999
    start: int = 0
    evaluate: bool = False


@dataclass(frozen=True)
class Log:
    """``[log]``: seconds between two lines of progress, norms, and the trackers of the run.

    Attributes
    ----------
    every_s : float
        Seconds between two lines of progress.
    norms : bool
        Record the norms of gradients and weights per block.
    trackers : tuple of str or Tracker
        Names of `dtrain.tracking.TRACKERS`, "module:Class", or objects; they receive the records
        that `metrics.jsonl` has.
    """

    every_s: float = 10.0
    norms: bool = False
    trackers: tuple[str | Tracker, ...] = ()

    def __post_init__(self) -> None:
        """Refuse names that are unknown."""
        for entry in self.trackers:
            if isinstance(entry, str) and entry not in TRACKERS and ":" not in entry:
                raise unknown_name(
                    "tracker", entry, [*TRACKERS, PATTERN], key="log.unknown-tracker"
                )

    def to_table(self) -> Table:
        """Return the keys as a run file has them; an object has the name of its class."""
        names = [
            entry if isinstance(entry, str) else object_name(type(entry)) for entry in self.trackers
        ]
        norms = {"norms": True} if self.norms else {}
        return {"every-s": self.every_s} | norms | ({"trackers": names} if names else {})


@dataclass(frozen=True)
class Numerics:
    """``[numerics]``: losses and gradients that are not finite, and replicas that differ.

    Attributes
    ----------
    non_finite : "stop" or "skip-update"
        After a loss that is NaN or infinite: end the run with exit code 4, or keep the weights and
        continue with the next update; the same for a gradient that is not finite.
    max_skipped : int
        Updates in a row that may be skipped; one more ends the run with exit code 4.
    check_replicas : int
        Updates between two comparisons of the replicas, whose weights must be equal; 0: none.
    """

    non_finite: Literal["stop", "skip-update"] = "stop"
    max_skipped: int = 10
    check_replicas: int = 0

    @property
    def skip_limit(self) -> int | None:
        """Updates in a row that may be skipped; None: none is."""
        return self.max_skipped if self.non_finite == "skip-update" else None

    def to_table(self) -> Table:
        """Return the keys as a run file has them, without those that change nothing."""
        return without_defaults(self, "non_finite", "max_skipped", "check_replicas")


@dataclass(frozen=True)
class Timeouts:
    """``[timeouts]``: seconds without progress after which a hanging run ends.

    The exit code is 6. A limit is at least ten times the longest pause that the run has had in the
    section; 0: no limit. A rank that makes progress, however slowly, ends no run.

    Attributes
    ----------
    start : float
        Checking the run, reading data, building blocks and loading a checkpoint.
    first_update : float
        The first update of a start.
    update : float
        All other updates.
    collective : float
        Agreements and records of all ranks, callbacks, and the end of the run.
    evaluation : float
        An evaluation.
    checkpoint : float
        Writing a checkpoint.
    """

    start: float = 3600.0
    first_update: float = 3600.0
    update: float = 600.0
    collective: float = 1800.0
    evaluation: float = 1800.0
    checkpoint: float = 1800.0

    def __post_init__(self) -> None:
        """Refuse negative limits and those that are no numbers."""
        for each in fields(self):
            seconds = getattr(self, each.name)
            if not 0 <= seconds < math.inf:
                raise ConfigError(
                    "timeouts.out-of-range",
                    f"[timeouts] {kebab(each.name)} = {seconds} must be a number of seconds, at "
                    "least 0 (0: no limit)",
                )

    def to_table(self) -> Table:
        """Return the keys as a run file has them, without those that have the default."""
        return without_defaults(self, *(each.name for each in fields(self)))

    def by_section(self) -> dict[str, float]:
        """Return the limits by the names of the keys."""
        return {kebab(each.name): getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class RunSection:
    """The keys outside any table.

    Attributes
    ----------
    seed : int
        Key of all random numbers.
    epochs : int, optional
        Length of the run; or `updates`.
    updates : int, optional
        Length of the run, in place of `epochs`.
    batch_size : int
        Samples of an update, over all replicas.
    micro_batches : int
        Parts of a replica's samples of an update, computed one after the other.
    segment : int
        Updates between two pipeline flushes; 0: the checkpoint interval, else the epoch.
    dtype : "float32" or "float64"
        Type of parameters and activations.
    device : "auto", "cpu" or "cuda"
        Device of the blocks; "auto": an accelerator where there is one.
    threads : int or "auto"
        Threads of a rank; "auto": the cores of the host divided by its ranks. `OMP_NUM_THREADS`
        wins.
    debug : bool
        Compare collective calls and replicas during the run; does not change what is trained.
    trace : bool
        Record when each rank computed what; does not change what is trained.
    """

    seed: int = 0
    epochs: int | None = None
    updates: int | None = None
    batch_size: int = 128
    micro_batches: int = 1
    segment: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    debug: bool = False
    trace: bool = False
