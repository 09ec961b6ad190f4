"""A merge in flight, as in DASO: Coquelin et al. 2022, arXiv 2104.05588.

    update  0    1    2    3    4        every = 4, delay = 2
            send           merge -> x = (2 B x_now + sum of the stale x) / (2 B + P)

It needs a mean that lands at a segment's end, unmerged, and stays in the checkpoint until due.
"""

from dataclasses import dataclass, field

import torch

from dtrain.syncs.sync import Sync, averaged


@dataclass
class Flying(Sync):
    """Sends the weights every so many updates, and merges their mean `delay` updates later."""

    apart = True
    every: int = 4
    delay: int = 2
    due: int = field(default=-1, init=False)

    def __post_init__(self):
        self.stale, self.handle = [], None

    def before_update(self, gradients, weight, clock): ...

    def after_update(self, clock):
        if clock.update == self.due:
            self.settle()
            k, many = 2 * self.delay, self.replicas.size
            for own, mean in zip(self.block.trained, self.stale, strict=True):
                own.data.mul_(k).add_(mean, alpha=many).div_(k + many)
            self.stale, self.due = [], -1
        if clock.update % self.every == 0:
            self.stale = [own.detach().clone() for own in self.block.trained]
            self.handle, self.due = self.replicas.imean_(self.stale), clock.update + self.delay

    def end_epoch(self, loss): ...

    def settle(self):
        if self.handle is not None:
            self.handle.wait()
            self.handle = None

    def view(self):
        return averaged(self.replicas, self.block.tensors())

    def state(self):
        return {"due": torch.tensor(self.due), **{f"stale{i}": t for i, t in enumerate(self.stale)}}

    def restore(self, state):
        self.due = int(state["due"])
        self.stale = [state[f"stale{i}"] for i in range(len(state) - 1)]
