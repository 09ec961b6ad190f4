"""Some samples of a split are read twice: which, and what counts as the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtrain.data.dataset import Dataset, InputSpec, Subset
from dtrain.data.repeatability import SAMPLES, check_repeatable
from dtrain.data.statistics import Standardised, TrainingStatistics
from dtrain.errors import DataError
from tests.refusals import refuses


class Recorded(Dataset):
    """Samples that are their index, and a note of every read; those of `drifting` differ."""

    shape, classes = (1,), 2

    def __init__(self, size: int, drifting: tuple[int, ...] = (), others: bool = False) -> None:
        self.size, self.drifting, self.reads = size, drifting, list[list[int]]()
        if others:
            self.other_inputs = (InputSpec((), torch.float32),)
            self.drifting_others, self.drifting = drifting, ()

    def inputs(self, indices: Any) -> Tensor:
        self.reads.append(np.asarray(indices).tolist())
        return self._values(self.drifting)[:, None]

    def targets(self, indices: Any) -> Tensor:
        return torch.zeros(len(np.asarray(indices)), dtype=torch.int64)

    def read_other_inputs(self, indices: Any) -> tuple[Tensor, ...]:
        if not self.other_inputs:
            return ()
        self.reads.append(np.asarray(indices).tolist())
        return (self._values(self.drifting_others),)

    def _values(self, drifting: tuple[int, ...]) -> Tensor:
        drift = [len(self.reads) if index in drifting else 0 for index in self.reads[-1]]
        return torch.tensor(self.reads[-1], dtype=torch.float32) + torch.tensor(drift)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 1000])
def test_samples_over_the_whole_split_are_read_again_in_another_order(size: int) -> None:
    split = Recorded(size)
    check_repeatable(split, "train", True, math.inf)
    seen = [index for read in split.reads for index in read]
    assert max(seen) == size - 1
    assert min(seen) == 0
    assert len(seen) <= 3 * SAMPLES
    assert sum(seen.count(index) > 1 for index in set(seen)) >= min(size, SAMPLES) - 1
    assert all(read == sorted(read, reverse=True) for read in split.reads[1::3])


@pytest.mark.parametrize("index", [0, 999])
@pytest.mark.parametrize("others", [False, True])
def test_the_first_and_the_last_sample_are_read_even_after_the_deadline(
    index: int, others: bool
) -> None:
    with refuses(DataError, "data.not-repeatable") as caught:
        check_repeatable(Recorded(1000, (index,), others), "validation", True, -math.inf)
    assert f" {index} of the validation" in caught.value.message
    split = Recorded(1000)
    check_repeatable(split, "train", True, -math.inf)
    assert max(map(len, split.reads)) == 2


def test_inputs_are_not_read_where_a_rank_needs_none() -> None:
    split = Recorded(1000, (0,))
    check_repeatable(split, "train", False, math.inf)
    assert not split.reads


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan, math.inf, 1e30])
def test_a_difference_of_rounding_is_none(value: float) -> None:
    class Rounded(Recorded):
        def inputs(self, indices: Any) -> Tensor:
            x = torch.full((len(super().inputs(indices)), 1), value)
            return x * (1 + 1e-7 * len(self.reads))

    check_repeatable(Rounded(10), "train", True, math.inf)


def test_views_are_checked_without_their_statistics() -> None:
    drifting = Subset(Recorded(10, (4,)), np.array([0, 2, 4]))
    with refuses(DataError, "data.not-repeatable"):
        check_repeatable(
            Standardised(drifting, TrainingStatistics(drifting)), "train", True, math.inf
        )
    statistics = TrainingStatistics(Recorded(10))
    check_repeatable(Standardised(Recorded(10), statistics), "train", True, math.inf)
    assert not statistics.is_known
