"""Costs of actions, messages and memory: the numbers that a simulation adds up.

Invariant: plain numbers from the caller; nothing here is measured or guessed.

    stage 0 |F0.0 forward_s|F0.1 ........|         a link carries one message after the other
                  \\ bytes / bytes_per_s
                    \\ latency_s
    stage 1           |F1.0 ........|B1.0 input_gradient_s + weight_gradient_s|
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from dtrain.schedules.actions import Kind


@final
@dataclass(frozen=True)
class Link:
    """The connection from one stage to another; its messages queue.

    Attributes
    ----------
    name : str
        Kind of link by which traffic is summed, such as "intra-node".
    latency_s, bytes_per_s : float
        A message on an idle link takes `latency_s` + bytes / `bytes_per_s`.
    """

    name: str = "wire"
    latency_s: float = 0
    bytes_per_s: float = math.inf


@final
@dataclass(frozen=True)
class BlockCost:
    """Time and memory of one block on its rank.

    Attributes
    ----------
    forward_s, input_gradient_s, weight_gradient_s : float
        Seconds (or any other unit of time) of `F`, `I` and `W` of one micro-batch; a `B` takes
        both gradients together. Every pass of `F` costs the same.
    update_s, sync_s : float
        Seconds of `U`, and of the replicas' sync before it, counted from the last replica's
        arrival.
    live_bytes : int
        Memory of one live micro-batch: everything that is kept for its backward.
    fixed_bytes : int
        Parameters, gradients and optimizer state.
    """

    forward_s: float
    input_gradient_s: float
    weight_gradient_s: float
    update_s: float = 0
    sync_s: float = 0
    live_bytes: int = 0
    fixed_bytes: int = 0

    def seconds(self, kind: Kind) -> float:
        """Return the duration of an action of this kind."""
        match kind:
            case "F":
                return self.forward_s
            case "I":
                return self.input_gradient_s
            case "W":
                return self.weight_gradient_s
            case "B":
                return self.input_gradient_s + self.weight_gradient_s
            case _:
                return self.update_s


def free_link(source: int, target: int) -> Link:
    """Return a link without cost, for any two stages."""
    return Link()


@final
@dataclass(frozen=True)
class CostModel:
    """Costs of a run.

    Attributes
    ----------
    blocks : sequence of BlockCost
        One per block.
    message_bytes : sequence of int
        Payload of one message of each route, by the route's index; empty: no payloads.
    links : callable
        `links(source, target)` is the link between two stages. Two links over one cable do not
        slow each other down.
    """

    blocks: Sequence[BlockCost]
    message_bytes: Sequence[int] = ()
    links: Callable[[int, int], Link] = free_link

    def payload(self, route: int) -> int:
        """Return the bytes of one message of a route."""
        return self.message_bytes[route] if self.message_bytes else 0


def unit_costs(blocks: int) -> CostModel:
    """Return the unit costs of drawings: F = I = W = 1, B = 2, U = 0, messages 0."""
    return CostModel((BlockCost(1, 1, 1),) * blocks)
