"""The dict of syncs by their names in run files, and all public classes of syncs.

A user's own sync derives from `PeriodicSync`, `LocalUpdates`, `SynchronousSync`, `Wrapper`,
`CompressedSync`, or from `Sync` itself.
"""

from dtrain.syncs.ab import AB
from dtrain.syncs.base import Sync, SyncTraits, UpdateClock
from dtrain.syncs.common.compressed import CompressedSync
from dtrain.syncs.common.compressor import Codec, Compressor
from dtrain.syncs.common.local_updates import LocalUpdates, PeriodicSync
from dtrain.syncs.common.synchronous import SynchronousSync
from dtrain.syncs.common.wrapper import Wrapper
from dtrain.syncs.daso import DASO
from dtrain.syncs.demo import DeMo
from dtrain.syncs.diloco import DiLoCo
from dtrain.syncs.every_step import EveryStep
from dtrain.syncs.gradient_reducer import WeightedGroup
from dtrain.syncs.int8 import Int8
from dtrain.syncs.local_sgd import LocalSGD
from dtrain.syncs.never import Never
from dtrain.syncs.oialr import OIALR
from dtrain.syncs.only_large import OnlyLarge
from dtrain.syncs.powersgd import PowerSGD
from dtrain.syncs.qsr import QSR
from dtrain.syncs.terngrad import TernGrad
from dtrain.syncs.warmup import Warmup

__all__ = [
    "AB",
    "DASO",
    "OIALR",
    "QSR",
    "SYNCS",
    "Codec",
    "CompressedSync",
    "Compressor",
    "DeMo",
    "DiLoCo",
    "EveryStep",
    "Int8",
    "LocalSGD",
    "LocalUpdates",
    "Never",
    "OnlyLarge",
    "PeriodicSync",
    "PowerSGD",
    "Sync",
    "SyncTraits",
    "SynchronousSync",
    "TernGrad",
    "UpdateClock",
    "Warmup",
    "WeightedGroup",
    "Wrapper",
]

SYNCS: dict[str, type[Sync]] = {
    "ab": AB,
    "daso": DASO,
    "demo": DeMo,
    "diloco": DiLoCo,
    "every-step": EveryStep,
    "int8": Int8,
    "local-sgd": LocalSGD,
    "never": Never,
    "oialr": OIALR,
    "only-large": OnlyLarge,
    "powersgd": PowerSGD,
    "qsr": QSR,
    "terngrad": TernGrad,
    "warmup": Warmup,
}
