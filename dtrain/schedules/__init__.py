"""Schedules by name, and everything that follows from a plan: messages, proof, costs, drawings.

A user's own schedule derives from `Flush`, `AsyncSchedule`, or from `Schedule` itself.
"""

from dtrain.schedules.actions import Action, Point, Route
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.schedules.base import Schedule
from dtrain.schedules.drained import Drained
from dtrain.schedules.features_replay import FeaturesReplay
from dtrain.schedules.fold import Fold
from dtrain.schedules.gpipe_1f1b import FillDrain, Flush, OneFOneB
from dtrain.schedules.interleaved import Interleaved
from dtrain.schedules.petra import Petra
from dtrain.schedules.pipedream import PipeDream, PipeDream2BW
from dtrain.schedules.pipelined import Pipelined
from dtrain.schedules.stream import Stream
from dtrain.schedules.stream_replay import StreamReplay
from dtrain.schedules.weight_policy import WeightPolicy

__all__ = [
    "SCHEDULES",
    "Action",
    "AsyncSchedule",
    "Drained",
    "FeaturesReplay",
    "FillDrain",
    "Flush",
    "Fold",
    "Interleaved",
    "OneFOneB",
    "Petra",
    "PipeDream",
    "PipeDream2BW",
    "Pipelined",
    "Point",
    "Route",
    "Schedule",
    "Stream",
    "StreamReplay",
    "WeightPolicy",
]

SCHEDULES: dict[str, type[Schedule]] = {
    "stream": Stream,
    "stream-replay": StreamReplay,
    "fill-drain": FillDrain,
    "1f1b": OneFOneB,
    "interleaved": Interleaved,
    "drained": Drained,
    "fold": Fold,
    "pipelined": Pipelined,
    "pipedream": PipeDream,
    "pipedream-2bw": PipeDream2BW,
    "features-replay": FeaturesReplay,
    "petra": Petra,
}
