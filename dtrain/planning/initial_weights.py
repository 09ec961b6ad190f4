"""Initial weights: a file, or the newest checkpoint of another run.

::

    [model] weights = "net.pt"                          a state dict
                      "runs/other"                      the newest checkpoint of a run folder
                      "runs/other/checkpoints/best"     its best evaluated weights
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, final

from torch import Tensor

from dtrain.block.parameters import is_head_name
from dtrain.errors import ConfigError
from dtrain.models.pretrained import PretrainedWeights

if TYPE_CHECKING:
    from dtrain.checkpoint.manifest import Manifest

PREFIX = "model/"


def open_weights(path: Path) -> PretrainedWeights:
    """Return the weights of a file, a run folder or a folder of checkpoints.

    Raises
    ------
    ConfigError
        There is no file, or no complete checkpoint.
    """
    if not path.is_dir():
        return PretrainedWeights(path)
    from dtrain.checkpoint.manifest import latest_checkpoint, read_manifest

    inside = path / "checkpoints"
    if (path / "manifest.json").is_file():
        manifest: Manifest | None = read_manifest(path)
    else:
        manifest = latest_checkpoint(inside if inside.is_dir() else path)
    if manifest is None:
        raise ConfigError(
            "model.weights-no-checkpoint",
            f"[model] weights: there is no complete checkpoint in {path}: give a run folder that "
            "has one, or a file",
        )
    return PretrainedWeights(path, CheckpointModel(manifest))


@final
class CheckpointModel:
    """The evaluated model of a checkpoint, without the modules of the objective."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        shapes: Mapping[str, tuple[int, ...]] = self._manifest.shapes(PREFIX)
        return {name: shape for name, shape in shapes.items() if not is_head_name(name)}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._manifest.load([PREFIX + name])[PREFIX + name]
