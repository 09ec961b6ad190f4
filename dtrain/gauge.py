"""Counts the bytes that autograd keeps for micro-batches that are still alive.

Invariant: memory that is not the model's own is counted once per micro-batch, however many
operations saved it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Gauge:
    """Watches forwards from its making until `stop()`; the model's own tensors do not count.

    Attributes
    ----------
    peak_bytes : int
        The largest sum over live micro-batches so far.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.saved: dict[Hashable, dict[int, int]] = {}
        self.watching = True
        self.peak_bytes = 0

    @contextmanager
    def saving(self, key: Hashable) -> Iterator[None]:
        """Count what the body saves for backward under `key`."""
        if not self.watching:
            yield
            return
        seen = self.saved.setdefault(key, {})

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.own:
                seen[storage.data_ptr()] = storage.nbytes()
            # Detached: an output that keeps itself alive would never be freed.
            return tensor.detach(), tensor._version

        def unpack(packed: tuple[Tensor, int]) -> Tensor:
            tensor, version = packed
            if tensor._version != version:  # with hooks, autograd does not look itself
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)} that is needed for the backward "
                    "pass was changed in place"
                )
            return tensor

        with saved_tensors_hooks(pack, unpack):
            yield
        total = sum(size for each in self.saved.values() for size in each.values())
        self.peak_bytes = max(self.peak_bytes, total)

    def drop(self, key: Hashable) -> None:
        """Forget a micro-batch whose backward is done."""
        self.saved.pop(key, None)

    def stop(self) -> None:
        """Stop counting; later micro-batches repeat the first."""
        self.watching = False
