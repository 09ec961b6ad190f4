"""Local heads: every earlier block classifies through a small network that learns with it.

Belilovsky, Eickenberg and Oyallon, "Decoupled greedy learning of CNNs", arXiv 1901.08164; Ma, Wu,
Tang and Zhang, "Scaling supervised local learning with augmented auxiliary networks" (AugLocal),
arXiv 2402.17318. All blocks learn at the same time, and a block hands on what it made before its
own update. The networks stand in `networks`, the keys in `networked`.

Invariant: nothing is added to the stream, so the net that is exported is the net that was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from dtrain.objectives.common.aux_heads import NetworkHead


@final
@dataclass(frozen=True)
class LocalHead(NetworkHead):
    """A learned network per earlier block; prediction: last block, and the vote (sum)."""
