"""Low rank: matrices split by their singular values, and optimizer state that follows.

Invariant: an uncut split multiplied together is the matrix, up to rounding. The optimizer state of
a factor is that of its matrix by the chain rule; what is cut off that of a core is lost.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from dtrain.block.low_rank import LowRankWeight
from dtrain.block.parameters import BlockParameters, matrix_name
from dtrain.errors import ConfigError, NumericalError
from dtrain.syncs.base import LowRankStats, select_prefix

SVD = tuple[Tensor, Tensor, Tensor]
"""U (a, k), the singular values (k,), V' (k, b)."""


FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})
"""What torch's optimizers keep that is linear in gradients."""


SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""What they keep that is linear in squares of gradients."""


def require_whole_block(block: object, sync_name: str) -> BlockParameters:
    """Return a block whose matrices can become products; refuse a part of one, for a sync."""
    if not isinstance(block, BlockParameters):
        raise ConfigError(
            "todo.key",
            f"[sync] '{sync_name}' needs whole blocks: take it out of 'only-large'",
            agreed=True,
        )
    return block


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight (a, ...) as a matrix (a, b), detached; the same memory."""
    return weight.detach().reshape(len(weight), -1)


def svd(weight: Tensor) -> SVD:
    """Return the singular value decomposition of a weight seen as a matrix, in its dtype.

    Narrower numbers than float32 are split as float32. The largest element of a column of U is
    positive: without that its sign would follow from rounding.

    Raises
    ------
    DtrainError
        The weight is NaN or infinite (code 4).
    """
    own = as_matrix(weight)
    if not own.isfinite().all():
        advice = "lower [optimizer] lr, or set clip"
        raise NumericalError(
            "todo.key", f"a weight of {tuple(weight.shape)} is not finite: {advice}"
        )
    wide = own if own.dtype == torch.float64 else own.float()
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return (u * signs).to(own), s.to(own), (v * signs.T).to(own)


def kept_rank(singular_values: Tensor, cutoff: float) -> int:
    """Return how many singular values stay: up to the last above `cutoff` times the first, and
    one at least."""
    above = (singular_values > cutoff * singular_values[0]).nonzero()
    return int(above.max()) + 1 if len(above) else 1


def balanced_factors(weight: Tensor, rank: int, decomposition: SVD | None) -> list[Tensor]:
    """Return factors (a, rank) and (rank, b) of a weight; the roots of singular values are shared.

    Without what `split` made of it, they are room for what another rank found.
    """
    own = as_matrix(weight)
    if decomposition is None:
        return [own.new_empty(len(own), rank), own.new_empty(rank, own.shape[1])]
    u, s, v = decomposition
    root = s[:rank].sqrt()
    return [(u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous()]


def full_rank_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (a, k) and (k, b) of a weight, k being its rank up to the rounding of its
    dtype; the roots of singular values are shared."""
    u, s, v = svd(weight.double())
    rank = kept_rank(s, max(len(u), v.shape[1]) * torch.finfo(weight.dtype).eps)
    left, right = balanced_factors(weight, rank, (u, s, v))
    return left.to(weight.dtype), right.to(weight.dtype)


def factor_optimizer_state(
    optimizer_state: Mapping[str, Tensor], name: str, product: LowRankWeight
) -> dict[str, Tensor]:
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
    own = {
        key.rpartition("/")[2]: e
        for key, e in split_optimizer_state(optimizer_state, [name])[1].items()
    }
    if not {entry for entry, each in own.items() if each.dim()} <= FIRST_MOMENTS | SECOND_MOMENTS:
        return {}
    left, right = product.left.detach(), product.right.detach()
    side = "left" if product.left.requires_grad else "right"
    found = {}
    for entry, each in own.items():
        new = each.clone()
        if each.dim():
            by = (right if side == "left" else left).to(each)
            by = by.square() if entry in SECOND_MOMENTS else by
            new = as_matrix(each) @ by.T if side == "left" else by.T @ as_matrix(each)
        found[f"{name}.{side}/{entry}"] = new
    return found


def split_optimizer_state(
    optimizer_state: Mapping[str, Tensor], names: Container[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the optimizer state of all else, and that of these weights or their factors."""
    own = {
        k: each for k, each in optimizer_state.items() if matrix_name(k.rpartition("/")[0]) in names
    }
    return {key: each for key, each in optimizer_state.items() if key not in own}, own


def resize_core_moments(moments: Tensor, shape: torch.Size) -> Tensor:
    """Return a core's moments (k, k) in another size: what overlaps, and zeros."""
    new = moments.new_zeros(shape)
    rows, columns = (min(pair) for pair in zip(shape, moments.shape, strict=True))
    new[:rows, :columns] = moments[:rows, :columns]
    return new


def resize_optimizer_state(
    optimizer_state: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return optimizer state for cores of another size, and of the rest as it was."""
    found = {}
    for key, old in optimizer_state.items():
        shape = values[key.rpartition("/")[0]].shape
        found[key] = old if not old.dim() or old.shape == shape else resize_core_moments(old, shape)
    return found


def factorize_with_zeros(
    weights: BlockParameters, name: str, rank: int, with_core: bool = False
) -> LowRankWeight:
    """Put zeros of a rank in the place of a matrix; what was saved fills them."""
    rows, columns = weights.matrix_shape(name)
    like = weights.parameters[name].detach()
    sides = [like.new_zeros(rows, rank), like.new_zeros(rank, columns)]
    return weights.factorize(name, sides[0], *[like.new_zeros(rank, rank)] * with_core, sides[1])


@final
class TrafficLedger:
    """Counts for the weights of one block.

    Parameters
    ----------
    weights : Weights
        While none of them is a product.
    hosts : sequence of str
        Where each replica is.
    """

    def __init__(self, weights: BlockParameters, hosts: Sequence[str]) -> None:
        places = range(len(hosts)) if len(set(hosts)) == 1 else hosts
        self._node_of_replica: list[int | str] = list(places)
        self._weights, self._ranks = weights, dict[str, int]()
        self._element_counts = {
            name: each.numel() for name, each in weights.trainable_tensors().items()
        }
        self._sent_elements = dict.fromkeys(self._element_counts, 0.0)
        self._updates = 0

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Hear at which ranks matrices are products now."""
        self._ranks |= ranks

    def count_mean(
        self, values: Mapping[str, Tensor], replicas: Iterable[int] | None = None
    ) -> None:
        """Count a mean of tensors, weights or parts of one, among replicas; None: all."""
        self.count_elements({name: each.numel() for name, each in values.items()}, replicas)

    def count_elements(
        self, element_counts: Mapping[str, float], replicas: Iterable[int] | None = None
    ) -> None:
        """Count a mean of so many numbers for each weight, or part of one."""
        for name, count in element_counts.items():
            self._sent_elements[matrix_name(name)] += 2 * self._node_crossings(replicas) * count

    def count_update(self) -> None:
        """Count an update."""
        self._updates += 1

    def _node_crossings(self, replicas: Iterable[int] | None = None) -> int:
        own = (
            self._node_of_replica
            if replicas is None
            else [self._node_of_replica[rank] for rank in replicas]
        )
        return len(set(own)) - 1

    def low_rank_stats(self) -> dict[str, LowRankStats]:
        """Return what is known of each weight."""
        every = 2 * self._node_crossings() * self._updates
        found: dict[str, LowRankStats] = {}
        for name, numbers in self._element_counts.items():
            rank, held = self._ranks.get(name), numbers
            if rank is not None:
                held = min(numbers, rank * sum(self._weights.matrix_shape(name)))
            sent = self._sent_elements[name]
            found[name] = LowRankStats(
                rank=rank, numbers=numbers, held=held, sent=sent, plain=every * numbers
            )
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the counts."""
        sent = {f"sent/{name}": torch.tensor(each) for name, each in self._sent_elements.items()}
        ranks = {f"rank/{name}": torch.tensor(each) for name, each in self._ranks.items()}
        return {"updates": torch.tensor(self._updates), **sent, **ranks}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        self._updates = int(state["updates"])
        self._sent_elements = {
            name: float(each) for name, each in select_prefix(state, "sent/").items()
        }
        self._ranks = {name: int(each) for name, each in select_prefix(state, "rank/").items()}
