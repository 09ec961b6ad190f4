"""What is learnt and how: the part of a run that the engine needs, the same on all ranks.

Invariant: plain values and strategies; nothing here knows of run files or of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dtrain.errors import Refusal
from dtrain.mail import Seat
from dtrain.objectives.objective import Objective, Task
from dtrain.rates import Rate
from dtrain.schedules.action import Action
from dtrain.schedules.schedule import Schedule


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
    per_epoch, total : int
        Updates of an epoch, and of the run: the syncs' clock and the learning rate's.
    """

    objective: Objective
    schedule: Schedule
    tasks: Sequence[Task]
    rate: Rate
    clip: float
    clips_model: bool
    device: torch.device
    seed: int
    per_epoch: int
    total: int

    @property
    def epochs(self) -> int:
        """Epochs begun when the run is done."""
        return -(-self.total // self.per_epoch)


@contextmanager
def at(seat: Seat, action: Action, when: str) -> Iterator[None]:
    """Add to whatever is raised inside where it was: replica, stage, update, action."""
    try:
        yield
    except BaseException as error:
        place = f"[replica {seat.replica} stage {seat.stage} | {when} | action {action}]"
        if isinstance(error, Refusal):
            error.at(place)
        else:
            error.add_note(place)
        raise
