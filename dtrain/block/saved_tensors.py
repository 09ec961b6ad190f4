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

from dtrain.block.micro_batch import MicroBatch


class SavedTensors:
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

    def __init__(self, model_tensors: Iterable[Tensor], asynchronous: bool = False) -> None:
        self.set_model_tensors(model_tensors)
        self.asynchronous = asynchronous
        self.storage_sizes: dict[Hashable, dict[int, int]] = {}
        self.counting = True
        self.peak_bytes = 0

    def set_model_tensors(self, model_tensors: Iterable[Tensor]) -> None:
        """Hear that these are the model's own tensors now."""
        self.storage_owners = {_storage_id(tensor): tensor for tensor in model_tensors}

    @contextmanager
    def record(self, key: Hashable) -> Iterator[None]:
        """Watch what the body saves for backward, counted under `key`."""
        if not self.counting and not self.asynchronous:
            yield
            return
        seen = self.storage_sizes.setdefault(key, {}) if self.counting else {}

        def pack(tensor: Tensor) -> Any:
            storage = _storage_id(tensor)
            owner = self.storage_owners.get(storage)
            if owner is None:
                seen[storage] = tensor.untyped_storage().nbytes()
            elif self.asynchronous and isinstance(owner, nn.Parameter):
                return owner, tensor.size(), tensor.stride(), tensor.storage_offset()
            # Detached: an output that keeps itself alive would never be freed.
            return tensor.detach(), tensor._version

        with saved_tensors_hooks(pack, _unpack):
            yield
        if self.counting:
            self._update_peak()

    def add_micro_batch(self, key: Hashable, micro_batch: MicroBatch) -> None:
        """Count what a micro-batch itself keeps after its forward, saved for backward or not."""
        if not self.counting:
            return
        kept = [
            micro_batch.x,
            micro_batch.y,
            *micro_batch.layer_outputs.values(),
            *micro_batch.taps.values(),
            *micro_batch.saved_buffers.values(),
        ]
        kept += [out for _, out in micro_batch.leaf_calls]
        kept += [] if micro_batch.samples is None else [micro_batch.samples]
        seen = self.storage_sizes.setdefault(key, {})
        for tensor in kept:
            if _storage_id(tensor) not in self.storage_owners:
                seen[_storage_id(tensor)] = tensor.untyped_storage().nbytes()
        self._update_peak()

    def register_stand_in(self, tensor: Tensor, parameter: Tensor) -> None:
        """Hear that a tensor's memory stands in for a parameter's."""
        self.storage_owners[_storage_id(tensor)] = parameter

    def unregister_stand_in(self, tensor: Tensor) -> None:
        """Hear that it does so no more."""
        del self.storage_owners[_storage_id(tensor)]

    def drop(self, key: Hashable) -> None:
        """Forget a micro-batch whose backward is done."""
        self.storage_sizes.pop(key, None)

    def stop_counting(self) -> None:
        """Stop counting, unless a micro-batch is live: later ones repeat those that were seen."""
        self.counting = bool(self.storage_sizes)

    def _update_peak(self) -> None:
        total = sum(size for each in self.storage_sizes.values() for size in each.values())
        self.peak_bytes = max(self.peak_bytes, total)


def _storage_id(tensor: Tensor) -> int:
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
