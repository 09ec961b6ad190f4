"""`refuses(ConfigError, "mesh.ranks-indivisible")`: assert the class and the key of an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dtrain.errors import DtrainError


@contextmanager
def refuses(kind: type[DtrainError], key: str) -> Iterator[pytest.ExceptionInfo[DtrainError]]:
    """Assert that the code inside raises an error of exactly this class and key."""
    with pytest.raises(kind) as caught:
        yield caught
    assert (type(caught.value), caught.value.key) == (kind, key), str(caught.value)
