"""What actions, messages and memory cost: the numbers that a simulation adds up.

Invariant: plain numbers, given by the caller; nothing here is measured or guessed.

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


@final
@dataclass(frozen=True)
class Link:
    """The way from one stage to another; messages queue on it.

    Parameters
    ----------
    name : str
        What traffic is summed by, such as "intra-node".
    latency_s, bytes_per_s : float
        A message that is alone on the way takes `latency_s` + bytes / `bytes_per_s`.
    """

    name: str = "wire"
    latency_s: float = 0
    bytes_per_s: float = math.inf


@final
@dataclass(frozen=True)
class BlockCost:
    """What one block costs on its rank.

    Parameters
    ----------
    forward_s, input_gradient_s, weight_gradient_s : float
        Seconds (or any other unit of time) of `F`, `I` and `W` of one micro-batch; a `B` takes
        both gradients together. Every pass of `F` costs the same.
    update_s, meet_s : float
        Seconds of `U`, and of the sync of the replicas before it, once all of them have come.
    live_bytes : int
        What one live micro-batch keeps for its backward.
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

    def seconds(self, kind: str) -> float:
        """Return how long an action of a kind takes."""
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
    """Return the link between any two stages that costs nothing."""
    return Link()


@final
@dataclass(frozen=True)
class CostModel:
    """What a run costs.

    Parameters
    ----------
    blocks : sequence of Price
        One per block.
    message_bytes : sequence of int
        Payload of one message of each route, by the route's index; empty: nothing.
    links : callable
        `links(source, target)` is the link between two stages. Two that share a cable are two
        links here.
    """

    blocks: Sequence[BlockCost]
    message_bytes: Sequence[int] = ()
    links: Callable[[int, int], Link] = free_link

    def payload(self, route: int) -> int:
        """Return the bytes of one message of a route."""
        return self.message_bytes[route] if self.message_bytes else 0


def unit_costs(blocks: int) -> CostModel:
    """Return the costs of a drawing: F = I = W = 1, B = 2, U = 0, hops 0."""
    return CostModel((BlockCost(1, 1, 1),) * blocks)
