"""Whether a model takes samples of integers as they are: token ids, categories, counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dtrain.models.layers import LayerStack
from dtrain.models.shape_inference import infer_layers


def takes_integers(
    model: LayerStack,
    shape: tuple[int, ...],
    input_dtype: torch.dtype,
    other_inputs: Sequence[tuple[tuple[int, ...], torch.dtype]] = (),
) -> bool:
    """Return whether all layers run on integer samples, as those behind an embedding do.

    Linear layers and convolutions refuse integers, so a model that begins with them gets real
    numbers.

    Parameters
    ----------
    shape : tuple of int
        Shape of one sample.
    input_dtype : torch.dtype
        Dtype of the stored samples; the answer is False for real numbers.
    other_inputs : sequence of (shape, dtype)
        Further inputs of a sample.
    """
    if input_dtype.is_floating_point or input_dtype.is_complex:
        return False
    try:
        specs = infer_layers(model, shape, torch.float32, torch.int64, other_inputs)
    except Exception:  # of any kind: with real numbers a real fault is raised again
        return False
    return specs[-1].dtype.is_floating_point
