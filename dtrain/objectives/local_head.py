"""Decoupled greedy learning (DGL, AugLocal): every earlier block has an auxiliary classifier.

Belilovsky, Eickenberg and Oyallon, "Decoupled greedy learning of CNNs", arXiv 1901.08164; Ma, Wu,
Tang and Zhang, "Scaling supervised local learning with augmented auxiliary networks" (AugLocal),
arXiv 2402.17318. A block and its head learn the cross-entropy of the head's scores. All blocks
learn at the same time; a block sends the activation that it computed before its own update. The
networks are in `head_networks`, the keys in `NetworkHead`.

Invariant: the activations are those of the model alone, so the exported model is the trained one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from dtrain.objectives.common.aux_heads import NetworkHead


@final
@dataclass(frozen=True)
class LocalHead(NetworkHead):
    """A trained network per earlier block. The last block predicts; the vote is the sum of the
    scores."""
