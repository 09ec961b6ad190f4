"""What is learnt and how: the part of a run that the engine needs, the same on all ranks.

Invariant: plain values and strategies; nothing here knows of run files or of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtrain.block.lr_schedule import LRSchedule
from dtrain.comm.wire_format import WireFormat
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules.base import Schedule
from dtrain.schedules.segments import TrainingLength


@dataclass(frozen=True)
class EngineSpec:
    """What is learnt, and in which order.

    Attributes
    ----------
    tasks : sequence of Task
        One per block of the run.
    clip : float
        The largest norm of a gradient, 0 for no limit.
    clips_model : bool
        Whether that is the norm of the whole model's gradient, not of a block's.
    device : torch.device
        Where this rank computes.
    seed : int
        Of the objective's own draws.
    calendar : Calendar
        Of the syncs' clock and of the learning rate's.
    parcel : Parcel
        How tensors travel between blocks in training.
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
