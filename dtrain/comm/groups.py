"""ProcessGroups: the communicators of one rank, one per purpose."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.comm.communicator import Comm


@dataclass(frozen=True)
class ProcessGroups:
    """The communicators of one rank.

    Attributes
    ----------
    forward : Comm
        All ranks: messages to later blocks, or to the same one.
    backward : Comm
        All ranks: messages to earlier blocks.
    control : Comm
        All ranks: JSON.
    replicas : Comm
        The replicas of this rank's stage.
    pipeline : Comm
        The stages of this rank's replica, in order.
    """

    forward: Comm
    backward: Comm
    control: Comm
    replicas: Comm
    pipeline: Comm
