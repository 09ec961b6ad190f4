"""EngineSpec: the part of a run that the engine needs, the same on all ranks.

Invariant: plain values and strategies; it depends neither on run files nor on the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtrain.block.lr_schedule import LRSchedule
from dtrain.comm.wire_format import WireFormat
from dtrain.models.ties import Ties
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules.base import Schedule
from dtrain.schedules.segments import TrainingLength
from dtrain.tasks.task import DEFAULT_TASK, Task


@dataclass(frozen=True)
class EngineSpec:
    """The training settings.

    Attributes
    ----------
    block_specs : sequence of BlockSpec
        One per block of the run.
    clip : float
        Largest norm of a gradient, 0 for no limit.
    clips_model : bool
        Whether that is the norm of the model's gradient; if not, of each block's.
    device : torch.device
        The device of this rank.
    seed : int
        Seed of the objective's random numbers.
    training_length : TrainingLength
        Updates of an epoch and of the run, for syncs and the learning-rate schedule.
    wire_format : WireFormat
        Encoding of messages between blocks in training.
    ties : Ties
        The copies of every parameter that several blocks hold, in the order of the blocks.
    task : Task
        Loss, targets and metrics.
    max_skipped : int or None
        Updates in a row that may be skipped since a loss or a gradient is not finite; None: a loss
        that is not finite ends the run.
    check_replicas : int
        Updates between two comparisons of the replicas; 0: they are not compared.
    """

    objective: Objective
    schedule: Schedule
    block_specs: Sequence[BlockSpec]
    lr_schedule: LRSchedule
    clip: float
    clips_model: bool
    device: torch.device
    seed: int
    training_length: TrainingLength
    wire_format: WireFormat
    ties: Ties = ()
    task: Task = DEFAULT_TASK
    max_skipped: int | None = None
    check_replicas: int = 0
