"""Run files: TOML in, one checked `Run` out, and the resolved text that a run folder keeps.

Invariant: after `read` everything that a run file can get wrong by itself is refused; what depends
on the data or on the number of ranks is refused by `layout`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.block import optimizer as optimizers
from dtrain.block.lr_schedule import LR_SCHEDULES, LRSchedule
from dtrain.block.optimizer import scale_lr_and_momentum
from dtrain.config.sections import (
    CheckpointSection,
    DataSection,
    EvaluateSection,
    LogSection,
    MeshSection,
    OptimizerSection,
    PartitionSection,
    RunSection,
    StrategyChoice,
)
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.base import Objective
from dtrain.schedules import SCHEDULES
from dtrain.schedules.base import Schedule
from dtrain.schema import Table, build_strategy, to_table
from dtrain.syncs import SYNCS
from dtrain.syncs.base import Sync


@dataclass(frozen=True)
class RunConfig:
    """One checked run file.

    Attributes
    ----------
    path : Path
        The file itself; relative paths and imports start in its folder.
    overrides : tuple of str
        What ``--set`` changed, as it was typed.
    """

    path: Path
    overrides: tuple[str, ...]
    settings: RunSection
    data: DataSection
    dataset: StrategyChoice
    model: StrategyChoice
    mesh: MeshSection
    partition: PartitionSection
    objective: StrategyChoice
    schedule: StrategyChoice
    sync: StrategyChoice
    optimizer: StrategyChoice
    optimizer_options: OptimizerSection
    lr_schedule: StrategyChoice
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    log: LogSection = field(default_factory=LogSection)

    @property
    def folder(self) -> Path:
        """Where relative paths and imports start."""
        return self.path.parent

    def make_objective(self) -> Objective:
        """Return the objective, made from its fields."""
        return build_strategy(OBJECTIVES, self.objective.to_table(), "objective")

    def make_schedule(self) -> Schedule:
        """Return the schedule, made from its fields."""
        return build_strategy(SCHEDULES, self.schedule.to_table(), "schedule")

    def make_sync(self) -> Sync:
        """Return a new sync, one for each block."""
        return build_strategy(SYNCS, self.sync.to_table(), "sync")

    def make_lr_schedule(self) -> LRSchedule:
        """Return the schedule of learning rates, made from its fields."""
        return build_strategy(LR_SCHEDULES, self.lr_schedule.to_table(), "lr")

    def optimizer_fields(self) -> Table:
        """Return the optimizer's fields, learning rate and momentum for the batch that there is."""
        fields, reference = dict(self.optimizer.fields), self.optimizer_options.scale_from
        if reference:
            given = fields.get("lr", optimizers.DEFAULT_LR), fields["momentum"]
            fields["lr"], fields["momentum"] = scale_lr_and_momentum(
                *given, self.settings.batch_size, reference
            )
        return fields

    def to_table(self) -> Table:
        """Return the resolved run as the nested tables of a run file, defaults included."""
        tables = {
            "data": self.dataset.to_table() | to_table(self.data),
            "model": self.model.to_table(),
            "mesh": to_table(self.mesh),
            "partition": to_table(self.partition),
            "objective": self.objective.to_table(),
            "schedule": self.schedule.to_table(),
            "sync": self.sync.to_table(),
            "optimizer": self.optimizer.to_table() | self.optimizer_options.to_table(),
            "lr": self.lr_schedule.to_table(),
            "checkpoint": to_table(self.checkpoint),
            "evaluate": to_table(self.evaluate),
            "log": to_table(self.log),
        }
        if self.partition.cuts is not None:
            del tables["partition"]["balance"]  # nothing is balanced
        return to_table(self.settings) | tables

    def with_checkpoint_blocks(self, table: Table | None) -> RunConfig:
        """Return this run with as many blocks as a checkpoint's `table`, where it names none.

        Without it another number of stages would be another training.
        """
        known = (table or {}).get("partition", {}).get("blocks")
        if known is None or self.partition.blocks is not None or self.partition.cuts is not None:
            return self
        return dataclasses.replace(
            self, partition=dataclasses.replace(self.partition, blocks=known)
        )

    def resolve(self, blocks: int, stages: int) -> RunConfig:
        """Return this run with the numbers of blocks and stages that were settled at its start."""
        mesh = dataclasses.replace(self.mesh, stages=stages)
        partition = self.partition
        if partition.cuts is None:
            partition = dataclasses.replace(partition, blocks=blocks)
        return dataclasses.replace(self, mesh=mesh, partition=partition)
