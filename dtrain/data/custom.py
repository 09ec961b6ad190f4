"""A user's own data: a function that returns four arrays, or a `Data` of its own sources.

Invariant: what the function returns is checked as a file would be; what it raises is the user's
own error and keeps its traceback.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from dtrain.data.source import Array, Arrays, Data, alike, below, check, span
from dtrain.errors import DATA, Refusal


def adopt(made: object, where: str) -> Data:
    """Return a user's data as `Data`.

    Parameters
    ----------
    made : object
        `Data`, or (x_train, y_train, x_test, y_test) as arrays or tensors; those are kept, not
        copied, where they are arrays or CPU tensors.
    where : str
        The function's name, for the messages.

    Raises
    ------
    Refusal
        With code 3, for anything else, or for arrays that do not fit each other.
    """
    if isinstance(made, Data):
        return alike(made, where)
    if not isinstance(made, list | tuple) or len(made) != 4:
        raise Refusal(
            f"{where} returned {_kind(made)}: return (x_train, y_train, x_test, y_test), "
            f"arrays or tensors, or a dtrain Data",
            DATA,
        )
    x_train, y_train, x_test, y_test = (_array(each) for each in made)
    check(x_train, y_train, f"{where}, train")
    check(x_test, y_test, f"{where}, test")
    classes = int(y_train.max()) + 1
    below(y_test, classes, f"{where}, test")
    return alike(Data(_arrays(x_train, y_train, classes), _arrays(x_test, y_test, classes)), where)


def _arrays(x: Array, y: Array, classes: int) -> Arrays:
    return Arrays(len(x), tuple(x.shape[1:]), classes, lambda: x, lambda: y, span(x.dtype))


def _array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _kind(made: object) -> str:
    number = f" of {len(made)}" if isinstance(made, list | tuple) else ""
    return f"a {type(made).__name__}{number}"
