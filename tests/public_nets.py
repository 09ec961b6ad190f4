"""Models of public libraries, unmodified: torchvision's, and GPT-2 of transformers in a wrapper."""

from __future__ import annotations

from contextlib import suppress
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

IMAGE, CLASSES = 32, 3


def import_torchvision() -> None:
    """Import torchvision; where its compiled operators cannot be loaded, as those of a wheel for
    CUDA beside a torch for the CPU, declare them: no model here calls one."""
    try:
        import torchvision
    except RuntimeError:
        for operator in ("nms", "qnms"):
            schema = f"torchvision::{operator}"
            torch.library.define(schema, "(Tensor dets, Tensor scores, float iou) -> Tensor")
        import torchvision  # noqa: F401


def torchvision_models() -> ModuleType:
    """Import `torchvision.models`."""
    import_torchvision()
    import torchvision.models

    return torchvision.models  # type: ignore[no-any-return]


def resnet18() -> nn.Module:
    """Return torchvision's ResNet-18."""
    return torchvision_models().resnet18(num_classes=CLASSES)  # type: ignore[no-any-return]


def vision_transformer() -> nn.Module:
    """Return torchvision's vision transformer, small."""
    return torchvision_models().VisionTransformer(  # type: ignore[no-any-return]
        image_size=IMAGE,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=CLASSES,
    )


def segmentation() -> nn.Module:
    """Return torchvision's LR-ASPP, which returns a dict."""
    make = torchvision_models().segmentation.lraspp_mobilenet_v3_large
    return make(num_classes=CLASSES, weights_backbone=None)  # type: ignore[no-any-return]


def gpt2_config() -> object:
    """Return the configuration of a GPT-2 of two layers."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=13, n_positions=8, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager"
    )


class Gpt2(nn.Module):
    """transformers' GPT-2 with a forward that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        with suppress(ImportError):  # transformers imports it where it is installed
            import_torchvision()
        from transformers import GPT2LMHeadModel

        whole = GPT2LMHeadModel(gpt2_config())
        self.transformer, self.lm_head = whole.transformer, whole.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores (rows, steps, vocabulary) of tokens (rows, steps)."""
        inner = self.transformer
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = inner.drop(inner.wte(tokens) + inner.wpe(positions))
        for block in inner.h:
            result = block(x)
            x = result[0] if isinstance(result, tuple) else result
        return self.lm_head(inner.ln_f(x))


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 24 images with a class of three."""
    random = np.random.default_rng(0)
    y = random.integers(0, CLASSES, 24)
    x = random.normal(size=(24, 3, IMAGE, IMAGE)).astype(np.float32) + y[:, None, None, None]
    return x[:16], y[:16], x[16:], y[16:]


def labelled_pixels() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 24 images with a class of three per pixel."""
    x, _, x_test, _ = images()
    return x, _labels(x), x_test, _labels(x_test)


def _labels(x: np.ndarray) -> np.ndarray:
    return np.digitize(x[:, 0], [0.0, 1.0])


def sentences() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 24 sequences of tokens, and the next token of each step."""
    random = np.random.default_rng(0)
    steps = random.integers(1, 3, (24, 9)).cumsum(1) % 13
    x, y = steps[:, :-1], steps[:, 1:]
    return x[:16], y[:16], x[16:], y[16:]
