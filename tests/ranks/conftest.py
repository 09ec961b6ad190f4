"""Runs with ranks as threads, which share what their plans count; a rank computes with one."""

from tests.counts import counted_once
from tests.single import one_thread

__all__ = ["counted_once", "one_thread"]
