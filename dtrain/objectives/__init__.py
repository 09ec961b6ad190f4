"""Objectives by the name that a run file gives them; one file each."""

from dtrain.objectives.backprop import Backprop
from dtrain.objectives.local_head import LocalHead
from dtrain.objectives.mono_forward import MonoForward
from dtrain.objectives.objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "backprop": Backprop,
    "local-head": LocalHead,
    "mono-forward": MonoForward,
}
