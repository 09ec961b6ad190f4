"""Syncs by the name that a run file gives them; one file each."""

from dtrain.syncs.daso import DASO
from dtrain.syncs.diloco import DiLoCo
from dtrain.syncs.every_step import EveryStep
from dtrain.syncs.local_sgd import LocalSGD
from dtrain.syncs.never import Never
from dtrain.syncs.qsr import QSR
from dtrain.syncs.sync import Sync

SYNCS: dict[str, type[Sync]] = {
    "daso": DASO,
    "diloco": DiLoCo,
    "every-step": EveryStep,
    "local-sgd": LocalSGD,
    "never": Never,
    "qsr": QSR,
}
