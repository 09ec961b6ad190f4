"""Models of public libraries train in three blocks, and export into the classes they came from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.checkpoint.export import export
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from tests import public_nets, tiny
from tests.harness import train_in_threads
from tests.need import lack
from tests.single import one_thread  # noqa: F401

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("torchvision", {"partition": {"cuts": ["layer2", "layer4"]}}),
    "vision_transformer": (
        "torchvision",
        {"partition": {"cuts": ["encoder.layers.encoder_layer_0", "encoder.ln"]}},
    ),
    "segmentation": (
        "torchvision",
        {
            "partition": {"cuts": ["backbone.5", "classifier"]},
            "data": {"name": "tests.public_nets:labelled_pixels"},
            "task": {"loss": "cross-entropy", "metrics": ["iou"]},
        },
    ),
    "Gpt2": (
        "transformers",
        {
            "partition": {"cuts": ["transformer.h.1", "lm_head"]},
            "data": {"name": "tests.public_nets:sentences"},
            "task": {"loss": "cross-entropy", "classes-last": True, "metrics": ["perplexity"]},
        },
    ),
}


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        lack("public-models", f"{package} is not installed")


@pytest.mark.parametrize("net", CASES)
def test_a_public_model_trains_in_three_blocks(net: str, tmp_path: Path) -> None:
    """The same bits on one rank and on three, in the planned memory; names and shapes of the
    original."""
    package, settings = CASES[net]
    _require(package)
    defaults = {
        "epochs": 1,
        "batch_size": 8,
        "micro_batches": 1,
        "dtype": "float32",
        "data": {"name": "tests.public_nets:images"},
        "model": {"name": f"tests.public_nets:{net}"},
        "objective": {"name": "backprop"},
    }
    run = tiny.run(**defaults | settings)
    one, three = (train_in_threads(run, tmp_path / str(n), stages=n) for n in (1, 3))
    assert one["digest"] == three["digest"]
    planned = [rank.peak for rank in MemoryPlan(make_plan(run, 3)).rank_memory()]
    assert planned == pytest.approx(three["peak_memory_bytes"], rel=0.1)
    exported = export(tmp_path / "3", tmp_path / "net.pt")
    original = getattr(public_nets, net)()
    original.load_state_dict(exported)
    first = next(iter(original.parameters()))
    assert torch.isfinite(first).all()
