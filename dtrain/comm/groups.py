"""The communicators of one rank, one per purpose."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.comm.communicator import Comm


@dataclass(frozen=True)
class ProcessGroups:
    """The communicators, one per purpose.

    Attributes
    ----------
    onward, back, control : Comm
        All ranks: what goes to later blocks, what goes to earlier ones, JSON.
    replicas, column : Comm
        The replicas of my stage; the stages of my replica, in order.
    """

    forward: Comm
    backward: Comm
    control: Comm
    replicas: Comm
    pipeline: Comm
