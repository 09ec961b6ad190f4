"""The keys of a run file, table by table: names, types and defaults.

Invariant: a field is a key, written with hyphens; what a strategy's table holds beside its name is
declared by the strategy itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtrain.schema import Table, kebab


@dataclass(frozen=True)
class StrategyChoice:
    """A strategy that is made later, once its surroundings are known: a name and its fields."""

    name: str
    fields: Table

    def to_table(self) -> Table:
        """Return the table of a run file that makes this choice; what is left open is left out."""
        told = {key: value for key, value in self.fields.items() if value is not None}
        return {"name": self.name} | {kebab(key): value for key, value in told.items()}


@dataclass(frozen=True)
class DataSection:
    """``[data]``: keys that every data set has; the others belong to the named one."""

    normalise: bool = True
    shuffle: Literal["full", "chunks"] = "full"
    augment: Literal["none", "crop-flip"] = "none"


@dataclass(frozen=True)
class MeshSection:
    """``[mesh]``: ranks along the model, and which axis stays inside a node."""

    stages: int | None = None
    placement: Literal["stages-in-node", "replicas-in-node"] = "stages-in-node"


@dataclass(frozen=True)
class PartitionSection:
    """``[partition]``: where blocks begin; `cuts` says it outright, else costs are balanced.

    `recompute` (of all blocks, or of those named) keeps of a micro-batch only what enters and
    leaves, and computes the rest again when it is learnt: less memory, one more forward. The layers
    of `frozen` blocks (all but the last, or those named) keep their first weights. `wire` says how
    what blocks tell each other of samples travels in training.
    """

    blocks: int | None = None
    balance: Literal["flops", "parameters", "layers"] = "flops"
    weights: tuple[float, ...] | None = None
    recompute: bool | tuple[int, ...] = False
    frozen: bool | tuple[int, ...] = False
    activation_compression: Literal["exact", "int8"] = "exact"
    cuts: tuple[int | str, ...] | None = None

    def blocks_by_key(self) -> dict[str, tuple[int, ...]]:
        """Return the blocks that keys name by their numbers, by key."""
        told = {"recompute": self.recompute, "frozen": self.frozen}
        return {key: () if isinstance(each, bool) else each for key, each in told.items()}

    def is_frozen(self, block: int, blocks: int) -> bool:
        """Say whether the layers of a block, one of so many, keep their first weights."""
        if isinstance(self.frozen, bool):
            return self.frozen and block < blocks - 1
        return block in self.frozen


@dataclass(frozen=True)
class OptimizerSection:
    """``[optimizer]``, the keys that are ours.

    `clip` is the largest L2 norm of a gradient, 0 for no limit, of a block, after replicas agreed
    upon it, or of the model, which couples the blocks. `scale_from` is the batch for which lr and
    momentum are given, where it is not `batch-size`; 0 leaves them as they are.
    """

    clip: float = 0.0
    clip_over: Literal["block", "model"] = "block"
    scale_from: int = 0

    def to_table(self) -> Table:
        """Return the keys as a run file has them, none where they ask for nothing."""
        clip = {"clip": self.clip, "clip-over": self.clip_over} if self.clip else {}
        return clip | ({"scale-from": self.scale_from} if self.scale_from else {})


@dataclass(frozen=True)
class CheckpointSection:
    """``[checkpoint]``: at each epoch's end and every so many updates in it; how many are kept."""

    every: int = 0
    keep: int = 2


@dataclass(frozen=True)
class EvaluateSection:
    """``[evaluate]``: epochs between two evaluations."""

    every: int = 1


@dataclass(frozen=True)
class LogSection:
    """``[log]``: seconds between two lines of progress."""

    every_s: float = 10.0


@dataclass(frozen=True)
class RunSection:
    """The keys outside any table.

    `debug` compares calls and replicas as the run goes on, `trace` writes down when each rank did
    what; both change nothing in what is trained.
    """

    seed: int = 0
    epochs: int | None = None
    updates: int | None = None
    batch_size: int = 128
    micro_batches: int = 1
    segment: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    debug: bool = False
    trace: bool = False
