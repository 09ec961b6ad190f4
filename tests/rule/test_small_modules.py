"""Small modules: measured on the CPU they have the spec that the meta device gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.models.cnn import Cnn
from dtrain.models.mlp import Mlp
from dtrain.models.output_spec import OutputSpec
from dtrain.models.resnet import ResNet
from dtrain.models.sequence_layers import SequenceHead
from dtrain.models.shape_inference import LayerProfile, profile_module
from dtrain.models.small_modules import PLAIN_CLASSES, is_small, zeros_on_cpu
from dtrain.models.transformer_layers import LayerOptions, TransformerLayer
from dtrain.models.vit import PatchEmbedding
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec

IMAGE = (8, 6, 6)
MODELS = {
    "mlp": Mlp((20, 12)),
    "cnn": Cnn(((8,), (16,)), norm="group"),
    "resnet": ResNet(8),
}
PLAIN: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), IMAGE),
    "flat": (nn.Sequential(nn.Flatten(), nn.Linear(288, 4), nn.Unflatten(1, (2, 2))), IMAGE),
    "conv": (nn.Conv2d(8, 4, 3, padding=1, groups=2), IMAGE),
    "conv1": (nn.Conv1d(8, 4, 3, stride=2), (8, 9)),
    "norms": (nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm(6)), IMAGE),
    "rms": (nn.RMSNorm(6), IMAGE),
    "embedding": (nn.Embedding(9, 5), (7,)),
    "norm1": (nn.Sequential(nn.BatchNorm1d(8), nn.Identity(), nn.Dropout(0.5)), (8, 9)),
    "pools": (nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)), IMAGE),
    "activations": (
        nn.Sequential(
            *(nn.ReLU(), nn.LeakyReLU(), nn.GELU(), nn.SiLU()),
            *(nn.ELU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus()),
        ),
        IMAGE,
    ),
}


class OwnLinear(nn.Linear):
    """A user's subclass, whose forward may be another one."""


def sequence_layers() -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Return layers of the models of sequences with the shape of a sample."""
    options = LayerOptions(16, 4, 2, 24, "rms", rotary=True)
    output = OutputSpec((5, 7), 0)
    return [
        ("transformer layer", TransformerLayer(options), (7, 16)),
        ("sequence head", SequenceHead(16, output, "layer", "last"), (7, 16)),
        ("patches", PatchEmbedding(3, 4, 4, 6, True, 0.0), (3, 8, 8)),
    ]


def cases() -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Return modules on the meta device with the shape of a sample."""
    with torch.device("meta"):
        found = [(name, module.to("meta"), shape) for name, (module, shape) in PLAIN.items()]
        for model_name, model in MODELS.items():
            shape: tuple[int, ...] = (3, 8, 8)
            for name, make in model.layers(shape, 10):
                layer = make()
                found.append((f"{model_name} {name}", layer, shape))
                shape = profile_module(layer, shape, torch.float32).output_shape
        found += [(name, layer.to("meta"), shape) for name, layer, shape in sequence_layers()]
        for name in ("local-head", "infopro", "deep-supervision"):
            objective = OBJECTIVES[name]()
            spec = BlockSpec(0, 3, (3, 8, 8), (16, 4, 4), torch.float32, 10, (3, 8, 8))
            head = objective.make_head(spec)
            if (shape_of_input := objective.head_input_shape(spec)) is not None:
                assert head is not None
                found.append((name, head, shape_of_input))
    return found


def test_every_plain_class_is_measured() -> None:
    measured = {type(part) for module, _ in PLAIN.values() for part in module.modules()}
    assert measured == PLAIN_CLASSES


def test_the_spec_is_that_of_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cases()

    def profile(name: str, module: nn.Module, shape: tuple[int, ...]) -> LayerProfile:
        dtype = torch.int64 if name == "embedding" else torch.float32
        return profile_module(module, shape, dtype, name)

    ours = [profile(*case) for case in found]
    assert all(is_small([module], shape) for _, module, shape in found)
    monkeypatch.setattr("dtrain.models.shape_inference.is_small", lambda *_: False)
    for spec, (name, module, shape) in zip(ours, found, strict=True):
        assert spec == profile(name, module, shape), name
        assert all(tensor.is_meta for tensor in module.parameters()), name


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (OwnLinear(6, 5), (6,)),
        (nn.Sequential(nn.Flatten(), OwnLinear(6, 5)), (6,)),
        (nn.MultiheadAttention(6, 2), (4, 6)),
        (nn.Linear(6000, 6000), (6000,)),
        (nn.Conv2d(64, 64, 3), (64, 64, 64)),
        (nn.ReLU(), (3, 1024, 1024)),
    ],
    ids=["own", "own inside", "attention", "wide", "large image", "no parameters"],
)
def test_other_modules_are_measured_on_the_meta_device(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    assert not is_small([module], shape)


def test_many_rows_are_not_small() -> None:
    assert is_small([nn.Linear(64, 64)], (64,), rows=64)
    assert not is_small([nn.Linear(64, 64)], (64,), rows=1 << 14)
    assert not is_small([nn.Flatten()], (64,), rows=1 << 16)


def test_a_copy_has_zeros_and_what_is_trained() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module[0].requires_grad_(False)
    copy = zeros_on_cpu(module)
    assert [p.requires_grad for p in copy.parameters()] == [False, False, True, True]
    assert all(tensor.device.type == "cpu" for tensor in copy.state_dict().values())
    assert not any(tensor.any() for tensor in copy.state_dict().values())
