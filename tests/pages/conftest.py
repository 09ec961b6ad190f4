"""Pages are checked with one thread."""

from tests.single import one_thread

__all__ = ["one_thread"]
