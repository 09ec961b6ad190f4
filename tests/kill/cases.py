"""Cases: the runs that the kill harness disturbs."""

from __future__ import annotations

from dataclasses import dataclass

HEAD = """
seed = 5
epochs = 15
batch-size = 128
micro-batches = {micro_batches}
threads = 1
[data]
name = "blobs:blobs"
[model]
name = "mlp"
widths = [19, 17, 13]
[partition]
blocks = 3
[checkpoint]
every = 4
asynchronous = {asynchronous}
[evaluate]
every = 2
[optimizer]
name = "adam"
lr = 2e-3
"""
"""180 updates; checkpoints after 4, 8 and 12 updates of an epoch."""

INTERVAL = 4
"""Updates between two checkpoints."""


@dataclass(frozen=True)
class Layout:
    """Stages and replicas of one start."""

    stages: int
    replicas: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.stages * self.replicas


REPLICATED = (Layout(1, 2), Layout(2, 2), Layout(1, 2))
"""Two replicas. A start of four ranks takes long on a small machine, so it is rarer."""


@dataclass(frozen=True)
class Case:
    """A run that is disturbed.

    Attributes
    ----------
    name : str
        Its name for people.
    text : str
        The sections of the run file that differ from the other cases.
    layouts : tuple of Layout
        Two starts have the first layout, the next two the second one, and so on.
    replicas_diverge : bool
        Whether every replica saves a shard of its own.
    nodes : bool
        Whether each replica is on a node of its own, as the sync sees it.
    asynchronous : bool
        Whether checkpoints are written behind the training.
    """

    name: str
    text: str
    layouts: tuple[Layout, ...]
    replicas_diverge: bool = False
    nodes: bool = False
    micro_batches: int = 3
    asynchronous: bool = False

    @property
    def max_lost(self) -> int:
        """The number of updates that a kill may cost; an asynchronous save may be pending."""
        return 2 * INTERVAL if self.asynchronous else INTERVAL

    @property
    def run_file(self) -> str:
        """The text of the run file, without stages."""
        asynchronous = str(self.asynchronous).lower()
        head = HEAD.format(micro_batches=self.micro_batches, asynchronous=asynchronous)
        return head + self.text

    def writers(self, layout: Layout) -> int:
        """Return the number of ranks that write shards; they are the first ones."""
        return layout.ranks if self.replicas_diverge else layout.stages


PREDICTED = """
[objective]
name = "backprop"
[schedule]
name = "pipelined"
prediction = "optimizer"
"""

CASES = (
    Case(
        "mono-forward, stream",
        '[objective]\nname = "mono-forward"\n[schedule]\nname = "stream"\n',
        (Layout(2), Layout(1), Layout(3)),
    ),
    Case(
        "backprop, 1f1b, replicas",
        '[objective]\nname = "backprop"\n[schedule]\nname = "1f1b"\n',
        REPLICATED,
    ),
    Case(
        "backprop, pipelined, prediction, asynchronous checkpoints",
        PREDICTED,
        (Layout(2), Layout(3)),
        micro_batches=1,
        asynchronous=True,
    ),
    Case(
        "daso",
        '[objective]\nname = "backprop"\n[sync]\nname = "daso"\nmax-global-skips = 4\n',
        REPLICATED,
        replicas_diverge=True,
        nodes=True,
    ),
    Case(
        "ab",
        '[objective]\nname = "backprop"\n[sync]\nname = "ab"\n'
        "warmup-updates = 7\nevery = 10\nfull-updates = 2\ngroup-size = 1\n",
        REPLICATED,
        replicas_diverge=True,
        nodes=True,
    ),
    Case(
        "local-sgd",
        '[sync]\nname = "local-sgd"\nevery = 3\n',
        REPLICATED,
        replicas_diverge=True,
    ),
)
