"""Tensors that autograd saves between a forward and its backward: their bytes, and stale weights.

Invariant: in asynchronous schedules a backward uses the values that the parameters hold at its own
time (plain autograd would raise); `WeightVersions` decides which these are. Every other tensor is
the one that the forward saved, or an error.

::

    forward   w_t        saves activations, and references to the weights
    updates   w_t -> w_t+D
    backward             reads w_t+D through the references, or a tensor that stands in for it

Source: Kosson et al. 2020, "Pipelined Backpropagation at Scale" (weight inconsistency).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dtrain.block.micro_batch import MicroBatch

NOT_RECORDED = nullcontext()
"""The context of a micro-batch whose saved tensors are neither counted nor resolved."""


class SavedTensors:
    """Counts the memory that micro-batches keep for their backward.

    It counts the tensors that autograd saves and those of the `MicroBatch` records, but not the
    model's own. A storage counts once per micro-batch, however many operations saved it.

    Parameters
    ----------
    model_tensors : iterable of Tensor
        The model's parameters and buffers.
    asynchronous : bool
        Whether updates may run between a forward and its backward.

    Attributes
    ----------
    counting : bool
        Whether tensors are counted now.
    live_bytes, peak_bytes : int
        Bytes of all live micro-batches, now and at most.
    """

    def __init__(self, model_tensors: Iterable[Tensor], asynchronous: bool = False) -> None:
        self.set_model_tensors(model_tensors)
        self.asynchronous = asynchronous
        self.counting = True
        self.live_bytes = 0
        self.peak_bytes = 0

    def set_model_tensors(self, model_tensors: Iterable[Tensor]) -> None:
        """Set the model's parameters and buffers, after some were replaced."""
        self.storage_owners = {_storage_id(tensor): tensor for tensor in model_tensors}

    def record(self, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        """Return a context that watches the tensors saved for the backward of a micro-batch."""
        if self.counting or self.asynchronous:
            return self._record(micro_batch)
        return NOT_RECORDED

    @contextmanager
    def _record(self, micro_batch: MicroBatch) -> Iterator[None]:
        counting = self.counting

        def pack(tensor: Tensor) -> Any:
            owner = self.storage_owners.get(_storage_id(tensor))
            if owner is None:
                if counting:
                    self._count(micro_batch, tensor)
            elif self.asynchronous and isinstance(owner, nn.Parameter):
                return owner, tensor.size(), tensor.stride(), tensor.storage_offset()
            # Detached: an output that keeps itself alive would never be freed.
            return tensor.detach(), tensor._version

        with saved_tensors_hooks(pack, _unpack):
            yield
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def add_micro_batch(self, micro_batch: MicroBatch) -> None:
        """Count the tensors that a micro-batch holds after its forward, saved or not."""
        if not self.counting:
            return
        tensors = [
            micro_batch.x,
            micro_batch.y,
            *micro_batch.other_samples,
            *micro_batch.skip_inputs.values(),
            *micro_batch.skip_outputs.values(),
            *micro_batch.layer_outputs.values(),
            *micro_batch.taps.values(),
            *micro_batch.saved_buffers.values(),
        ]
        tensors += [output for _, output in micro_batch.leaf_calls]
        tensors += [] if micro_batch.samples is None else [micro_batch.samples]
        for tensor in tensors:
            if _storage_id(tensor) not in self.storage_owners:
                self._count(micro_batch, tensor)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def release_forward(self, micro_batch: MicroBatch, keep_input: bool) -> None:
        """Drop what a forward without a graph holds, except for its input if that is kept."""
        self.drop(micro_batch)
        micro_batch.release_forward(keep_input)
        self.add_micro_batch(micro_batch)

    def register_stand_in(self, tensor: Tensor, parameter: Tensor) -> None:
        """Treat the memory of `tensor` as that of `parameter` from now on."""
        self.storage_owners[_storage_id(tensor)] = parameter

    def unregister_stand_in(self, tensor: Tensor) -> None:
        """End what `register_stand_in` began."""
        del self.storage_owners[_storage_id(tensor)]

    def drop(self, micro_batch: MicroBatch) -> None:
        """Stop counting the tensors of a micro-batch: its backward is done, or they are freed."""
        self.live_bytes -= sum(micro_batch.saved_sizes.values())
        micro_batch.saved_sizes.clear()

    def stop_counting(self) -> None:
        """Stop counting, unless a micro-batch is live: later ones need no more than those seen."""
        self.counting = self.live_bytes > 0

    def _count(self, micro_batch: MicroBatch, tensor: Tensor) -> None:
        storage, size = _storage_id(tensor), tensor.untyped_storage().nbytes()
        self.live_bytes += size - micro_batch.saved_sizes.get(storage, 0)
        micro_batch.saved_sizes[storage] = size


def _storage_id(tensor: Tensor) -> int:
    """Return a number that is unique among live storages, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def _unpack(packed: Any) -> Tensor:
    """Return the saved tensor, or the present values of the weight that it was a view of."""
    tensor: Tensor = packed[0]
    if len(packed) == 4:
        return tensor.detach().as_strided(*packed[1:])
    if tensor._version != packed[1]:  # with hooks, autograd does not look itself
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that is needed for the backward "
            "pass was changed in place"
        )
    return tensor
