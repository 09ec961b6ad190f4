"""The dict of objectives by their names in run files, and all public classes of objectives.

A user's own objective derives from `AuxHead` (a head and a loss per earlier block), `NetworkHead`,
`RandomFeedback`, `Goodness`, `Reconstruction`, or from `Objective` itself.
"""

from dtrain.objectives.backprop import Backprop
from dtrain.objectives.base import (
    Objective,
    backward_routes,
    forward_routes,
    loss_pair,
    output_error,
    scaled_loss_pair,
    vote_routes,
)
from dtrain.objectives.block_spec import BlockSpec, DownstreamLayer
from dtrain.objectives.cafo import Cafo
from dtrain.objectives.ccl import Ccl
from dtrain.objectives.common.aux_heads import AuxHead, NetworkHead
from dtrain.objectives.common.denoising import Denoising
from dtrain.objectives.common.goodness import Goodness
from dtrain.objectives.common.random_feedback import RandomFeedback
from dtrain.objectives.common.reconstruction import Reconstruction
from dtrain.objectives.deep_supervision import DeepSupervision
from dtrain.objectives.dfa import Dfa
from dtrain.objectives.diffusion_blocks import DiffusionBlocks
from dtrain.objectives.dni import Dni
from dtrain.objectives.drtp import Drtp
from dtrain.objectives.dual_propagation import DualPropagation
from dtrain.objectives.f3 import F3
from dtrain.objectives.forward_forward import ForwardForward
from dtrain.objectives.forward_gnn import ForwardGnn
from dtrain.objectives.forward_gradient import ForwardGradient
from dtrain.objectives.infopro import InfoPro
from dtrain.objectives.layer_collaboration import LayerCollaboration
from dtrain.objectives.lls import Lls, LlsM, LlsMxM
from dtrain.objectives.local_head import LocalHead
from dtrain.objectives.man import Man
from dtrain.objectives.mono_forward import MonoForward
from dtrain.objectives.noprop import Noprop
from dtrain.objectives.pepita import Pepita
from dtrain.objectives.pfa import Pfa
from dtrain.objectives.scalable_ff import ScalableFf
from dtrain.objectives.tpsgd import TpSgd
from dtrain.objectives.ulr import Ulr

__all__ = [
    "F3",
    "OBJECTIVES",
    "AuxHead",
    "Backprop",
    "BlockSpec",
    "Cafo",
    "Ccl",
    "DeepSupervision",
    "Denoising",
    "Dfa",
    "DiffusionBlocks",
    "Dni",
    "DownstreamLayer",
    "Drtp",
    "DualPropagation",
    "ForwardForward",
    "ForwardGnn",
    "ForwardGradient",
    "Goodness",
    "InfoPro",
    "LayerCollaboration",
    "Lls",
    "LlsM",
    "LlsMxM",
    "LocalHead",
    "Man",
    "MonoForward",
    "NetworkHead",
    "Noprop",
    "Objective",
    "Pepita",
    "Pfa",
    "RandomFeedback",
    "Reconstruction",
    "ScalableFf",
    "TpSgd",
    "Ulr",
    "backward_routes",
    "forward_routes",
    "loss_pair",
    "output_error",
    "scaled_loss_pair",
    "vote_routes",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "backprop": Backprop,
    "cafo": Cafo,
    "ccl": Ccl,
    "dfa": Dfa,
    "diffusion-blocks": DiffusionBlocks,
    "deep-supervision": DeepSupervision,
    "dni": Dni,
    "drtp": Drtp,
    "dual-propagation": DualPropagation,
    "f3": F3,
    "forward-forward": ForwardForward,
    "forward-gradient": ForwardGradient,
    "forward-gnn": ForwardGnn,
    "infopro": InfoPro,
    "layer-collaboration": LayerCollaboration,
    "lls": Lls,
    "lls-m": LlsM,
    "lls-mxm": LlsMxM,
    "local-head": LocalHead,
    "man": Man,
    "mono-forward": MonoForward,
    "noprop": Noprop,
    "pepita": Pepita,
    "pfa": Pfa,
    "scalable-ff": ScalableFf,
    "tpsgd": TpSgd,
    "ulr": Ulr,
}
