"""A feedback layer: it mirrors the block above, and makes one code per class.

::

    codes of the block above (classes, d_{k+1}) -- V -- psi --> own codes (classes, d_k)
    output of the block (rows, ...) ------- flat (rows, d_k) ------- x ---> scores (rows, classes)

Invariant: it learns from its own codes alone; those of the block above are a buffer, without graph.
"""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor, nn
from torch.nn.functional import elu

from dtrain.objectives.parts import pooling

Psi = Literal["elu", "none"]


@final
class Mirror(nn.Module):
    """A feedback layer (d_k, d_{k+1}), and the codes (classes, d_{k+1}) that came last."""

    draws = False
    codes: Tensor

    def __init__(self, codes: Tensor, outputs: tuple[int, ...], features: int, psi: Psi) -> None:
        super().__init__()
        self.layer = nn.Linear(codes.shape[1], pooling.width(outputs, features), bias=False)
        self.flat, self.psi = pooling.pooled(outputs, features), psi
        self.register_buffer("codes", codes)

    def forward(self, y: Tensor) -> Tensor:
        """Return the scores (rows, classes) of a block's output."""
        made: Tensor = self.flat(y) @ self.made().T
        return made

    def made(self) -> Tensor:
        """Return the block's own codes (classes, d_k)."""
        # What comes next must not change what is still to be learnt from.
        made: Tensor = self.layer(self.codes.clone())
        return elu(made) if self.psi == "elu" else made
