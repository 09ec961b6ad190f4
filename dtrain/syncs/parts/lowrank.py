"""Low rank: matrices split by their singular values, and optimizer state that follows.

Invariant: an uncut split multiplied together is the matrix, up to rounding; what is cut off an
optimizer's moments is lost, what they lack is zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dtrain.errors import NUMERIC, Refusal
from dtrain.factors import Factors
from dtrain.weights import Weights, whole

Parts = tuple[Tensor, Tensor, Tensor]
"""U (a, k), the singular values (k,), V' (k, b)."""


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


def factored(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (a, k) and (k, b) of a weight, k being its rank up to the rounding of its
    dtype; the square roots of singular values are shared."""
    u, s, v = split(weight.double())
    rank = kept(s, max(len(u), v.shape[1]) * torch.finfo(weight.dtype).eps)
    root = s[:rank].sqrt()
    parts = u[:, :rank] * root, root[:, None] * v[:rank]
    return parts[0].to(weight.dtype), parts[1].to(weight.dtype)


def fitted(old: Tensor, shape: torch.Size) -> Tensor:
    """Return `old` in another shape: what overlaps, and zeros.

    A factor's moments (a, k) fill the first columns of the matrix, and the other way round.
    """
    new = old.new_zeros(shape)
    seen = new.view(len(new), -1)
    flat = old.reshape(len(old), -1)
    rows, columns = (min(pair) for pair in zip(seen.shape, flat.shape, strict=True))
    seen[:rows, :columns] = flat[:rows, :columns]
    return new


def reformed(memory: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return optimizer state for what is trained now, out of the state of what was.

    A factor (`<weight>.left`, `<weight>.right`) takes over from its matrix, the matrix from the
    factor that was trained, and a core of another size from the one before.
    """
    found = {}
    for key, old in memory.items():
        name, _, entry = key.rpartition("/")
        plain = whole(name)
        for heir in (name, plain, f"{plain}.left", f"{plain}.right"):
            if heir in values:
                new = values[heir]
                same = not old.dim() or old.shape == new.shape
                found[f"{heir}/{entry}"] = old.clone() if same else fitted(old, new.shape)
                break
    return found


def hollow(weights: Weights, name: str, rank: int, core: bool = False) -> Factors:
    """Put zeros of a rank in the place of a matrix; what was saved fills them."""
    rows, columns = weights.shape(name)
    like = weights.parameters[name].detach()
    sides = [like.new_zeros(rows, rank), like.new_zeros(rank, columns)]
    return weights.factor(name, sides[0], *[like.new_zeros(rank, rank)] * core, sides[1])
