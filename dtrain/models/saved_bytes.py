"""SavedBytes: which tensors one layer keeps for its backward, measured without memory.

Invariant: sizes are those of one sample. The tensors between two layers are reported as facts, not
as bytes, since both layers may keep the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes(NamedTuple):
    """Tensors that a layer keeps for its backward, besides parameters and buffers.

    Attributes
    ----------
    inner : int
        Bytes of one sample of those that are neither its input nor its output.
    keeps_input, keeps_output : bool
        Whether it keeps its input, and its output.
    is_view : bool
        Whether its output is the memory of its input.
    """

    inner: int = 0
    keeps_input: bool = False
    keeps_output: bool = False
    is_view: bool = False


NOTHING_SAVED = SavedBytes()


@contextmanager
def record_saved() -> Iterator[dict[int, int]]:
    """Yield a mapping that receives the bytes of each storage that autograd saves meanwhile."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[_storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def summarise_saved(
    sizes: Mapping[int, int],
    weights: Iterable[Tensor],
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    rows: int,
) -> SavedBytes:
    """Return what `record_saved` recorded for `rows` samples of one layer."""
    in_ids, out_ids = set(map(_storage_id, inputs)), set(map(_storage_id, outputs))
    weight_ids = set(map(_storage_id, weights))
    inner = [size for key, size in sizes.items() if key not in in_ids | out_ids | weight_ids]
    saved = set(sizes)
    return SavedBytes(
        inner=sum(inner) // rows,
        keeps_input=bool(saved & in_ids),
        keeps_output=bool(saved & out_ids),
        is_view=bool(in_ids & out_ids),
    )


def _storage_id(tensor: Tensor) -> int:
    """Return a number that is unique among live storages, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)
