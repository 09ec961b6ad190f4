"""What is learnt and how: the part of a run that the engine needs, the same on all ranks.

Invariant: plain values and strategies; nothing here knows of run files or of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtrain.objectives.objective import Objective
from dtrain.objectives.task import Task
from dtrain.parcel import Parcel
from dtrain.rates import Rate
from dtrain.schedules.schedule import Schedule
from dtrain.segments import Calendar


@dataclass(frozen=True)
class Course:
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
    tasks: Sequence[Task]
    rate: Rate
    clip: float
    clips_model: bool
    device: torch.device
    seed: int
    calendar: Calendar
    parcel: Parcel
