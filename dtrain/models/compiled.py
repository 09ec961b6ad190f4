"""Run layers under `torch.compile` without compiling them, to measure shapes and costs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_compiling(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run compiled modules as they are while the body runs."""
    if not any(map(_is_compiled, modules)):
        yield
        return
    from torch.compiler import set_stance  # an import of seconds

    with warnings.catch_warnings(), set_stance("force_eager"):
        # The flop counter has hooks on all modules, of which torch warns.
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global")
        yield


def _is_compiled(module: nn.Module) -> bool:
    """Return whether a module or a part of it is compiled."""
    return any(
        "_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
