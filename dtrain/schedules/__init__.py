"""Orders of computing: plans, the messages they imply, their proof and their picture."""

from dtrain.schedules.drained import Drained
from dtrain.schedules.flush import FillDrain, OneFOneB
from dtrain.schedules.pipedream import PipeDream, TwoBuffered
from dtrain.schedules.pipelined import Pipelined
from dtrain.schedules.schedule import Schedule
from dtrain.schedules.stream import Stream

SCHEDULES: dict[str, type[Schedule]] = {
    "stream": Stream,
    "fill-drain": FillDrain,
    "1f1b": OneFOneB,
    "drained": Drained,
    "pipelined": Pipelined,
    "pipedream": PipeDream,
    "pipedream-2bw": TwoBuffered,
}
