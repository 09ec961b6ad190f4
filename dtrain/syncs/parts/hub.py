"""Hub: the ranks of a group by node, and one lead of each, who speaks for it.

Invariant: bytes that all ranks are to have cross once from each node to each other.

::

    ranks    0 1 | 2 3        gather: 0, 1 tell each other, 2, 3 too; then lead 0 sends the parts of
    leads    0     2          0 and 1 to lead 2, and 2 its own to 0; each deals them out
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dtrain.comm.comm import Comm


@final
class Hub:
    """Making it is collective over the group.

    Attributes
    ----------
    near : Comm
        The ranks of my node.
    far : Comm or None
        The first rank of each node, where I am one.
    """

    def __init__(self, group: Comm) -> None:
        self.near = group.by_node()
        leads = group.split(0 if self.near.rank == 0 else 1, name=f"leads of {group.name}")
        self.far: Comm | None = leads if self.near.rank == 0 else None
        if self.far is None:
            leads.close()
        self.sizes = [group.hosts.count(host) for host in dict.fromkeys(group.hosts)]

    def gather(self, data: Tensor) -> list[Tensor]:
        """Return the bytes (uint8, one or more) of all ranks, by node, then rank; each has as many.
        Collective."""
        own = torch.cat(self.near.iall_to_all([data] * self.near.size).wait())
        if len(self.sizes) == 1:
            return list(own.view(-1, len(data)))
        most = max(self.sizes) * len(data)  # what travels has one length
        everything = own.new_zeros(len(self.sizes) * most)
        if self.far is not None:
            padded = torch.cat([own, own.new_zeros(most - len(own))])
            torch.cat(self.far.iall_to_all([padded] * self.far.size).wait(), out=everything)
        self.near.broadcast_([everything])
        nodes = zip(self.sizes, everything.view(-1, most), strict=True)
        return [part for size, node in nodes for part in node.view(-1, len(data))[:size]]
