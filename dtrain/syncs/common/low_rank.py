"""Low-rank factorization of a block's weights by SVD, and the optimizer state that goes with it.

A weight (a, ...) is seen as a matrix (a, b). Used by AB (two factors) and OIALR (three), and by the
export of factors.

Invariant: factors of full rank multiply to the matrix, up to rounding. The optimizer state of a
factor is that of its matrix by the chain rule. A core that shrinks loses the state of what is cut.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from dtrain.block.complex_tensors import real_view
from dtrain.block.low_rank import LowRankWeight
from dtrain.block.parameters import BlockParameters, matrix_name
from dtrain.comm.node_topology import NodeTopology
from dtrain.errors import ConfigError, NumericalError
from dtrain.syncs.base import LowRankStats, add_prefix, select_prefix

SVD = tuple[Tensor, Tensor, Tensor]
"""U (a, k), the singular values (k,), V' (k, b)."""

FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})
"""State of torch's optimizers that is linear in gradients."""

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""State of torch's optimizers that is linear in squares of gradients."""


def require_whole_block(block: object, sync_name: str) -> BlockParameters:
    """Return a block whose matrices can be factorized.

    Raises
    ------
    ConfigError
        It is only a subset of a block's tensors.
    """
    if not isinstance(block, BlockParameters):
        raise ConfigError(
            "sync.needs-whole-block",
            f"[sync] '{sync_name}' needs whole blocks: it cannot be inside 'only-large'",
            on_all_ranks=True,
        )
    return block


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight (a, ...) as a matrix (a, b), detached; the same memory."""
    return weight.detach().reshape(len(weight), -1)


# ---- factors


def svd(weight: Tensor) -> SVD:
    """Return the singular value decomposition of a weight seen as a matrix, in its dtype.

    Dtypes narrower than float32 are decomposed as float32. The largest element of each column of U
    is positive; otherwise its sign would follow from rounding.

    Raises
    ------
    NumericalError
        The weight is NaN or infinite.
    """
    matrix = as_matrix(weight)
    if not matrix.isfinite().all():
        raise NumericalError(
            "sync.svd-not-finite",
            f"a weight of {tuple(weight.shape)} is not finite and cannot be factorized: lower "
            "[optimizer] lr, or set clip",
        )
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return (u * signs).to(matrix), s.to(matrix), (v * signs.T).to(matrix)


def kept_rank(singular_values: Tensor, cutoff: float) -> int:
    """Return how many singular values are kept: up to the last above `cutoff` times the first.

    At least one is kept.
    """
    above = (singular_values > cutoff * singular_values[0]).nonzero()
    return int(above.max()) + 1 if len(above) else 1


def balanced_factors(weight: Tensor, rank: int, decomposition: SVD | None) -> list[Tensor]:
    """Return factors (a, rank) and (rank, b) of a weight, U sqrt(S) and sqrt(S) V'.

    Without a decomposition they are uninitialised, to receive the factors of another rank.
    """
    matrix = as_matrix(weight)
    if decomposition is None:
        return [matrix.new_empty(len(matrix), rank), matrix.new_empty(rank, matrix.shape[1])]
    u, s, v = decomposition
    root = s[:rank].sqrt()
    return [(u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous()]


def full_rank_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (a, k) and (k, b) of a weight, U sqrt(S) and sqrt(S) V'.

    k is the numerical rank of the weight in its dtype.
    """
    u, s, v = svd(weight.double())
    rank = kept_rank(s, max(len(u), v.shape[1]) * torch.finfo(weight.dtype).eps)
    left, right = balanced_factors(weight, rank, (u, s, v))
    return left.to(weight.dtype), right.to(weight.dtype)


def factorize_with_zeros(
    weights: BlockParameters, name: str, rank: int, with_core: bool = False
) -> LowRankWeight:
    """Replace a matrix by zero factors of a rank, to be loaded from a checkpoint."""
    rows, columns = weights.matrix_shape(name)
    like = weights.parameters[name].detach()
    left, right = like.new_zeros(rows, rank), like.new_zeros(rank, columns)
    core = [like.new_zeros(rank, rank)] if with_core else []
    return weights.factorize(name, left, *core, right)


# ---- optimizer state


def split_optimizer_state(
    optimizer_state: Mapping[str, Tensor], names: Container[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the optimizer state of others, and that of these weights or their factors."""
    others, selected = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in optimizer_state.items():
        part = selected if matrix_name(key.rpartition("/")[0]) in names else others
        part[key] = tensor
    return others, selected


def factor_optimizer_state(
    optimizer_state: Mapping[str, Tensor], name: str, product: LowRankWeight
) -> dict[str, Tensor]:
    """Return the optimizer state of the trained factor of a weight, from the weight's own.

    Sums of gradients G follow by the chain rule: G R' for the left factor of L R, and L' G for the
    right one. For sums of squares the signs of G's elements are taken as independent:
    (G * G) (R * R)' and (L * L)' (G * G). If the optimizer keeps anything else (see `FIRST_MOMENTS`
    and `SECOND_MOMENTS`), the factor starts without state.

    Parameters
    ----------
    optimizer_state : mapping
        As `BlockParameters.optimizer_state` returned it, with that of the weight as
        ``<name>/<entry>``.
    name : str
        The weight.
    product : LowRankWeight
        Of two factors, one of which is trained.
    """
    _, selected = split_optimizer_state(optimizer_state, [name])
    entries = {key.rpartition("/")[2]: tensor for key, tensor in selected.items()}
    moments = {entry for entry, tensor in entries.items() if tensor.dim()}
    if not moments <= FIRST_MOMENTS | SECOND_MOMENTS:
        return {}
    trains_left = product.left.requires_grad
    side, other = ("left", product.right) if trains_left else ("right", product.left)
    state = {}
    for entry, tensor in entries.items():
        if not tensor.dim():
            state[f"{name}.{side}/{entry}"] = tensor.clone()
            continue
        factor = other.detach().to(tensor)
        factor = factor.square() if entry in SECOND_MOMENTS else factor
        matrix = as_matrix(tensor)
        state[f"{name}.{side}/{entry}"] = matrix @ factor.T if trains_left else factor.T @ matrix
    return state


def resize_core_moments(moments: Tensor, shape: torch.Size) -> Tensor:
    """Return a core's moments (k, k) in another shape: the overlap is copied, the rest is zero."""
    resized = moments.new_zeros(shape)
    rows, columns = (min(pair) for pair in zip(shape, moments.shape, strict=True))
    resized[:rows, :columns] = moments[:rows, :columns]
    return resized


def resize_optimizer_state(
    optimizer_state: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the optimizer state with moments in the shapes of the trained tensors."""
    state = {}
    for key, tensor in optimizer_state.items():
        shape = trained[key.rpartition("/")[0]].shape
        fits = not tensor.dim() or real_view(tensor).shape == shape
        state[key] = tensor if fits else resize_core_moments(tensor, shape)
    return state


# ---- traffic


@final
class TrafficLedger:
    """Counts the elements that cross between nodes, for each trained tensor of a block.

    On a single node every replica counts as a node of its own.

    Parameters
    ----------
    weights : BlockParameters
        Before any of its matrices is factorized.
    nodes : sequence of hashable
        The node of each replica.
    """

    def __init__(self, weights: BlockParameters, nodes: Sequence[Hashable]) -> None:
        replicas = NodeTopology(nodes, 0).nodes
        replicas = [[rank] for rank in replicas[0]] if len(replicas) == 1 else replicas
        self._node_of_replica = {
            rank: node for node, ranks in enumerate(replicas) for rank in ranks
        }
        self._weights = weights
        self._ranks: dict[str, int] = {}
        self._updates = 0
        self._element_counts = {
            name: tensor.numel() for name, tensor in weights.trainable_tensors().items()
        }
        self._sent_elements = dict.fromkeys(self._element_counts, 0.0)

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Record the ranks at which matrices are factorized now."""
        self._ranks |= ranks

    def count_mean(
        self, tensors: Mapping[str, Tensor], replicas: Iterable[int] | None = None
    ) -> None:
        """Count a mean of tensors, or of factors of them, over some replicas; None: all."""
        self.count_elements({name: tensor.numel() for name, tensor in tensors.items()}, replicas)

    def count_elements(
        self, element_counts: Mapping[str, float], replicas: Iterable[int] | None = None
    ) -> None:
        """Count a mean of so many elements of each tensor, over some replicas; None: all."""
        crossings = self._node_crossings(replicas)
        for name, count in element_counts.items():
            self._sent_elements[matrix_name(name)] += 2 * crossings * count

    def count_update(self) -> None:
        """Count an update."""
        self._updates += 1

    def _node_crossings(self, replicas: Iterable[int] | None = None) -> int:
        """Return how often a mean's elements cross between nodes in each direction."""
        ranks = self._node_of_replica if replicas is None else replicas
        return len({self._node_of_replica[rank] for rank in ranks}) - 1

    def low_rank_stats(self) -> dict[str, LowRankStats]:
        """Return rank and traffic of each trained tensor."""
        plain = 2 * self._node_crossings() * self._updates
        return {
            name: LowRankStats(
                rank=self._ranks.get(name),
                numbers=numbers,
                held=self._held_elements(name),
                sent=self._sent_elements[name],
                plain=plain * numbers,
            )
            for name, numbers in self._element_counts.items()
        }

    def _held_elements(self, name: str) -> int:
        """Return the elements of two factors of a matrix, or its own if they are fewer."""
        numbers = self._element_counts[name]
        if name not in self._ranks:
            return numbers
        return min(numbers, self._ranks[name] * sum(self._weights.matrix_shape(name)))

    def state(self) -> dict[str, Tensor]:
        """Return the counts and ranks."""
        sent = {name: torch.tensor(count) for name, count in self._sent_elements.items()}
        ranks = {name: torch.tensor(rank) for name, rank in self._ranks.items()}
        return {
            "updates": torch.tensor(self._updates),
            **add_prefix("sent/", sent),
            **add_prefix("rank/", ranks),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the counts and ranks."""
        sent, ranks = select_prefix(state, "sent/"), select_prefix(state, "rank/")
        self._updates = int(state["updates"])
        self._sent_elements = {name: float(count) for name, count in sent.items()}
        self._ranks = {name: int(rank) for name, rank in ranks.items()}
