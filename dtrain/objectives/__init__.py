"""Objectives by their names in run files; one file per method."""

from dtrain.objectives.backprop import Backprop
from dtrain.objectives.base import Objective
from dtrain.objectives.cafo import Cafo
from dtrain.objectives.ccl import Ccl
from dtrain.objectives.deep_supervision import DeepSupervision
from dtrain.objectives.dfa import Dfa
from dtrain.objectives.dni import Dni
from dtrain.objectives.drtp import Drtp
from dtrain.objectives.f3 import F3
from dtrain.objectives.forward_forward import ForwardForward
from dtrain.objectives.infopro import InfoPro
from dtrain.objectives.layer_collaboration import LayerCollaboration
from dtrain.objectives.lls import Lls, LlsM, LlsMxM
from dtrain.objectives.local_head import LocalHead
from dtrain.objectives.man import Man
from dtrain.objectives.mono_forward import MonoForward
from dtrain.objectives.pepita import Pepita
from dtrain.objectives.scalable_ff import ScalableFf
from dtrain.objectives.tpsgd import TpSgd

OBJECTIVES: dict[str, type[Objective]] = {
    "backprop": Backprop,
    "cafo": Cafo,
    "ccl": Ccl,
    "dfa": Dfa,
    "deep-supervision": DeepSupervision,
    "dni": Dni,
    "drtp": Drtp,
    "f3": F3,
    "forward-forward": ForwardForward,
    "infopro": InfoPro,
    "layer-collaboration": LayerCollaboration,
    "lls": Lls,
    "lls-m": LlsM,
    "lls-mxm": LlsMxM,
    "local-head": LocalHead,
    "man": Man,
    "mono-forward": MonoForward,
    "pepita": Pepita,
    "scalable-ff": ScalableFf,
    "tpsgd": TpSgd,
}
