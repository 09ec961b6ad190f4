"""Whether a model takes samples of integers as they are: token ids, categories, counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dtrain.models.layers import LayerStack
from dtrain.models.shape_inference import infer_layers


IMAGE_DIMENSIONS = 3
"""Dimensions of a sample from which bytes are taken for an image."""


def takes_integers(
    model: LayerStack,
    shape: tuple[int, ...],
    input_dtype: torch.dtype,
    other_inputs: Sequence[tuple[tuple[int, ...], torch.dtype]] = (),
) -> bool:
    """Return whether samples are given to a model as integers, neither scaled nor standardised.

    They are if all layers run on integers, as those behind an embedding do; linear layers and
    convolutions refuse them. Bytes of images (C, H, W) are real numbers wherever that works, too.

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

    def runs_on(dtype: torch.dtype) -> bool:
        try:
            specs = infer_layers(model, shape, torch.float32, dtype, other_inputs)
        except Exception:  # of any kind: a real fault is raised again when the run is laid out
            return False
        return specs[-1].dtype.is_floating_point

    are_images = input_dtype == torch.uint8 and len(shape) >= IMAGE_DIMENSIONS
    return runs_on(torch.int64) and not (are_images and runs_on(torch.float32))
