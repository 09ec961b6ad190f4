"""One checked run, and the resolved text of it that a run folder keeps.

Invariant: `read_run` refuses every mistake that a run file can have by itself. `make_plan` refuses
mistakes that depend on the data or on the number of ranks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.block.lr_schedule import LRSchedule
from dtrain.block.optimizer import DEFAULT_LR, OptimizerSettings, scale_lr_and_momentum
from dtrain.config.sections import (
    Checkpoint,
    DataSection,
    Ema,
    Evaluate,
    Log,
    Mesh,
    ModelSection,
    Numerics,
    OptimizerSection,
    Partition,
    RunSection,
    Stop,
    StrategyChoice,
    Timeouts,
)
from dtrain.config.strategies import NamedStrategy, name_strategy
from dtrain.object_names import object_name
from dtrain.objectives.base import Objective
from dtrain.partition import check_places
from dtrain.paths import expand_text
from dtrain.schedules.base import Schedule
from dtrain.schema import Table, dump_toml, to_table
from dtrain.syncs.base import Sync
from dtrain.tasks.task import DEFAULT_TASK, Task

RUN_FILE_HEADER = "# resolved from {}, where relative paths and imports start"
"""The first line of the `run.toml` of a run folder."""


@dataclass(frozen=True)
class RunConfig:
    """One checked run.

    Objective, schedule, sync and learning-rate schedule may be given as plain instances; they are
    named then.

    Attributes
    ----------
    path : Path
        The run file; relative paths and imports start in its folder.
    overrides : tuple of str
        The ``--set`` options, as they were typed.
    optimizer_rest : StrategyChoice or None
        The optimizer of the parameters that are no hidden matrices; None: `optimizer` has all.
    stop, ema : Stop, Ema or None
        Early stopping, and the average of the weights; None: without.
    """

    path: Path
    overrides: tuple[str, ...]
    settings: RunSection
    data: DataSection
    dataset: StrategyChoice
    model: StrategyChoice
    model_options: ModelSection
    mesh: Mesh
    partition: Partition
    objective: NamedStrategy[Objective]
    schedule: NamedStrategy[Schedule]
    sync: NamedStrategy[Sync]
    optimizer: StrategyChoice
    optimizer_options: OptimizerSection
    lr_schedule: NamedStrategy[LRSchedule]
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    log: Log = field(default_factory=Log)
    task: Task = DEFAULT_TASK
    optimizer_rest: StrategyChoice | None = None
    stop: Stop | None = None
    ema: Ema | None = None
    numerics: Numerics = field(default_factory=Numerics)
    timeouts: Timeouts = field(default_factory=Timeouts)

    def __post_init__(self) -> None:
        """Name the strategies that were given as plain instances."""
        fields = {"objective": "objective", "schedule": "schedule", "sync": "sync"}
        for section, name in (fields | {"lr": "lr_schedule"}).items():
            strategy = getattr(self, name)
            if not isinstance(strategy, NamedStrategy):
                object.__setattr__(self, name, name_strategy(section, strategy))

    @property
    def folder(self) -> Path:
        """Folder in which relative paths and imports start."""
        return self.path.parent

    @property
    def stages(self) -> int | None:
        """The number of stages that the keys say, None where the number of ranks decides."""
        places = self.partition.places
        return max(places) + 1 if self.mesh.stages is None and places else self.mesh.stages

    @property
    def weights_path(self) -> Path | None:
        """The file with initial weights, None where the run file names none."""
        name = self.model_options.weights
        if name is None:
            return None
        return self.folder / expand_text(name, "[model] weights =", self.folder)

    def open_modules(self) -> frozenset[str]:
        """Return the dotted names of the sub-modules whose parts are layers of their own."""
        cuts = [cut for cut in self.partition.explicit_cuts or () if isinstance(cut, str)]
        paths = [cut.partition("@")[0].split(".") for cut in cuts]
        around = {".".join(path[:end]) for path in paths for end in range(1, len(path))}
        return frozenset({*self.model_options.open, *around})

    def new_sync(self) -> Sync:
        """Return a fresh copy of the sync; every block needs one of its own."""
        return copy.deepcopy(self.sync.instance)

    def optimizer_settings(self) -> OptimizerSettings:
        """Return the optimizer, with lr and momentum scaled to the run's batch size."""
        no_decay, rest = self.optimizer_options.no_decay, self.optimizer_rest
        return OptimizerSettings(
            self.optimizer.name,
            self._scale_fields(self.optimizer.fields),
            no_decay,
            None
            if rest is None
            else OptimizerSettings(rest.name, self._scale_fields(rest.fields), no_decay),
        )

    def _scale_fields(self, fields: Table) -> Table:
        """Return an optimizer's fields, with lr and momentum scaled to the run's batch size."""
        fields, reference = dict(fields), self.optimizer_options.scale_from
        if reference:
            fields["lr"], fields["momentum"] = scale_lr_and_momentum(
                fields.get("lr", DEFAULT_LR),
                fields["momentum"],
                self.settings.batch_size,
                reference,
            )
        return fields

    def to_table(self) -> Table:
        """Return the resolved run as the nested tables of a run file, defaults included."""
        tables = {
            "data": self.dataset.to_table() | self.data.to_table(),
            "model": self.model.to_table() | self.model_options.to_table(),
            "mesh": to_table(self.mesh),
            "partition": to_table(self.partition),
            "objective": self.objective.to_table(),
            "schedule": self.schedule.to_table(),
            "sync": self.sync.to_table(),
            "optimizer": self.optimizer.to_table() | self.optimizer_options.to_table(),
            "lr": self.lr_schedule.to_table(),
            "checkpoint": self.checkpoint.to_table(),
            "evaluate": self.evaluate.to_table(),
            "log": self.log.to_table(),
        }
        if timeouts := self.timeouts.to_table():
            tables["timeouts"] = timeouts
        for name, section in (("stop", self.stop), ("ema", self.ema)):
            if section is not None:
                tables[name] = to_table(section)
        if numerics := self.numerics.to_table():
            tables["numerics"] = numerics
        if self.optimizer_rest is not None:
            tables["optimizer"] |= {"rest": self.optimizer_rest.to_table()}
        if task := self.task.to_table():  # a run of an earlier version has no such table
            tables = {"data": tables.pop("data"), "task": task} | tables
        if self.partition.cuts is not None:
            del tables["partition"]["balance"]  # explicit cuts balance nothing
        if callable(self.partition.cuts):
            tables["partition"]["cuts"] = object_name(self.partition.cuts)
        return to_table(self.settings) | tables

    def to_text(self) -> str:
        """Return the text of `run.toml` in a run folder: the run file's path, and all keys."""
        return f"{RUN_FILE_HEADER.format(self.path)}\n{dump_toml(self.to_table())}"

    def with_checkpoint_blocks(self, run_table: Table | None) -> RunConfig:
        """Return this run with the blocks of a checkpoint's `run_table`, where it names none.

        Otherwise another number of stages would train another model. Cuts that were measured are
        not measured again, unless the run names another number of blocks.
        """
        saved, partition = (run_table or {}).get("partition", {}), self.partition
        blocks = len(saved["cuts"]) + 1 if "cuts" in saved else saved.get("blocks")
        is_measured = partition.balance == "time" and partition.cuts is None and "cuts" in saved
        if is_measured and partition.chosen_blocks in (None, blocks):
            return self.with_cuts(saved["cuts"])
        if blocks is None or partition.chosen_blocks is not None:
            return self
        return dataclasses.replace(self, partition=dataclasses.replace(partition, blocks=blocks))

    def fit_stages(self, ranks: int) -> RunConfig:
        """Return this run with as many of its stages as fit on `ranks` ranks, which changes its
        speed alone.

        Raises
        ------
        ConfigError
            The places that fewer stages replace are no legal ones.
        """
        stages = self.stages
        if stages is None:  # all ranks, but no more than there are blocks
            stages = min(ranks, self.partition.chosen_blocks or ranks)
            if stages == ranks:
                return self._fit_shares(1)
        elif ranks % stages == 0:
            return self._fit_shares(ranks // stages)
        fitting = max(n for n in range(1, min(stages, ranks) + 1) if ranks % n == 0)
        partition = self.partition
        if partition.explicit_cuts is None:
            blocks = partition.chosen_blocks or stages
            partition = dataclasses.replace(partition, blocks=blocks)
        if partition.places is not None:
            check_places(partition.places, len(partition.places), self.stages or stages)
            self.schedule.instance.check_places(partition.places)
            partition = dataclasses.replace(partition, places=None)
        mesh = dataclasses.replace(self.mesh, stages=fitting)
        fitted = dataclasses.replace(self, mesh=mesh, partition=partition)
        return fitted._fit_shares(ranks // fitting)

    def _fit_shares(self, replicas: int) -> RunConfig:
        """Return this run without shares, if they are those of another number of replicas."""
        if len(self.mesh.shares or ()) in (0, replicas):
            return self
        return dataclasses.replace(self, mesh=dataclasses.replace(self.mesh, shares=None))

    def with_cuts(self, names: Sequence[int | str]) -> RunConfig:
        """Return this run with explicit cuts before these layers."""
        partition = dataclasses.replace(
            self.partition, cuts=tuple(names), blocks=None, weights=None, balance="flops"
        )
        return dataclasses.replace(self, partition=partition)

    def resolve(self, blocks: int, stages: int) -> RunConfig:
        """Return this run with the numbers of blocks and stages that were chosen at its start."""
        mesh = dataclasses.replace(self.mesh, stages=stages)
        partition = self.partition
        if partition.explicit_cuts is None:
            partition = dataclasses.replace(partition, blocks=blocks)
        return dataclasses.replace(self, mesh=mesh, partition=partition)
