"""What autograd keeps between a forward and its backward: how much it is, and which weights.

Invariant: where a learning may come `late`, a backward uses what the parameters hold at its own
moment (plain autograd would raise), and `versions` decides what that is; everything else is what
the forward saw, or an error.

::

    forward   w_t   saves activations, and of weights only their names
    updates   w_t -> w_t+D
    backward        reads w_t+D by name, or what stands in for it

Source: Kosson et al. 2020, "Pipelined Backpropagation at Scale" (weight inconsistency).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dtrain.live import Live


class Saved:
    """Watches what micro-batches keep until they are learnt: what forwards save for backward, and
    what their `Live` holds. The model's own tensors do not count as memory.

    Parameters
    ----------
    own : iterable of Tensor
        The model's parameters and buffers.
    late : bool
        Whether updates may come between a forward and its backward.

    Attributes
    ----------
    peak_bytes : int
        The largest sum over live micro-batches, until `stop()`. A storage counts once per
        micro-batch, however many operations saved it.
    """

    def __init__(self, own: Iterable[Tensor], late: bool = False) -> None:
        self.renew(own)
        self.late = late
        self.sizes: dict[Hashable, dict[int, int]] = {}
        self.watching = True
        self.peak_bytes = 0

    def renew(self, own: Iterable[Tensor]) -> None:
        """Hear that these are the model's own tensors now."""
        self.own = {_storage(tensor): tensor for tensor in own}

    @contextmanager
    def saving(self, key: Hashable) -> Iterator[None]:
        """Watch what the body saves for backward, counted under `key`."""
        if not self.watching and not self.late:
            yield
            return
        seen = self.sizes.setdefault(key, {}) if self.watching else {}

        def pack(tensor: Tensor) -> Any:
            storage = _storage(tensor)
            owner = self.own.get(storage)
            if owner is None:
                seen[storage] = tensor.untyped_storage().nbytes()
            elif self.late and isinstance(owner, nn.Parameter):
                return owner, tensor.size(), tensor.stride(), tensor.storage_offset()
            # Detached: an output that keeps itself alive would never be freed.
            return tensor.detach(), tensor._version

        with saved_tensors_hooks(pack, _unpack):
            yield
        if self.watching:
            self._count()

    def keep(self, key: Hashable, live: Live) -> None:
        """Count what a micro-batch itself keeps after its forward, saved for backward or not."""
        if not self.watching:
            return
        kept = [live.x, live.y, *live.outs.values(), *live.taps.values(), *live.buffers.values()]
        kept += [out for _, out in live.calls]
        kept += [] if live.sample is None else [live.sample]
        seen = self.sizes.setdefault(key, {})
        for tensor in kept:
            if _storage(tensor) not in self.own:
                seen[_storage(tensor)] = tensor.untyped_storage().nbytes()
        self._count()

    def stands(self, tensor: Tensor, owner: Tensor) -> None:
        """Hear that a tensor's memory stands in for a parameter's."""
        self.own[_storage(tensor)] = owner

    def leaves(self, tensor: Tensor) -> None:
        """Hear that it does so no more."""
        del self.own[_storage(tensor)]

    def drop(self, key: Hashable) -> None:
        """Forget a micro-batch whose backward is done."""
        self.sizes.pop(key, None)

    def stop(self) -> None:
        """Stop counting, unless a micro-batch is live: later ones repeat those that were seen."""
        self.watching = bool(self.sizes)

    def _count(self) -> None:
        total = sum(size for each in self.sizes.values() for size in each.values())
        self.peak_bytes = max(self.peak_bytes, total)


def _storage(tensor: Tensor) -> int:
    """Return what tells storages apart while they live, on the meta device as well."""
    return int(tensor.untyped_storage()._cdata)


def _unpack(packed: Any) -> Tensor:
    """Return what was saved, or the present content of the weight that it was a view of."""
    tensor: Tensor = packed[0]
    if len(packed) == 4:
        return tensor.detach().as_strided(*packed[1:])
    if tensor._version != packed[1]:  # with hooks, autograd does not look itself
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that is needed for the backward "
            "pass was changed in place"
        )
    return tensor
