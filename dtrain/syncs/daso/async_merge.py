"""The asynchronous mean of DASO: weights that nodes average while their blocks continue to train.

One replica of each node takes part, the member of the active inter-node group. It sends its
weights, receives their mean over the P nodes B updates later, merges it, and broadcasts the result
inside its node::

    group 0 of nodes {0 1} and {2 3}         sent at t, merged B updates later

    rank 0   copy --.                 .-- merge --> broadcast to 1
    rank 1          |---- mean -------|       x <- (k x + P mean) / (k + P),  k = 2 B
    rank 2   copy --'                 '-- merge --> broadcast to 3
    rank 3

If the compressor is lossy, deltas since all replicas were equal are averaged instead of weights.

Invariant: all replicas of a node know what is in flight; those outside the inter-node group hold
no tensors of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import SyncTarget, UpdateClock, add_prefix, clone_all, select_prefix
from dtrain.syncs.common.compressor import Completion, Compressor
from dtrain.syncs.common.node_groups import NodeGroups


@final
@dataclass
class InFlightMean:
    """A mean of weights that was sent and is not merged yet.

    Attributes
    ----------
    group_index : int
        The number of its inter-node group.
    delay : int
        Updates from sending to merging (B).
    due_update : int
        The update after which it is merged.
    mean : dict of str to Tensor
        The mean of the nodes' weights, or of their deltas, once `finish` returns; empty where this
        rank is not in the group.
    """

    group_index: int
    delay: int
    due_update: int
    mean: dict[str, Tensor] = field(default_factory=dict)
    completion: Completion | None = None

    def finish(self) -> None:
        """Wait for the mean. Collective over the inter-node group."""
        if self.completion is not None:
            self.completion()
            self.completion = None


@final
class AsyncMean:
    """Sends and merges means of a block's weights.

    Parameters
    ----------
    block : SyncTarget
    nodes : NodeGroups
        The replicas of the block by node.
    groups : list of (Comm or None)
        The inter-node groups, see `inter_node_groups`.
    compressor : Compressor

    Attributes
    ----------
    active_index : int
        The inter-node group that sends next.
    in_flight : InFlightMean or None
        The mean that was sent and is not merged yet.
    """

    def __init__(
        self,
        block: SyncTarget,
        nodes: NodeGroups,
        groups: list[Comm | None],
        compressor: Compressor,
    ) -> None:
        self.block = block
        self.nodes = nodes
        self.groups = groups
        self.compressor = compressor
        self.active_index = 0
        self.in_flight: InFlightMean | None = None
        self._base_weights: dict[str, Tensor] = {}

    @property
    def active_group(self) -> Comm | None:
        """The active inter-node group, None where this rank is not in it."""
        return self.groups[self.active_index]

    def rotate(self) -> None:
        """Activate the next inter-node group."""
        self.active_index = (self.active_index + 1) % len(self.groups)

    def save_base_weights(self) -> None:
        """Copy the weights that all nodes hold now, where deltas are to be averaged."""
        if not self.compressor.exact:
            self._base_weights = clone_all(self.block.trainable_tensors())

    def send(self, clock: UpdateClock, delay: int) -> InFlightMean:
        """Start the mean over the active group; nodes count by their replicas.

        Collective over the active group. Returns what is in flight, and leaves `in_flight` alone.
        """
        sent = InFlightMean(self.active_index, delay, clock.update + delay)
        group = self.active_group
        if group is not None:
            for name, weight in self.block.trainable_tensors().items():
                base = self._base_weights
                sent.mean[name] = weight - base[name] if base else weight.clone()
            fraction = self.nodes.replica_fraction
            sent.completion = self.compressor.begin(group, sent.mean, fraction, clock.update)
        return sent

    def merge(self, sent: InFlightMean) -> None:
        """Merge a mean, x <- (k x + P mean) / (k + P), and broadcast the weights in the node.

        k is 2 B, or 1 without a delay. Collective over the inter-node group and the node.
        """
        sent.finish()
        nodes = self.nodes.node_count
        local = 2 * sent.delay or 1
        weights = self.block.trainable_tensors()
        for name, mean in sent.mean.items():
            other = mean + self._base_weights[name] if self._base_weights else mean
            weights[name].mul_(local / (local + nodes)).add_(other, alpha=nodes / (local + nodes))
        self.broadcast_in_node(sent.group_index)

    def broadcast_in_node(self, group_index: int) -> None:
        """Give a node the weights of its member of a group. Collective over the node."""
        self.nodes.node_group.broadcast_(
            self.block.trainable_tensors(), self.nodes.root(group_index)
        )

    def state(self) -> dict[str, Tensor]:
        """Return the active group, the mean in flight, which must be finished, and base weights."""
        state = {"active": torch.tensor(self.active_index)}
        if (sent := self.in_flight) is not None:
            state["parcel"] = torch.tensor([sent.group_index, sent.delay, sent.due_update])
            state |= add_prefix("stale/", sent.mean)
        return state | add_prefix("base/", self._base_weights)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the active group, the mean in flight and the base weights."""
        self.active_index = int(state["active"])
        if "parcel" in state:
            group_index, delay, due_update = map(int, state["parcel"].tolist())
            mean = clone_all(select_prefix(state, "stale/"))
            self.in_flight = InFlightMean(group_index, delay, due_update, mean)
        self._base_weights = clone_all(select_prefix(state, "base/"))
