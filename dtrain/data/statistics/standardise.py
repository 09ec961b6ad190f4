"""The splits that are standardised by mean and deviation per channel of the training split.

Invariant: all splits have the same statistics, which are given, taken over, or computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from dtrain.data.dataset import Dataset, DatasetSplits, DatasetView, InputTargets, Moments
from dtrain.data.statistics.statistics_pass import Channels, channel_axis, compute_statistics
from dtrain.errors import DataError


@final
class TrainingStatistics:
    """The moments of a training split: given, set, or computed on first need.

    Parameters
    ----------
    dataset : Dataset
        The training split, not standardised.
    axis : int
        The axis of a sample that holds the channels.
    """

    def __init__(self, dataset: Dataset, axis: int = 0) -> None:
        self.dataset, self.axis = dataset, axis
        self._moments = dataset.given_moments
        if self._moments is not None and len(self._moments[0]) != dataset.shape[axis]:
            raise DataError(
                "data.statistics-shape",
                f"the training split comes with the statistics of {len(self._moments[0])} "
                f"channels, but samples of shape {dataset.shape} have {dataset.shape[axis]} along "
                f"axis {axis}: set [data] channels to the axis of the statistics, or delete the "
                "attributes mean and std",
            )

    @property
    def is_known(self) -> bool:
        """Whether the moments are there, so that nothing need be computed."""
        return self._moments is not None

    @property
    def is_computed(self) -> bool:
        """Whether the moments are there and the data did not come with them."""
        return self.is_known and self.dataset.given_moments is None

    @property
    def moments(self) -> Moments:
        """Mean and deviation per channel."""
        if self._moments is None:
            self._moments = compute_statistics(self.dataset, self.axis).moments
        return self._moments

    def use(self, moments: Moments) -> None:
        """Take moments that were computed before, or by other ranks."""
        self._moments = moments

    def constant_channels(self) -> list[int]:
        """Return the channels in which all numbers are equal."""
        return [int(channel) for channel in np.flatnonzero(self.moments[1] == 0)]


@final
class Standardised(DatasetView):
    """Another data set, standardised per channel: (x - mean) / standard deviation.

    Parameters
    ----------
    dataset : Dataset
        The samples to standardise.
    training : TrainingStatistics
        Those of the training split. They are computed on first need of inputs, hence never on a
        stage that needs only labels. A constant channel is left at scale 1.
    """

    def __init__(self, dataset: Dataset, training: TrainingStatistics) -> None:
        super().__init__(dataset)
        self.training = training

    def __getstate__(self) -> dict[str, Any]:
        """Return what other processes need: the statistics, not the training split."""
        return {**self.__dict__, "_scale": self._scale, "training": None}

    @property
    def channel_axis(self) -> int:
        """The axis of a sample that holds the channels."""
        return self.training.axis

    @property
    def stored(self) -> Dataset:
        """The data set that is standardised."""
        return self._dataset

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        mean, deviation = self.training.moments
        deviation = np.where(deviation > 0, deviation, 1.0)
        view = [1] * (1 + len(self.shape))
        view[1 + self.channel_axis] = -1
        return torch.from_numpy(mean).view(view), torch.from_numpy(deviation).view(view)

    def inputs(self, indices: Any) -> Tensor:
        x = self._dataset.inputs(indices)
        mean, deviation = self._scale
        return (x - mean.to(x.dtype)).div_(deviation.to(x.real.dtype))

    def statistics(self) -> dict[str, Tensor]:
        """Return mean and standard deviation as they are applied: (channels, 1, ...), or with the
        channels at their axis."""
        mean, deviation = self._scale
        return {"mean": mean[0], "std": deviation[0]}

    def use_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Standardise by other statistics, as `statistics` returned them."""
        self.__dict__["_scale"] = statistics["mean"][None], statistics["std"][None]

    def to_unit_range(self, x: Tensor) -> Tensor:
        mean, deviation = (statistic.to(x) for statistic in self._scale)
        return self._dataset.to_unit_range(x * deviation + mean)


def standardise(splits: DatasetSplits, channels: Channels = "first") -> DatasetSplits:
    """Standardise all splits with the statistics of the training split, computed once.

    Raises
    ------
    ConfigError
        A sample has no such axis of channels.
    DataError
        The training split comes with statistics of another number of channels.
    """
    training = TrainingStatistics(splits.train, channel_axis(channels, splits.train.shape))
    return splits.map(lambda split: Standardised(split, training))


def unstandardised(split: Dataset) -> Dataset:
    """Return the data set that a `Standardised` reads, or the split itself."""
    return split.stored if isinstance(split, Standardised) else split


def find_standardised(split: Dataset) -> Standardised | None:
    """Return the `Standardised` whose inputs a split has; None where they are not standardised."""
    if isinstance(split, InputTargets):
        split = split.dataset
    return split if isinstance(split, Standardised) else None
