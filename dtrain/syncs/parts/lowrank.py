"""Low rank: matrices split by their singular values, and optimizer state that follows.

Invariant: an uncut split multiplied together is the matrix, up to rounding. The optimizer state of
a factor is that of its matrix by the chain rule; what is cut off that of a core is lost.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from dtrain.errors import NUMERIC, Refusal
from dtrain.factors import Factors
from dtrain.weights import Weights, whole

Parts = tuple[Tensor, Tensor, Tensor]
"""U (a, k), the singular values (k,), V' (k, b)."""

SUMS = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})
"""What torch's optimizers keep that is linear in gradients."""
SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""What they keep that is linear in squares of gradients."""


def entire(block: object, name: str) -> Weights:
    """Return a block whose matrices can become products; refuse a part of one, for a sync."""
    if not isinstance(block, Weights):
        raise Refusal(
            f"[sync] '{name}' needs whole blocks: take it out of 'only-large'", agreed=True
        )
    return block


def matrix(weight: Tensor) -> Tensor:
    """Return a weight (a, ...) as a matrix (a, b), detached; the same memory."""
    return weight.detach().reshape(len(weight), -1)


def split(weight: Tensor) -> Parts:
    """Return the singular value decomposition of a weight seen as a matrix, in its dtype.

    Narrower numbers than float32 are split as float32. The largest element of a column of U is
    positive: without that its sign would follow from rounding.

    Raises
    ------
    Refusal
        The weight is NaN or infinite (code 4).
    """
    own = matrix(weight)
    if not own.isfinite().all():
        advice = "lower [optimizer] lr, or set clip"
        raise Refusal(f"a weight of {tuple(weight.shape)} is not finite: {advice}", NUMERIC)
    wide = own if own.dtype == torch.float64 else own.float()
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return (u * signs).to(own), s.to(own), (v * signs.T).to(own)


def kept(s: Tensor, cutoff: float) -> int:
    """Return how many singular values stay: up to the last above `cutoff` times the first, and
    one at least."""
    above = (s > cutoff * s[0]).nonzero()
    return int(above.max()) + 1 if len(above) else 1


def halves(weight: Tensor, rank: int, parts: Parts | None) -> list[Tensor]:
    """Return factors (a, rank) and (rank, b) of a weight; the roots of singular values are shared.

    Without what `split` made of it, they are room for what another rank found.
    """
    own = matrix(weight)
    if parts is None:
        return [own.new_empty(len(own), rank), own.new_empty(rank, own.shape[1])]
    u, s, v = parts
    root = s[:rank].sqrt()
    return [(u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous()]


def factored(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (a, k) and (k, b) of a weight, k being its rank up to the rounding of its
    dtype; the roots of singular values are shared."""
    u, s, v = split(weight.double())
    rank = kept(s, max(len(u), v.shape[1]) * torch.finfo(weight.dtype).eps)
    left, right = halves(weight, rank, (u, s, v))
    return left.to(weight.dtype), right.to(weight.dtype)


def followed(memory: Mapping[str, Tensor], name: str, product: Factors) -> dict[str, Tensor]:
    """Return the optimizer state of the factor of a weight that learns, out of the weight's own.

    Sums of gradients G follow by the chain rule, G R' for the left factor of L R and L' G for the
    right one. Of squares follows what G had if the signs of its elements were independent,
    (G * G) (R * R)' and (L * L)' (G * G). Where an optimizer keeps something else (see `SUMS` and
    `SQUARES`), the factor begins anew.

    Parameters
    ----------
    memory : mapping
        Of the weight, as `Weights.memory` tells it: ``<name>/<entry>``.
    name : str
        Of the weight.
    product : Factors
        Two, one of which learns.
    """
    own = {key.rpartition("/")[2]: e for key, e in parted(memory, [name])[1].items()}
    if not {entry for entry, each in own.items() if each.dim()} <= SUMS | SQUARES:
        return {}
    left, right = product.left.detach(), product.right.detach()
    side = "left" if product.left.requires_grad else "right"
    found = {}
    for entry, each in own.items():
        new = each.clone()
        if each.dim():
            by = (right if side == "left" else left).to(each)
            by = by.square() if entry in SQUARES else by
            new = matrix(each) @ by.T if side == "left" else by.T @ matrix(each)
        found[f"{name}.{side}/{entry}"] = new
    return found


def parted(
    memory: Mapping[str, Tensor], names: Container[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the optimizer state of all else, and that of these weights or their factors."""
    own = {k: each for k, each in memory.items() if whole(k.rpartition("/")[0]) in names}
    return {key: each for key, each in memory.items() if key not in own}, own


def fitted(old: Tensor, shape: torch.Size) -> Tensor:
    """Return a core's moments (k, k) in another size: what overlaps, and zeros."""
    new = old.new_zeros(shape)
    rows, columns = (min(pair) for pair in zip(shape, old.shape, strict=True))
    new[:rows, :columns] = old[:rows, :columns]
    return new


def reformed(memory: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return optimizer state for cores of another size, and of the rest as it was."""
    found = {}
    for key, old in memory.items():
        shape = values[key.rpartition("/")[0]].shape
        found[key] = old if not old.dim() or old.shape == shape else fitted(old, shape)
    return found


def hollow(weights: Weights, name: str, rank: int, core: bool = False) -> Factors:
    """Put zeros of a rank in the place of a matrix; what was saved fills them."""
    rows, columns = weights.shape(name)
    like = weights.parameters[name].detach()
    sides = [like.new_zeros(rows, rank), like.new_zeros(rank, columns)]
    return weights.factor(name, sides[0], *[like.new_zeros(rank, rank)] * core, sides[1])
